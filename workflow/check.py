"""Checks a study before hours are spent on it: models, files, which parts will be left out and why, and a rough cost.

Everything that the study names is opened the way the scripts will open it; nothing is computed or written. `make
reproduce` runs this check first.

In:   a study file (default: ./study.yaml).
Out:  a report on the screen. Exit code 2 if anything that the study names is missing or does not fit.

    python workflow/check.py basque.yaml
    python workflow/check.py studies/multi30k.yaml --seed 0
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, languages, sources, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import folders, identity, opening, refs, tokenizer_id

planning = cli.sibling("workflow/plan.py")
_time = cli.sibling("workflow/progress.py").words

BYTES_PER_TOKEN = 3.5
START = 4  # seconds of a step before its first forward pass, on the demo
PACKED = 3  # bytes of text per byte of a compressed file


# ---------------------------------------------------------------- the report


class Report:
    """The findings, printed one by one; `problems` are those that stop the study."""

    def __init__(self):
        self.problems: list[str] = []

    def head(self, text: str) -> None:
        cli.say(f"\n{text}")

    def say(self, text: str) -> None:
        cli.say(f"  {text}")

    def tried(self, look: Callable, *args):
        """`look(*args)`; if it raises an InputError, that is recorded as a problem and None returned."""
        try:
            return look(*args)
        except InputError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
                self.say(f"PROBLEM: {error}")
            return None


@dataclass(frozen=True)
class Model:
    """A model that was checked: number of `parameters` and `size` in bytes, as stored; `here`: no file is missing."""

    ref: refs.ModelRef
    config: dict
    parameters: int
    size: int
    here: bool

    @property
    def shape(self) -> tuple[str, int]:
        arch = archs.for_config(self.config)
        return arch.model_type, arch.n_layers(self.config)

    @property
    def heads(self) -> int:
        """The number of heads, over all layers, that can be rewound one by one (KV heads with their queries)."""
        arch = archs.for_config(self.config)
        return sum(arch.head_counts(self.config, layer)[1] for layer in range(arch.n_layers(self.config)))


def look_at(ref: refs.ModelRef, base: refs.ModelRef | None = None) -> Model:
    """Read configuration, type and the headers of the weights; no weights of a hub model are fetched.

    Raises:
        InputError: anything that the scripts would refuse.
    """
    config = ref.config()
    archs.for_config(config)
    with opening.open_folder(ref, base, lazy=True) as stored:
        shapes = {name: stored.shape(name) for name in stored.names()}
        size = sum(math.prod(shape) * stored.dtype(name).itemsize for name, shape in shapes.items())
        here = ref.is_local or all((Path(stored.path) / file).is_file() for file in stored.files)
    return Model(ref, config, sum(map(math.prod, shapes.values())), size, here)


def models(study: Study, report: Report) -> list[Model]:
    """The base, then the checkpoints, as far as they exist; [] if the workflow trains them first."""
    report.head("models")
    base = report.tried(refs.model, study.get("base") or "") if _is_there(study, "base", report) else None
    first = report.tried(look_at, base) if base else None
    if first:
        report.say(f"base {base.spec}: {described(first)}")
    if first and study.get("routing") is not None:
        report.tried(cli.sibling("moe-routing/routing.py").layers_of, {"base": base})
    if first and "gradient" in (study.get("lsn.methods") or []):
        report.tried(cli.sibling("lsn/text_scores.py").dense_layers, archs.for_config(first.config), first.config)
    run = report.tried(refs.run, study.get("run") or "") if _is_there(study, "run", report) else None
    checkpoints = [model for ref in run or [] if (model := report.tried(look_at, ref, base))]
    if checkpoints:
        report.say(f"run {study.get('run')}: checkpoints of step {_steps([model.ref for model in checkpoints])}")
        if len(checkpoints) < 4:
            report.say(f"with {len(checkpoints)}, a correlation (C4, C6) has no interval; with four or more it has one")
    reference = first or next(iter(checkpoints), None)
    run_paths = study.get("runs") or {}
    trained = {name for name in study.get("train.runs") or {} if not (Path(run_paths[name]) / "train.json").is_file()}
    others = {name: report.tried(refs.run, run_paths[name]) for name in run_paths if name not in trained}
    for name, other_run in others.items():
        if other_run:
            report.say(f"runs.{name} {run_paths[name]}: checkpoints of step {_steps(other_run)}")
    for model in [*checkpoints, *(report.tried(look_at, other[-1], base) for other in others.values() if other)]:
        if model:
            report.tried(check_pair, reference or model, model)
    if first and checkpoints:
        tokenizers(study, [first, *checkpoints], report)
    return [model for model in [first, *checkpoints] if model]


def _steps(run: list[refs.ModelRef]) -> str:
    steps = [str(ref.step) for ref in run]
    return f"{', '.join(steps if len(steps) < 9 else [*steps[:4], '..', *steps[-3:]])} ({len(steps)})"


def check_pair(base: Model, other: Model) -> None:
    """Raise an InputError if the scripts cannot compare the two models. One of them may have a vision tower beside the
    same language model."""
    kinds, layers = zip(base.shape, other.shape, strict=True)
    if archs.text_type(base.config) != archs.text_type(other.config):
        raise InputError(f"{base.ref.spec} is a {kinds[0]}, {other.ref.spec} a {kinds[1]}: they are not a pair")
    if layers[0] != layers[1]:
        raise InputError(f"{base.ref.spec} has {layers[0]} layers, {other.ref.spec} {layers[1]}: they are not a pair")


def _is_there(study: Study, key: str, report: Report) -> bool:
    """Whether there is a model to check; reports if the study trains it first, and a problem if the key is missing."""
    spec, trained = study.get(key), study.get("train.base" if key == "base" else "train.cpt")
    if spec is None:
        report.tried(study.value, None, f"the key {key}", key)
        return False
    if trained and not (isinstance(spec, str) and (Path(spec) / "train.json").is_file()):
        report.say(f"{key} {spec}: trained first, by {trained}")
        return False
    return True


def described(model: Model) -> str:
    """Type, layers, size and vocabulary in words."""
    kind, layers = model.shape
    rows = identity.vocabulary_size(model.config)
    return (
        f"{kind}, {layers} layers, {model.parameters / 1e6:,.1f} M parameters, {model.size / 1e9:.2f} GB, "
        f"{rows:,} tokens{'' if model.here else ', to be downloaded'}"
    )


def tokenizers(study: Study, found: list[Model], report: Report) -> None:
    """Report whether base and checkpoints have the same tokenizer, and the consequences if not."""
    run, base = study.get("run"), found[0].ref
    kinds: dict[str, list[str]] = {}
    for model in found:
        kind = report.tried(tokenizer_id.tokenizer_used, model.ref, run, base)
        if kind:
            kinds.setdefault(kind, []).append("base" if model is found[0] else str(model.ref.step))
    if len(kinds) == 1:
        report.say("tokenizers: all alike")
    elif kinds:
        groups = "; ".join(", ".join(models) for models in kinds.values())
        report.say(
            f"tokenizers: {len(kinds)} kinds ({groups}): retrieval, loss and task use each model's own; token ids of "
            "Part II are made with the base's, and refused for models whose tokenizer gives plain text other ids"
        )


def files(study: Study, chosen: planning.Plan, report: Report) -> dict[str, float]:
    """Open the texts the way the scripts do, and return the rough number of tokens of each kind."""
    report.head("data")
    sizes = {"pairs": 0.0, "n_pairs": 0.0, "heldout": 0.0, "target": 0.0, "neurons": 0.0}
    pairs = report.tried(_pairs, study)
    if pairs:
        report.say(pairs.summary())
        sizes["n_pairs"] = len(pairs)
        sizes["pairs"] = sum(len(text.encode()) for text in (*pairs.base, *pairs.target)) / BYTES_PER_TOKEN
    elif pairs is not None:
        report.say("parallel sentences: made first")
    for kind, texts in (
        ("held-out text", study.get("data.heldout", {})),
        ("text for neurons", _lsn_texts(study, chosen)),
    ):
        for code, file in texts.items():
            note = report.tried(_text, study, file)
            report.say(f"{kind}, {code}: {file or 'mOSCAR, from the hub'}{note or ''}")
            if kind == "text for neurons":
                sizes["neurons"] += _at_most(study, file)
            elif Path(str(file)).is_file():
                tokens = sum(len(line.encode()) for line in textfiles.texts(Path(file))) / BYTES_PER_TOKEN
                sizes["heldout"] += tokens
                sizes["target"] += tokens * languages.same(code, str(study.get("languages.target")))
    task = study.get("data.task")
    if task:
        folder = task.get("dir")
        where = f"in {folder}{report.tried(_text, study, folder) or ''}" if folder else "from the hub"
        report.say(f"task {task.get('name')}, {where}")
    return sizes


def _pairs(study: Study) -> sources.ParallelText | bool:
    """The parallel sentences; False if the workflow makes them first."""
    keys = ("source", "data_dir", "base_file", "target_file", "split", "drop_empty", "limit")
    sides = [study.value(None, f"--{side}", f"languages.{side}") for side in ("base", "target")]
    try:
        return sources.from_arguments(argparse.Namespace(**dict.fromkeys(keys)), study, *sides)
    except InputError:
        if _made_first(study):
            return False
        raise


def _lsn_texts(study: Study, chosen: planning.Plan) -> dict[str, str | None]:
    texts = study.get("data.lsn_text", {})
    named = {code: languages.find(texts, code, default=None) for code in chosen.lsn}
    return {code: texts[name] if name else None for code, name in named.items()}


def _at_most(study: Study, file: str | None) -> float:
    """Tokens per language on which neurons are counted: as the study asks, or fewer if a local text is shorter."""
    requested = int(study.get("lsn.tokens") or 99_999_744)
    if not Path(str(file)).is_file():
        return requested
    packed = PACKED if str(file).endswith((".gz", ".parquet")) else 1  # not unpacked: it may have gigabytes
    return min(requested, packed * Path(file).stat().st_size / BYTES_PER_TOKEN)


def _text(study: Study, file: str | None) -> str:
    """Check a file or folder; returns a note for the report, empty if it exists.

    Raises:
        InputError: it does not exist and the workflow does not make it, or it is a file without text.
    """
    if file is None or Path(file).exists():
        if file is not None and Path(file).is_file():
            textfiles.check(Path(file))
        return ""
    if _made_first(study):
        return " (made first)"
    raise InputError(f"{file} does not exist; correct the study file, or make it first")


def _made_first(study: Study) -> bool:
    """Whether the workflow makes texts itself, which may not exist yet."""
    return any(study.get(f"train.{key}") for key in ("world", "documents", "task"))


# ---------------------------------------------------------------- cost


def cost(study: Study, chosen: planning.Plan, found: list[Model], sizes: dict[str, float], report: Report) -> None:
    """Report time and disk space, accurate to a factor of about three."""
    report.head("cost, roughly")
    if not found:
        report.say("not known before the models are trained")
        return
    per_token = 2 * found[0].parameters  # floating-point operations, without attention between tokens
    speed, where = planning.machine()
    planned = planning.passes(study, chosen, len(found) - 1, sizes, found[0].shape[1], found[0].heads)
    parts = sorted(((per_token * tokens / speed, name) for name, tokens in planned))
    total = sum(seconds for seconds, _ in parts)
    largest = "; ".join(f"{name}: {_time(seconds)}" for seconds, name in parts[:-4:-1])
    report.say(f"forward passes: {_time(total)} on {where} (most of it {largest})")
    # One retrieval step per model, plus the scripts of each part, as in the Snakefile.
    steps = len(found) + 14 + 3 * chosen.task + 2 * chosen.losses + 12 * bool(chosen.lsn) + chosen.deactivation
    steps += chosen.ablation + 5 * chosen.spectral + chosen.alignment + chosen.bigram + 2 * chosen.routing
    steps += chosen.steering + 2 * len(study.get("lsn.methods") or [])
    report.say(f"plus the start of about {steps} steps: {_time(START * steps)}, longer if models load slowly")
    fetched = sum(model.size for model in found if not model.here)
    written = (4 if chosen.lsn else 2) * found[-1].size + 4 * sizes["neurons"]
    out = study.result("claims").parent
    free = folders.free_bytes(next(path for path in (out, *out.parents) if path.is_dir()))
    report.say(
        f"disk: {written / 1e9:.1f} GB to be written (swapped models, token ids), {free / 1e9:.0f} GB free"
        + (f"; {fetched / 1e9:.1f} GB to be downloaded from the hub" if fetched else "")
    )
    report.tried(folders.refuse_full_disk, out, int(written))


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("file", nargs="?", metavar="STUDY", help="study file; the same as --study")
    return p


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    study = Study.find(args.file or args.study, args.seed, args.arm)
    if not study:
        raise InputError("no study file: give its path, or run in the folder of a study.yaml")
    return examine(study)


def examine(study: Study) -> int:
    """Check everything that the study names, and report the findings.

    Raises:
        InputError: anything is missing or does not fit.
    """
    cli.say(f"study {study.name} ({study.path}), results in {study.result('claims').parent.parent}")
    report = Report()
    chosen = report.tried(planning.plan, study)
    found = models(study, report)
    if chosen:
        sizes = files(study, chosen, report)
        cost(study, chosen, found, sizes, report)
        report.head("left out" if chosen.left_out else "nothing is left out")
        for text in chosen.left_out:
            report.say(text)
    if report.problems:
        count = len(report.problems)
        problems = f"{count} problems, listed above" if count > 1 else report.problems[0]
        raise InputError(f"{study.path} cannot run yet: {problems}")
    cli.say("\nready to run")
    return 0


if __name__ == "__main__":
    cli.run(main)
