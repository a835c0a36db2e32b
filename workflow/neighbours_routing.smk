# Part V of the workflow, mixture-of-experts routing, which `Snakefile` includes: names not defined here are its own.

if PLAN.routing:
    ROUTING, STEERING = STUDY.result("routing"), STUDY.result("router_steering")

    rule routing:
        input: BASE_FILES, RUN_FILES, code=made_of("moe-routing/routing.py")
        output: ROUTING, beside(ROUTING, ".pt"), figure(beside(ROUTING, ".png"), "routing")
        log: LOGS / "routing.log"
        threads: EACH
        resources: gpu=1
        shell: run("moe-routing/routing.py")

    rule router_steering:
        input: ROUTING, code=made_of("moe-routing/steering.py")
        output: STEERING, figure(beside(STEERING, ".png"), "router_steering")
        log: LOGS / "router-steering.log"
        threads: EACH
        resources: gpu=1
        shell: run("moe-routing/steering.py")
