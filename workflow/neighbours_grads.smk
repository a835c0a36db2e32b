# Measures of neighbouring work that need gradients or tables of the text (alignment/), which `Snakefile` includes.

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
