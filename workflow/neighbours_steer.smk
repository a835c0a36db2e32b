# Steering, of Part V of the workflow, which `Snakefile` includes: names not defined here are its own.

if PLAN.steering:
    STEERING = STUDY.result("steering")

    rule steering:
        input: BASE_FILES, RUN_FILES, [MASK] if LSN else [], code=made_of("steering/steer.py")
        output: STEERING, figure(beside(STEERING, ".png"), "steering")
        log: LOGS / "steering.log"
        threads: EACH
        resources: gpu=1
        shell: run("steering/steer.py")
