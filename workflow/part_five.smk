# Measures from neighbouring work. Included by `Snakefile`, which defines all names not defined here.

# Language neurons by methods other than LAPE, if the study has lsn.methods: their masks, the same causal test for each,
# and a comparison of all.
METHODS = (STUDY.get("lsn.methods") or []) if LSN and PLAN.deactivation else []

if METHODS:
    METHOD_MASK = MASK.with_name(f"{STUDY.name}.{{method}}.json")
    SILENCED = DEACTIVATION.with_suffix(".{method}.json")
    OF_TEXTS = {"ap": "means", "gradient": "gradients"}  # method -> what lsn/text_scores.py measures for it
    WHAT = [OF_TEXTS[method] for method in METHODS if method in OF_TEXTS]
    SCORES = [STUDY.result("lsn_text_scores") / what / f"{STUDY.name}.{lang}.pt" for what in WHAT for lang in LSN]

    if WHAT:

        rule text_scores:
            input: TOKEN_IDS, RUN_FILES, code=made_of("lsn/text_scores.py")
            output: SCORES
            log: LOGS / "text-scores.log"
            threads: EACH
            resources: gpu=1
            shell: run("lsn/text_scores.py", f"--what {' '.join(WHAT)}")

    rule identify_method:
        input:
            COUNTS, lambda wildcards: SCORES if wildcards.method in OF_TEXTS else [], code=made_of("lsn/identify.py"),
        output: METHOD_MASK, beside(METHOD_MASK, ".report.json")
        log: LOGS / "identify" / "{method}.log"
        wildcard_constraints: method="ternary|ap|gradient"
        shell: run("lsn/identify.py", "--method {wildcards.method}")

    rule deactivate_method:
        input: METHOD_MASK, COUNTS, TOKEN_IDS, code=made_of("lsn/deactivate.py")
        output: SILENCED
        log: LOGS / "deactivate" / "{method}.log"
        wildcard_constraints: method="ternary|ap|gradient"
        threads: EACH
        resources: gpu=1
        priority: 1
        shell: run("lsn/deactivate.py", "--method {wildcards.method}")

    # Ternary classes of the base's neurons, to compare with those after continued pre-training.
    BASE_TAG = f"{STUDY.name}.{model_id(BASE)}"
    OF_BASE = [MASK.with_name(f"{BASE_TAG}.ternary.json")] if "ternary" in METHODS else []

    if OF_BASE:

        rule base_counts:
            input: TOKEN_IDS, BASE_FILES, code=made_of("lsn/activation.py")
            output: [STUDY.result("lsn_counts") / f"{BASE_TAG}.{lang}.pt" for lang in LSN]
            log: LOGS / "base-counts.log"
            threads: EACH
            resources: gpu=1
            shell: run("lsn/activation.py", f"--model {literal(BASE)}")

        rule identify_base:
            input: rules.base_counts.output, RUN_FILES, code=made_of("lsn/identify.py")
            output: OF_BASE, beside(OF_BASE[0], ".report.json")
            log: LOGS / "identify" / "base.log"
            shell: run("lsn/identify.py", f"--method ternary --tag {literal(BASE_TAG)}")

    METHODS_COMPARED = STUDY.result("lsn_methods")

    rule compare_methods:
        input:
            MASK, REPORTED, DEACTIVATION, expand([METHOD_MASK, SILENCED], method=METHODS), OF_BASE,
            code=made_of("lsn/compare_methods.py"),
        output:
            METHODS_COMPARED, beside(METHODS_COMPARED, ".md"),
            figure(beside(METHODS_COMPARED, ".png"), "lsn_methods"),
        log: LOGS / "compare-methods.log"
        shell: run("lsn/compare_methods.py")


if PLAN.alignment:

    rule gradients:
        input: BASE_FILES, RUN_FILES, code=made_of("alignment/gradients.py")
        output: STUDY.result("gradients"), figure(beside(STUDY.result("gradients"), ".png"), "gradients")
        log: LOGS / "gradients.log"
        threads: EACH
        resources: gpu=1
        shell: run("alignment/gradients.py")


if PLAN.bigram:

    rule bigram:
        input: BASE_FILES, RUN_FILES, code=made_of("alignment/bigram.py")
        output: STUDY.result("bigram"), figure(beside(STUDY.result("bigram"), ".png"), "bigram")
        log: LOGS / "bigram.log"
        threads: EACH
        resources: gpu=1
        shell: run("alignment/bigram.py")


if PLAN.steering:
    STEERING = STUDY.result("steering")

    rule steering:
        input: BASE_FILES, RUN_FILES, [MASK] if LSN else [], code=made_of("steering/steer.py")
        output: STEERING, figure(beside(STEERING, ".png"), "steering")
        log: LOGS / "steering.log"
        threads: EACH
        resources: gpu=1
        shell: run("steering/steer.py")


if PLAN.routing:
    ROUTING, ROUTERS = STUDY.result("routing"), STUDY.result("router_steering")

    rule routing:
        input: BASE_FILES, RUN_FILES, code=made_of("moe-routing/routing.py")
        output: ROUTING, beside(ROUTING, ".pt"), figure(beside(ROUTING, ".png"), "routing")
        log: LOGS / "routing.log"
        threads: EACH
        resources: gpu=1
        shell: run("moe-routing/routing.py")

    rule router_steering:
        input: ROUTING, code=made_of("moe-routing/steering.py")
        output: ROUTERS, figure(beside(ROUTERS, ".png"), "router_steering")
        log: LOGS / "router-steering.log"
        threads: EACH
        resources: gpu=1
        shell: run("moe-routing/steering.py")
