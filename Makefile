# Commands for a fresh machine; each does its set-up in .venv:
#   make reproduce    the whole demo study: makes, measures and swaps models; ends with figures and a report, one HTML page
#   make plan         show what would run, without the full set-up (VERBOSE=1: with files and reasons)
#   make study        ask for your models and texts, and write a study file (docs/study.md); STUDY=my-study.yaml
#   make check        check a study before hours are spent on it: models, files, parts left out, a rough cost
#   make test         the tests, including a small end-to-end run
#   make test-faults  kill every script, fill its disk, damage its inputs: hundreds of faults (20 minutes), into docs/reliability.md
#   make bench        the cost of the hot paths (ten minutes; BENCH=full: twenty), into benchmarks/README.md and docs/scaling.md
# Another study: make reproduce STUDY=my-study.yaml. Another seed, if its paths contain {seed}: SEED=1. Fewer cores: CORES=1.
# Another run (key runs) or an arm whose checkpoints exist: ARM=name. Snakemake's own messages on every job: VERBOSE=1.

PYTHON ?= python3
STUDY ?= demo/demo.yaml
CORES ?= all
SEED ?=
ARM ?=
BENCH ?=
# Number of forward-pass jobs that may run at once on this machine's GPUs; without a GPU, only the cores limit it.
GPUS ?= $(shell nvidia-smi -L 2>/dev/null | wc -l)
REPORT ?= results/$(basename $(notdir $(STUDY)))$(if $(SEED),-seed-$(SEED))$(if $(ARM),-$(ARM)).html
BIN := .venv/bin
# Prints the path of the study's report.
export WHERE = from cpt_utils.base.study import Study; print(Study.find("$(STUDY)", $(or $(SEED),None), $(if $(ARM),"$(ARM)",None)).result("page"))
WORKFLOW = --snakefile workflow/Snakefile --config study=$(STUDY) $(if $(SEED),seed=$(SEED)) $(if $(ARM),arm=$(ARM))
SNAKEMAKE = $(BIN)/snakemake $(WORKFLOW)

.PHONY: help reproduce study check plan unlock test test-faults bench clean

help:
	@sed -n 's/^#   //p' Makefile

# Rebuilt if one of the files that define its content changes. Touched last, so an interrupted set-up starts again.
.venv/installed: requirements.txt constraints.txt pyproject.toml
	@echo "== setting up .venv (once; a few minutes) =="
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@echo "== installing; pip's output is in .venv/pip.log =="
	@{ $(BIN)/python -m pip install --upgrade-strategy only-if-needed -r requirements.txt && \
	   $(BIN)/python -m pip install -c constraints.txt -e '.[reproduce,test]'; } > .venv/pip.log 2>&1 || \
	   { tail -n 20 .venv/pip.log; echo "error: the installation failed; the rest is in .venv/pip.log"; exit 1; }
	@touch $@

reproduce: .venv/installed
	@echo "== $(STUDY): running the missing steps =="
	@mkdir -p $(dir $(REPORT))
	$(BIN)/python workflow/check.py $(STUDY) $(if $(SEED),--seed $(SEED)) $(if $(ARM),--arm $(ARM))
	$(SNAKEMAKE) --cores $(CORES) $(if $(filter-out 0,$(GPUS)),--resources gpu=$(GPUS)) --rerun-incomplete --show-failed-logs --report-after-run --report $(REPORT)
	@echo "== done; the report: $$($(BIN)/python -c "$$WHERE") (Snakemake's own, with every job and its code: $(REPORT)) =="

# Finds models and texts, asks for everything that it cannot find, checks the study, and writes the file.
study: .venv/installed
	$(BIN)/python -m cpt_utils.base.study --init $(if $(filter demo/demo.yaml,$(STUDY)),study.yaml,$(STUDY))

# Checks the study's models and files; reports the parts that will be left out and a rough cost.
check: .venv/installed
	$(BIN)/python workflow/check.py $(STUDY) $(if $(SEED),--seed $(SEED)) $(if $(ARM),--arm $(ARM))

# A dry run only needs Snakemake: the one in .venv, any other, else one in a separate environment.
PLANNER := $(firstword $(wildcard $(BIN)/snakemake) $(shell command -v snakemake) build/plan/bin/snakemake)

plan: $(PLANNER)
	$(PLANNER) $(WORKFLOW) --dry-run $(if $(VERBOSE),,--quiet rules host)

build/plan/bin/snakemake:
	$(PYTHON) -m venv build/plan
	build/plan/bin/python -m pip install --quiet -c constraints.txt snakemake pydantic huggingface_hub

# Snakemake's lock remains after a power cut or kill -9.
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
	$(if $(filter-out full,$(BENCH)),$(error BENCH must be empty or full))$(BIN)/python benchmarks/bench.py $(if $(BENCH),--full)
	$(BIN)/python benchmarks/scaling.py

clean:
	rm -rf build results artifacts .snakemake .pytest_cache .ruff_cache
