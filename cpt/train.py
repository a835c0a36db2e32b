"""Train a causal LM from a configuration (base), or train an existing one further (continued pre-training).

In:  a training file (YAML): model or from, tokenizer, sources with shares of tokens, steps, learning rate, ...
     (every key: cpt/README.md).
Out: RUN/checkpoint-<step>/ at the steps of save_steps, or, without save_steps, the final model in RUN itself; each is a
     complete Hugging Face model folder. RUN/train.json (losses, tokens per source) is written last: its presence means
     that the run is finished. RUN/.state/ holds what a killed run needs to resume bit for bit; removed at the end.
freeze and train_only keep a part of the model unchanged, bit for bit. lora keeps all of it unchanged and trains
low-rank products next to its weights; a checkpoint is then an adapter or, with merge, a complete model again.

Full:  MULTI30K_DIR=path/to/captions python cpt/train.py --config studies/multi30k/base.yaml --seed 0
Tiny:  python cpt/train.py --config studies/multi30k/base.yaml --seed 0 --steps 20 --output-dir build/try
Arm:   python cpt/train.py --study demo/demo.yaml --stage cpt --arm hub_frozen
Part:  python cpt/train.py --study demo/demo.yaml --stage cpt --train-only outer:0.25 --output-dir build/try/outer
LoRA:  python cpt/train.py --study demo/demo.yaml --stage cpt --lora r=8,layers=outer:0.25 --output-dir build/try/lora
GPUs:  accelerate launch cpt/train.py --config my.yaml
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import re
import shutil
from pathlib import Path

from cpt_utils.base import cli, keys, results, study, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs, relatives, tokenizer_id
from cpt_utils.measures import layer_sets

runs = cli.sibling("cpt/runs.py")
initial = cli.sibling("cpt/initial.py")
packing = cli.sibling("cpt/packing.py")
freezing = cli.sibling("cpt/freezing.py")


# Keys that change how a run is carried out, not what it computes; a run may be resumed with other values of them.
FREE = ("output", "state_every")
# Keys of a training file that flags of the same name override.
GIVEN = ("steps", "save_steps", "learning_rate", "batch_size", "block_size", "state_every", *freezing.MODES, "io")


def read_config(path: Path, given: dict, seed: int | None) -> dict:
    """The training file with defaults, command-line values (those in `given` that are not None) and expanded strings.

    Raises:
        InputError: no such file, invalid YAML, an unknown key (naming the nearest), a missing or impossible value.
    """
    values = keys.read(path, "give --config the path of a YAML file", "see cpt/README.md")
    if given.get("steps") and given.get("save_steps") is None and values.get("save_steps"):
        # A short trial of a long run: drop the save_steps that it does not reach, and say so in one line.
        kept = [step for step in values["save_steps"] if step <= given["steps"]] or [given["steps"]]
        cli.say(f"--steps {given['steps']}: checkpoints at {', '.join(map(str, kept))}")
        values["save_steps"] = kept
    if freezing.mode_of(given):  # the part given on the command line replaces the file's
        replaced = (*freezing.MODES, "io") if given.get("lora") else freezing.MODES  # io does not go with LoRA
        values = {key: value for key, value in values.items() if key not in replaced}
    values |= {key: value for key, value in given.items() if value is not None}
    if seed is None:
        seed = 42 if values.get("seed") is None else values["seed"]
    values = runs.expand(values, seed, path) | {"seed": seed}
    checked = keys.check(cli.sibling("cpt/keys.py").Training, values, path)
    config = {**defaults(), **values, "save_steps": sorted(set(checked.save_steps or []))}
    numbers = ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")
    return config | {key: getattr(checked, key) for key in numbers}


def defaults() -> dict:
    """The optional keys of a training file with their defaults."""
    return cli.sibling("cpt/keys.py").Training.defaults()


def choice_of(config: dict, found: study.Study, path: Path):
    """The part of the model that is trained (`freezing.Choice`, `lora.Choice`); None: the whole model.

    Args:
        found: the study whose layers, mask and weight change the words in the training file refer to.
    """
    mode = freezing.mode_of(config)
    if mode is None:
        return None
    base = refs.model(config["from"])
    known = relatives.of([base], found.get("base"), found.plain.get("run")) if found else None
    try:
        return freezing.read(config, layer_sets.Place(base.config(), found.plain, known))
    except InputError as error:
        raise InputError(f"{path}: {mode} {error}") from None


def settings_of(config: dict, sources: list, choice) -> dict:
    """Everything that determines the numbers of a run, without file locations: equal settings mean the same run."""
    settings = {key: value for key, value in config.items() if key not in (*FREE, *freezing.MODES, "io")}
    settings |= choice.facts() if choice else {}
    settings["sources"] = [source.describe() for source in sources]
    if config["from"]:
        settings["from"] = _identity(config["from"])
    tokenizer = config["tokenizer"] or {}
    if tokenizer.get("from"):
        settings["tokenizer"] = {**tokenizer, "from": tokenizer_id.of(refs.model(tokenizer["from"]).side_files())}
    return json.loads(json.dumps(settings))


def _identity(spec: str) -> dict:
    """Identify a model by its weights (local) or its commit (hub), so a moved folder is still the same model."""
    facts = refs.model(spec).describe()
    if facts.get("weights_sample"):
        return {"weights_sample": facts["weights_sample"]}
    return {"spec": spec, "revision": facts["revision"]}


def check_space(run: Path, model, config: dict, part) -> None:
    """Refuse to start if the checkpoints and two states (float32 weights and two moments each) do not fit on disk."""
    size = sum(p.numel() for p in model.parameters())
    written, state, trained = (part.n_written, part.n_state, part.n_trained) if part else (size,) * 3
    width = {"float32": 4, "float64": 8}.get(config["dtype_on_disk"], 2)
    need = written * width * (len(config["save_steps"]) or 1) + 2 * 4 * (state + 2 * trained)
    free = shutil.disk_usage(run).free
    if free < need:
        raise InputError(f"{run}: the run needs about {need / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free")


def train(config: dict, path: Path, device: str, overwrite: bool, choice=None) -> None:
    """Train the run of `config` to its end, from the start or from its last state; `choice`: see `choice_of`."""
    run = Path(config["output"])
    sources = [packing.Source.parse(values, str(path)) for values in config["sources"]]
    for source in sources:
        source.check()
    settings = settings_of(config, sources, choice)

    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    processes = PartialState(cpu=device == "cpu")
    main_process = processes.is_main_process
    with runs.only_one(run) if main_process else contextlib.nullcontext():
        with processes.main_process_first():
            if main_process:
                unfinished = runs.claim(run, settings, {**defaults(), "seed": config["seed"]}, overwrite)
            else:
                unfinished = not (run / "train.json").is_file()
            if not unfinished:
                if main_process:
                    cli.say(f"{run} is finished ({config['steps']} steps): nothing to do; --overwrite trains it again")
                return
            try:
                model, part, files, blocks, tokens = prepare(config, sources, run, path, choice)
            except (InputError, OSError):
                if main_process:
                    runs.withdraw(run)
                raise
        try:
            trainer = cli.sibling("cpt/trainer.py").make(config, run, model, files, blocks, device, path, part)
            states = runs.states(run / ".state")
            if states:
                trainer.go_on_from(states[-1])
            if main_process:
                announce(config, trainer, tokens, len(trainer.losses))
            trainer.train(resume_from_checkpoint=str(states[-1]) if states else None)
        except InputError:
            if main_process:
                runs.withdraw(run)
            raise
        except Exception as error:
            compiling = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
            if not compiling or "No space left" in str(error):
                raise
            if main_process:
                runs.withdraw(run)
            what = f"{path}: torch_compile: the model cannot be compiled here ({runs.first_line(error)})"
            do = "resume on a machine where it can" if states else "leave it out"  # uncompiled, the run would differ
            raise InputError(f"{what}; {do}") from error
        if main_process:
            finish(run, config, settings, trainer, tokens)


def prepare(config: dict, sources: list, run: Path, path: Path, choice) -> tuple:
    """Model, its trained part, folder of tokenizer files, blocks, and tokens per source; checks what can be checked
    before training."""
    tokenizer, files = packing.prepare_tokenizer(
        config["tokenizer"] or {}, config["from"], sources, run / ".state", path
    )
    model = initial.prepare_model(config, tokenizer, path)
    part = choice.on(model, refs.model(config["from"])) if choice else None
    check_space(run, model, config, part)
    n_blocks = config["steps"] * config["batch_size"]
    blocks, tokens = packing.pack(sources, tokenizer, config["block_size"], n_blocks, config["seed"], run / ".state")
    return model, part, files, blocks, tokens


def announce(config: dict, trainer, tokens: dict, done: int) -> None:
    """Print what is about to be trained, and why derived values are what they are."""
    size = trainer.n_parameters
    text = f"{size / 1e9:.2f} B" if size >= 1e8 else f"{size / 1e6:.2f} M"
    arithmetic = "bfloat16 autocast" if trainer.args.bf16 else "float32"
    why = f" (precision: {config['precision']})"
    cli.say(
        f"{text} parameters; {config['steps']} steps of {config['batch_size']} x {config['block_size']} tokens on "
        f"{trainer.args.world_size} x {trainer.args.device.type}; {arithmetic}{why}"
    )
    if trainer.part:
        cli.say(trainer.part.summary())
    for name, facts in tokens.items():
        cli.say(
            f"  {name}: {facts['share']:.3f} of the tokens, {facts['tokens_used']:,} used, {facts['passes']} passes"
        )
        if facts.get("special_documents"):  # states written by earlier versions lack this key
            cli.say(
                f"  {name}: {facts['special_documents']:,} documents hold the text of a special token (such as </s>), "
                "tokenized as ordinary text"
            )
        textfiles.say_nulls(facts.get("null_texts", 0), f"source {name}")
    if done:
        cli.say(f"resuming from step {done}")


def finish(run: Path, config: dict, settings: dict, trainer, tokens: dict) -> None:
    """Write the record of the run and remove the files that only resuming needs."""
    seconds = trainer.seconds()
    # Kept out of the record, which is the same in every rerun.
    timing = {"seconds": round(seconds, 1), "seconds_per_step": trainer.seconds_per_step()}
    results.write_json(run / "timing.json", timing, results.header("cpt-training-time"))
    payload = {
        "steps": config["steps"],
        "checkpoints": config["save_steps"],
        "tokens": tokens,
        "losses": trainer.losses,
        "settings": settings,
    }
    facts = {"seed": config["seed"], "dtype": config["dtype_on_disk"], "device": trainer.args.device.type}
    facts |= {"cost": trainer.cost()} | ({"trained": trainer.part.facts()} if trainer.part else {})
    header = results.header(runs.SCHEMA, **facts)
    results.write_json(run / "train.json", payload, header)
    shutil.rmtree(run / ".state", ignore_errors=True)
    last = trainer.losses[-50:]
    mean = f"loss {sum(last) / len(last):.3f} (mean of the last {len(last)})"
    cli.say(f"{run}: {config['steps']} steps in {seconds:.0f} s, {mean}")
    if trainer.part:
        cli.say(trainer.part.summary())


def step_list(text: str) -> list[int]:
    """Parse `"30,100"`, for argparse."""
    return [int(part) for part in text.split(",") if part.strip()]


def key_values(text: str) -> dict:
    """`"r=8,layers=0,2"` as {"r": 8, "layers": "0,2"}, for argparse."""
    pieces = [piece.split("=", 1) for piece in re.split(r",(?=\w+=)", text)]
    if any(len(piece) < 2 for piece in pieces) or len({key for key, *_ in pieces}) < len(pieces):
        raise argparse.ArgumentTypeError(f"{text!r}: write each key once, with a value, like r=8,layers=outer:0.25")
    values = dict(pieces)
    for key, value in values.items():
        with contextlib.suppress(ValueError):
            values[key] = json.loads(value)
    return values


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("--config", metavar="FILE", help="training file (YAML); default: the study's train.<stage>")
    text = "take training file and folders from the study: those of its base or of its run"
    p.add_argument("--stage", choices=("base", "cpt"), help=text)
    text = "folder of the run; default: output of the training file"
    p.add_argument("--output-dir", "--output", metavar="RUN", help=text)
    p.add_argument("--from", dest="start", metavar="MODEL", help="model to train further; default: from of the file")
    text = "optimizer steps; later save_steps are dropped"
    p.add_argument("--steps", "--max-steps", type=cli.positive, metavar="N", help=text)
    p.add_argument("--save-steps", type=step_list, metavar="S,S,..", help="steps of the checkpoint folders")
    p.add_argument("--learning-rate", type=float, metavar="X", help="peak learning rate")
    p.add_argument("--batch-size", type=cli.positive, metavar="N", help="blocks per step, over all processes")
    p.add_argument("--block-size", type=cli.positive, metavar="N", help="tokens per block")
    text = "steps between states that a killed run resumes from; default 200"
    p.add_argument("--state-every", type=cli.positive, metavar="N", help=text)
    words = "hub, interface, outer:0.25, last:2, random:4:0, all/attention, lsn, .. (cpt/README.md)"
    p.add_argument("--freeze", metavar="PART", help=f"keep this part of the layers unchanged: {words}")
    p.add_argument("--train-only", metavar="PART", help="train only this part of the layers")
    text = "train LoRA products of rank r in these layers: r=8,layers=outer:0.25,targets=attention (cpt/README.md)"
    p.add_argument("--lora", type=key_values, metavar="KEY=X,..", help=text)
    text = "embeddings, final norm and head; default: trained with freeze, frozen with train_only"
    p.add_argument("--io", choices=("trained", "frozen"), help=text)
    text = "auto: a GPU if there is one; default auto"
    p.add_argument("--device", default="auto", choices=("auto", "cpu"), help=text)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    config_path, output, start = args.config, args.output_dir, args.start
    needed = args.stage or args.study or args.arm
    the_study = study.Study.find(args.study, args.seed, args.arm) if needed else study.Study()
    if args.arm:
        if args.stage != "cpt" or args.freeze or args.train_only or args.lora or args.io:
            raise InputError("--arm needs --stage cpt; leave out the flags of the trained part, which the arm sets")
        if args.arm not in the_study.get("arms", {}):
            how = "give --config and --output-dir instead (train.runs and runs of the study)"
            raise InputError(f"--arm {args.arm} is another run of the study, with its own training file: {how}")
        vars(args).update(the_study.get("arms")[args.arm])
    if args.stage:
        config_path = the_study.value(config_path, "--config", f"train.{args.stage}")
        output = the_study.value(output, "--output-dir", "base" if args.stage == "base" else "run")
        start = the_study.value(start, "--from", "base") if args.stage == "cpt" else start
        args.seed = args.seed if args.seed is not None else the_study.get("seed")
    if config_path is None:
        raise InputError("nothing says what to train: give --config FILE, or --stage base|cpt inside a study")
    path = Path(config_path)
    given = {"output": output, "from": start} | {key: getattr(args, key) for key in GIVEN}
    config = read_config(path, given, args.seed)
    if args.arm and args.save_steps is None:
        config["save_steps"] = [config["steps"]]  # arms are compared at their end
    try:
        train(config, path, args.device, args.overwrite, choice_of(config, the_study, path))
    except InputError:
        raise
    except Exception as error:
        # safetensors and torch report a full disk with their own exceptions.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise InputError("the disk is full; free some space and run the same command again") from error
        if isinstance(error, OSError):
            raise InputError(f"{error.filename or config['output']}: {error.strerror or error}") from error
        raise


if __name__ == "__main__":
    cli.run(main)
