# Commands on a fresh machine, each doing all its set-up in .venv:
#   make reproduce    the whole demo study: models are made, measured, swapped; ends with figures and a report, one HTML page
#   make plan         what would run, without setting up everything first (VERBOSE=1: with files and reasons)
#   make study        write a study file for models of your own, with questions (docs/study.md); STUDY=my-study.yaml
#   make check        look at a study before hours are spent on it: models, files, what is left out, a rough cost
#   make test         the tests, with a small end-to-end run included
#   make test-faults  every script killed, out of disk, with damaged inputs: hundreds of faults (20 minutes), into docs/reliability.md
#   make bench        what the hot paths cost (ten minutes; BENCH=full: twenty), into benchmarks/README.md and docs/scaling.md
# Another study: make reproduce STUDY=my-study.yaml. Another seed, where its paths hold {seed}: SEED=1. Fewer cores: CORES=1.
# Another run of it, or an arm, whose checkpoints are there (key runs): ARM=name. Snakemake's own words on every job: VERBOSE=1.

PYTHON ?= python3
STUDY ?= demo/demo.yaml
CORES ?= all
SEED ?=
ARM ?=
BENCH ?=
# Forward-pass jobs that may run at once on this machine's GPUs; without a GPU only the cores count.
GPUS ?= $(shell nvidia-smi -L 2>/dev/null | wc -l)
REPORT ?= results/$(basename $(notdir $(STUDY)))$(if $(SEED),-seed-$(SEED))$(if $(ARM),-$(ARM)).html
BIN := .venv/bin
# Where the study's report lies.
export WHERE = from cpt_utils.base.study import Study; print(Study.find("$(STUDY)", $(or $(SEED),None), $(if $(ARM),"$(ARM)",None)).result("page"))
WORKFLOW = --snakefile workflow/Snakefile --config study=$(STUDY) $(if $(SEED),seed=$(SEED)) $(if $(ARM),arm=$(ARM))
SNAKEMAKE = $(BIN)/snakemake $(WORKFLOW)

.PHONY: help reproduce study check plan unlock test test-faults bench clean

help:
	@sed -n 's/^#   //p' Makefile

# Rebuilt when a file that decides its content changes. The stamp is written last, so an interrupted set-up starts again.
.venv/installed: requirements.txt constraints.txt pyproject.toml
	@echo "== setting up .venv (once; a few minutes) =="
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@echo "== installing; what pip says is in .venv/pip.log =="
	@{ $(BIN)/python -m pip install --upgrade-strategy only-if-needed -r requirements.txt && \
	   $(BIN)/python -m pip install -c constraints.txt -e '.[reproduce,test]'; } > .venv/pip.log 2>&1 || \
	   { tail -n 20 .venv/pip.log; echo "error: the installation failed; the rest is in .venv/pip.log"; exit 1; }
	@touch $@

reproduce: .venv/installed
	@echo "== $(STUDY): the missing steps run now =="
	@mkdir -p $(dir $(REPORT))
	$(BIN)/python workflow/check.py $(STUDY) $(if $(SEED),--seed $(SEED)) $(if $(ARM),--arm $(ARM))
	$(SNAKEMAKE) --cores $(CORES) $(if $(filter-out 0,$(GPUS)),--resources gpu=$(GPUS)) --rerun-incomplete --show-failed-logs --report-after-run --report $(REPORT)
	@echo "== done; the report: $$($(BIN)/python -c "$$WHERE") (Snakemake's own, with every job and its code: $(REPORT)) =="

# Looks at the models and texts there are, asks for what it cannot see, checks, and writes the file.
study: .venv/installed
	$(BIN)/python -m cpt_utils.base.study --init $(if $(filter demo/demo.yaml,$(STUDY)),study.yaml,$(STUDY))

# What the study's models and files look like, what will be left out, and a rough cost.
check: .venv/installed
	$(BIN)/python workflow/check.py $(STUDY) $(if $(SEED),--seed $(SEED)) $(if $(ARM),--arm $(ARM))

# A dry run needs Snakemake alone: that of .venv, any other, else one in an environment of its own.
PLANNER := $(firstword $(wildcard $(BIN)/snakemake) $(shell command -v snakemake) build/plan/bin/snakemake)

plan: $(PLANNER)
	$(PLANNER) $(WORKFLOW) --dry-run $(if $(VERBOSE),,--quiet rules host)

build/plan/bin/snakemake:
	$(PYTHON) -m venv build/plan
	build/plan/bin/python -m pip install --quiet -c constraints.txt snakemake pydantic huggingface_hub

# After a power cut, or kill -9, Snakemake's lock is still there.
unlock: .venv/installed
	$(SNAKEMAKE) --unlock

test: .venv/installed
	@echo "== lint =="
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== tests =="
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test-faults: .venv/installed
	CPT_FAULTS=full $(BIN)/python -m pytest tests/faults

bench: .venv/installed
	$(if $(filter-out full,$(BENCH)),$(error BENCH is empty or full))$(BIN)/python benchmarks/bench.py $(if $(BENCH),--full)
	$(BIN)/python benchmarks/scaling.py

clean:
	rm -rf build results artifacts .snakemake .pytest_cache .ruff_cache
