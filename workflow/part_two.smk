# Part II of the workflow. Included by `Snakefile`, which defines all names not defined here.
#
# Language-specific neurons are identified on the study's text (data.lsn_text), else on mOSCAR from the hub. Without
# languages.lsn and a folder for token ids, Part II only has attention against the FFN.

# -------------------------------------------------------------------------------- 1. attention and FFN


rule attn_vs_ffn:
    input: BASE_FILES, RUN_FILES, code=made_of("weight-diff/attn_vs_ffn.py")
    output: ATTN_VS_FFN, figure(beside(ATTN_VS_FFN, ".png"), "attn_vs_ffn")
    log: LOGS / "attn-vs-ffn.log"
    threads: EACH
    shell: run("weight-diff/attn_vs_ffn.py")


if LSN:
    # ---------------------------------------------------------------------------- 2. neurons

    if not (ARM and all(path.is_file() for path in TOKEN_IDS)):  # made for the plain run, and shared with others

        rule token_ids:
            input: TEXTS, BASE_FILES, code=made_of("lsn/load_oscar.py")
            output: TOKEN_IDS
            log: LOGS / "token-ids.log"
            threads: THREADS
            shell: run("lsn/load_oscar.py", "--max-concurrent {threads}")

    rule activation_counts:
        input: TOKEN_IDS, RUN_FILES, code=made_of("lsn/activation.py")
        output: COUNTS
        log: LOGS / "activation-counts.log"
        threads: EACH
        resources: gpu=1
        shell: run("lsn/activation.py")

    rule identify:
        input: COUNTS, LAYERS, code=made_of("lsn/identify.py")
        output:
            MASK, CONTROL, RICH, REPORTED,
            figure(MASK.with_name(f"{STUDY.name}.report-counts.png"), "lsn_counts"),
            figure(MASK.with_name(f"{STUDY.name}.report-convergence.png"), "lsn_convergence"),
        log: LOGS / "identify.log"
        shell: run("lsn/identify.py")

    if PLAN.deactivation:

        rule deactivate:
            input: MASK, COUNTS, TOKEN_IDS, code=made_of("lsn/deactivate.py")
            output: DEACTIVATION, figure(beside(DEACTIVATION, ".png"), "deactivation")
            log: LOGS / "deactivate.log"
            threads: EACH
            resources: gpu=1
            priority: 1  # it takes long, and only the report waits for it: if it began last, it would run alone
            shell: run("lsn/deactivate.py")

    # ---------------------------------------------------------------------------- 3. over CPT

    rule lsn_activation:
        input: MASK, CONTROL, TOKEN_IDS, code=made_of("lsn/lsn_activation_cpt.py")
        output:
            # Folders, so Snakemake clears them if the mask or the run has changed.
            directory(ACTIVATION / STUDY.name),
            directory(ACTIVATION / "base"),
            figure(ACTIVATION / f"{STUDY.name}.png", "lsn_activation"),
        log: LOGS / "lsn-activation.log"
        threads: EACH
        resources: gpu=1
        shell: run("lsn/lsn_activation_cpt.py")

    rule gate_lsn:
        input: MASK, CONTROL, code=made_of("weight-diff/gate_lsn.py")
        output: GATE_LSN, figure(beside(GATE_LSN, ".png"), "gate_lsn")
        log: LOGS / "gate-lsn.log"
        threads: EACH
        shell: run("weight-diff/gate_lsn.py")

    rule activation_correlation:
        input:
            ACTIVATION / f"{STUDY.name}.png", GATE_LSN, ATTN_VS_FFN, LAYERS,
            code=made_of("activation-correlation/activation-correlation.py"),
        output: STRENGTH, figure(beside(STRENGTH, ".png"), "activation_correlation")
        log: LOGS / "activation-correlation.log"
        shell: run("activation-correlation/activation-correlation.py")

    # ---------------------------------------------------------------------------- 4. component swaps

    # Stamped here, not in the rules: by then, Snakemake may already have checked which files exist.
    SWAP_CODE = {name: made_of(f"component-swap/{name}.py") for name in ("attn_int_swap", "ffn_lsn_swap")}

    # Last checkpoint only, since a swapped run is as large on disk as the run; the script without --steps swaps all.
    rule component_swap:
        input: LAYERS, RICH, code=lambda wildcards: SWAP_CODE[wildcards.component]
        output: COMPONENTS / "{component}" / "metadata.json"
        log: LOGS / "{component}.log"
        shell: run("component-swap/{wildcards.component}.py", f"--steps {step_names.step_of(LAST)} --overwrite")

    rule component_swap_controls:
        input:
            COMPONENTS / "{component}" / "metadata.json", RICH, LAYERS,
            code=lambda wildcards: SWAP_CODE[wildcards.component],
        output:
            COMPONENTS / "{component}" / "controls.json",
            figure(COMPONENTS / "{component}" / "controls.png", "component_swap"),
        params: measures="retrieval nll" if PLAN.loss else "retrieval"
        log: LOGS / "{component}-controls.log"
        threads: EACH
        resources: gpu=1
        shell: run("component-swap/{wildcards.component}.py", f"--controls {CONTROLS} --measures {{params.measures}}")

    rule retrieval_components_figure:
        input: expand(RETRIEVAL / "{model}.json", model=COMPARED), code=made_of("sentence-retrieval/sr_experiment.py")
        output: figure(COMPONENT_FIGURE, "retrieval_components")
        params: models=list(COMPARED.values())
        log: LOGS / "retrieval" / "figure-components.log"
        resources: gpu=1
        shell: run("sentence-retrieval/sr_experiment.py", "--model_path {params.models:q} --no-untrained")
