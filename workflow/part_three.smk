# Part III of the workflow, where a language is learnt, which `Snakefile` includes: names not defined here are its own.

# -------------------------------------------------------------------------------- 1. layer ablation


if PLAN.ablation:
    ABLATION = STUDY.result("layer_ablation")

    rule layer_ablation:
        input: BASE_FILES, RUN_FILES, TASK_FILES, code=made_of("layer-ablation/ablation_sweep.py")
        output: ABLATION, figure(beside(ABLATION, ".png"), "layer_ablation")
        log: LOGS / "layer-ablation.log"
        threads: THREADS
        resources: gpu=1
        shell: run("layer-ablation/ablation_sweep.py")
