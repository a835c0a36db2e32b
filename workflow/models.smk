# Models and texts that a study makes itself. Included by `Snakefile`, which defines all names not defined here.

if WORLD:

    rule world:
        input: WORLD["_path"], code=made_of("demo/world.py")
        output: f"{WORLD['out']}/world.json"
        log: LOGS / "world.log"
        shell: run("demo/world.py")


if DOCUMENTS:

    rule documents:
        input: DOCUMENTS["_path"], code=made_of("cpt/documents.py")
        output: f"{DOCUMENTS['output']}/documents.json"
        log: LOGS / "documents.log"
        shell: run("cpt/documents.py")


# `train: {task: continuations}`: the downstream task is made from the held-out text.
TASK_FILES = []
if STUDY.get("train.task") == "continuations":
    TASK_FILES = [f"{TASK['dir']}/{TASK['name']}.{end}" for end in ("jsonl", "yaml")]

    rule continuations:
        input: code=made_of("cpt/continuations.py")
        output: TASK_FILES
        log: LOGS / "continuations.log"
        shell: run("cpt/continuations.py")


def train(stage, folder, more=""):
    before = redo(f"{folder}/train.json", f"{folder}/.state/settings.json")
    return f"{before}{run('cpt/train.py', f'--stage {stage} {more} $redo')} && touch {{output:q}}"


# `update`: a killed training continues from its own folder, so Snakemake must not remove anything in it beforehand.
if BASE_TRAINING:

    rule train_base:
        input: TEXTS, BASE_TRAINING["_path"], code=made_of("cpt/train.py")
        output: update(f"{BASE}/train.json")
        log: LOGS / "train-base.log"
        threads: THREADS
        resources: gpu=1
        shell: train("base", BASE)


if CPT_TRAINING:

    rule train_cpt:
        input: BASE_FILES, TEXTS, CPT_TRAINING["_path"], code=made_of("cpt/train.py")
        output: update(f"{RUN}/train.json")
        log: LOGS / "train-cpt.log"
        threads: THREADS
        resources: gpu=1
        shell: train("cpt", RUN)

    if ARMS:
        ARM_RUN = STUDY.of_arm(ARMS[0]).get("run").replace(f"arms/{ARMS[0]}", "arms/{arm}")

        def layers_of(wildcards):
            """The files of the plain run that state which layers or neurons are frozen."""
            words = " ".join(map(str, STUDY.get("arms")[wildcards.arm].values()))
            files = {"hub": LAYERS, "interface": LAYERS, "change": ATTN_VS_FFN, "lsn": MASK, str(COGSYM): COGSYM}
            return list(dict.fromkeys(file for word, file in files.items() if word in words))

        # In parallel, one core each; the plain run uses more, which changes rounding at most (tests/test_cpt_train.py).
        rule train_arm:
            input: RUN_FILES, TEXTS, CPT_TRAINING["_path"], layers_of, code=made_of("cpt/train.py")
            output: update(f"{ARM_RUN}/train.json")
            log: LOGS / "train-arm" / "{arm}.log"
            resources: gpu=1
            shell: train("cpt", ARM_RUN, "--arm {wildcards.arm:q}").replace("{{arm}}", "{wildcards.arm}")

        rule arms:
            input:
                RUN_FILES, TASK_FILES, expand(f"{ARM_RUN}/train.json", arm=ARMS),
                [MASK, CONTROL, TOKEN_IDS] if LSN else [],
                code=made_of("cpt/compare_arms.py"),
            output: COMPARED_ARMS, figure(beside(COMPARED_ARMS, ".png"), "arms")
            log: LOGS / "arms.log"
            resources: gpu=1
            shell: run("cpt/compare_arms.py")
