# Part IV of the workflow, the update itself, which `Snakefile` includes: names not defined here are its own.

# Other runs of the base, which the study names, as far as they are trained here.
OTHER_RUNS = STUDY.get("runs", {})
OTHER_TRAINED = {OTHER_RUNS[name]: training(f"runs.{name}")["_path"] for name in STUDY.get("train.runs", {})}
OTHER_FILES = [f"{place}/train.json" for place in OTHER_TRAINED]
TRAIN_OTHER = train("cpt", "PLACE", "--config {params.config:q} --output-dir PLACE").replace("PLACE", "{params.place:q}")

for place, of_run in OTHER_TRAINED.items():

    rule:
        name: f"train_{Path(place).name}"
        input: BASE_FILES, TEXTS, of_run, code=made_of("cpt/train.py")
        output: update(f"{place}/train.json")
        params: config=of_run, place=place
        log: LOGS / f"train-{Path(place).name}.log"
        resources: gpu=1
        shell: TRAIN_OTHER
