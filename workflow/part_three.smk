# Part III of the workflow: where a language is learnt. Included by `Snakefile`, which defines names not defined here.

# -------------------------------------------------------------------------------- 1. layer ablation


if PLAN.ablation:
    ABLATION = STUDY.result("layer_ablation")

    rule layer_ablation:
        input: BASE_FILES, RUN_FILES, TASK_FILES, code=made_of("layer-ablation/ablation_sweep.py")
        output: ABLATION, figure(beside(ABLATION, ".png"), "layer_ablation")
        log: LOGS / "layer-ablation.log"
        threads: EACH
        resources: gpu=1
        shell: run("layer-ablation/ablation_sweep.py")

# -------------------------------------------------------------------------------- 2. training a part of the stack

COGSYM, RUNS = STUDY.result("cogsym"), STUDY.result("runs")


rule cogsym:
    input: BASE_FILES, LAYERS, ATTN_VS_FFN, code=made_of("layer-ablation/cogsym.py")
    output: COGSYM, figure(beside(COGSYM, ".png"), "cogsym")
    log: LOGS / "cogsym.log"
    shell: run("layer-ablation/cogsym.py")


# The arms that train only a part of the model, or adapters; arms.json has these and all others.
if any({"train_only", "lora"} & {*what} for what in STUDY.get("arms", {}).values()) and ARMS:

    rule compare_runs:
        input:
            COMPARED_ARMS, RUN_FILES, expand(f"{ARM_RUN}/train.json", arm=ARMS),
            code=made_of("layer-ablation/compare_runs.py"),
        output: RUNS, figure(beside(RUNS, ".png"), "runs")
        log: LOGS / "compare-runs.log"
        shell: run("layer-ablation/compare_runs.py")
