# Training a part of the stack, of Part III of the workflow, which `Snakefile` includes: names that are not defined here are its own.

COGSYM, RUNS = STUDY.result("cogsym"), STUDY.result("runs")


rule cogsym:
    input: BASE_FILES, LAYERS, ATTN_VS_FFN, code=made_of("layer-ablation/cogsym.py")
    output: COGSYM, figure(beside(COGSYM, ".png"), "cogsym")
    log: LOGS / "cogsym.log"
    shell: run("layer-ablation/cogsym.py")


# Those that train a part alone, or adapters; all others are in arms.json, too.
if any({"train_only", "lora"} & {*what} for what in STUDY.get("arms", {}).values()) and ARMS:

    rule compare_runs:
        input:
            COMPARED_ARMS, RUN_FILES, expand(f"{ARM_RUN}/train.json", arm=ARMS),
            code=made_of("layer-ablation/compare_runs.py"),
        output: RUNS, figure(beside(RUNS, ".png"), "runs")
        log: LOGS / "compare-runs.log"
        shell: run("layer-ablation/compare_runs.py")
