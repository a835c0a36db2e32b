# Part IV of the workflow: the update itself. Included by `Snakefile`, which defines all names not defined here.

# Other runs of the base that the study names, and the training files of those that are trained here.
OTHER_RUNS, OTHER_TRAINED = STUDY.get("runs", {}), {} if ARM else STUDY.get("train.runs", {})
try:
    for name in OTHER_RUNS.keys() - OTHER_TRAINED.keys():
        refs.run(OTHER_RUNS[name])[-1].config()  # a missing run is reported here
except InputError as error:
    raise WorkflowError(str(error)) from None
OTHER_FILES = [f"{OTHER_RUNS[name]}/train.json" for name in OTHER_TRAINED]
TRAIN_OTHER = train("cpt", "PLACE", "--config {params.config:q} --output-dir PLACE").replace("PLACE", "{params.place:q}")

for name, of_run in OTHER_TRAINED.items():

    rule:
        name: f"train_run_{name}"
        input: BASE_FILES, TEXTS, of_run, code=made_of("cpt/train.py")
        output: update(f"{OTHER_RUNS[name]}/train.json")
        params: config=of_run, place=OTHER_RUNS[name]
        log: LOGS / f"train-run-{name}.log"
        threads: EACH
        resources: gpu=1
        shell: TRAIN_OTHER


# -------------------------------------------------------------------------------- 1. spectra, 2. heads

if PLAN.spectral:
    SPECTRUM, HEADS, REWIND, TRUNCATE, CONNECT = (
        STUDY.result(step) for step in ("spectrum", "heads", "rewind", "truncate", "connect")
    )

    rule spectrum:
        input: BASE_FILES, RUN_FILES, code=made_of("spectral/spectrum.py")
        output: SPECTRUM, figure(beside(SPECTRUM, ".png"), "spectrum")
        log: LOGS / "spectrum.log"
        threads: EACH
        resources: gpu=1
        shell: run("spectral/spectrum.py")

    rule heads:
        input: BASE_FILES, RUN_FILES, OTHER_FILES, code=made_of("spectral/heads.py")
        output: HEADS, figure(beside(HEADS, ".png"), "heads")
        log: LOGS / "heads.log"
        shell: run("spectral/heads.py")

# -------------------------------------------------------------------------------- 3. rewinding, truncating, connecting

    rule rewind:
        input: BASE_FILES, RUN_FILES, OTHER_FILES, TASK_FILES, code=made_of("spectral/rewind.py")
        output:
            REWIND, figure(beside(REWIND, ".png"), "rewind"), figure(beside(REWIND, ".energy.png"), "rewind_energy"),
        log: LOGS / "rewind.log"
        threads: EACH
        resources: gpu=1
        shell: run("spectral/rewind.py")

    rule truncate:
        input: BASE_FILES, RUN_FILES, TASK_FILES, code=made_of("spectral/truncate.py")
        output: TRUNCATE, figure(beside(TRUNCATE, ".png"), "truncate")
        log: LOGS / "truncate.log"
        threads: EACH
        resources: gpu=1
        shell: run("spectral/truncate.py")

    if OTHER_RUNS:

        rule connect:
            input: BASE_FILES, RUN_FILES, OTHER_FILES, TASK_FILES, code=made_of("spectral/connect.py")
            output: CONNECT, figure(beside(CONNECT, ".png"), "connect")
            log: LOGS / "connect.log"
            threads: EACH
            resources: gpu=1
            shell: run("spectral/connect.py")
