"""What is measured on a model that was changed: retrieval, loss on held-out text, accuracy on a task with choices.

The scripts that change models (layer and component swaps, deactivation) measure each change with one `Test`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, languages, results, sources, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import transformers
from cpt_utils.measures import tasks
from cpt_utils.models import scoring


@dataclass(frozen=True)
class Measure:
    """A number measured on a model: what it is, whether more is better, and which per-unit values its mean is of."""

    label: str
    higher_is_better: bool
    kind: str
    units: bool = True


MEASURES = {
    "retrieval_mean": Measure("retrieval (published), mean over layers", True, "retrieval"),
    "retrieval_best": Measure("retrieval (published), best layer", True, "retrieval", units=False),
    "retrieval_readout": Measure("retrieval (unit, centred), last hidden state", True, "retrieval"),
    "nll_per_byte": Measure("NLL of held-out text (nats per byte)", False, "nll"),
    "task_accuracy": Measure("task accuracy", True, "task"),
}
# What decides whether a swap costs much. The mean over h_1 .. h_L and the best of them also say how deep its layers
# lie: a swap reaches no hidden state before its first layer.
DECIDING = ("retrieval_readout", "nll_per_byte", "task_accuracy")
KINDS = ("retrieval", "nll", "task")


def named(name: str) -> Measure:
    """The measure of a name; `nll_per_byte:LANG` is the loss in another language than the target."""
    name, _, lang = name.partition(":")
    measure = MEASURES[name]
    return replace(measure, label=f"{measure.label}, {lang}") if lang else measure


def record(units: dict[str, list[float]], name: str, **values: float) -> dict:
    """`units` of the model `name` by measure, and `values`: their means, and those that have no units.

    Raises:
        InputError: a value that is not finite.
    """
    values = {measure: math.fsum(own) / len(own) for measure, own in units.items()} | values
    for measure, value in values.items():
        if not math.isfinite(value):
            raise InputError(f"{name}: {measure} is not finite; try --dtype float32")
    return {"values": values, "units": units}


# --- what is measured ---


@dataclass(frozen=True)
class Test:
    """What is measured on every model: parallel sentences, held-out text, rows of a task with choices (any of them).

    `heldout` holds (context, text) pairs, of which the text is scored, `others` those of other languages; `facts` go
    into the header and identify the request. `retrieve` measures the sentences: that of
    sentence-retrieval/sr_experiment.py.
    """

    pairs: sources.ParallelText | None = None
    heldout: list[tuple[str, str]] | None = None
    task: list[tasks.Item] | None = None
    batch_size: int | None = None  # sequences; None: by tokens and memory
    seed: int = 42
    facts: dict = field(default_factory=dict)
    retrieve: Callable | None = None
    others: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def measures(self) -> list[str]:
        kinds = {"retrieval": self.pairs, "nll": self.heldout, "task": self.task}
        own = [name for name, measure in MEASURES.items() if kinds[measure.kind] is not None]
        return own + [f"nll_per_byte:{lang}" for lang in self.others]

    def on(
        self,
        model: transformers.PreTrainedModel,
        arch: archs.Arch,
        tokenizer: transformers.PreTrainedTokenizerBase,
        name: str,
    ) -> dict:
        """A `record`, with `layer_accuracy` and `reverse_accuracy` [L+1] of sentences."""
        units: dict = {}
        more = self._retrieval(model, arch, tokenizer, name, units) if self.pairs is not None else {}
        if self.heldout is not None:
            units["nll_per_byte"] = self._losses(model, tokenizer, self.heldout)
        if self.task is not None:
            units["task_accuracy"] = self._task(model, tokenizer)
        for lang, documents in self.others.items():
            units[f"nll_per_byte:{lang}"] = self._losses(model, tokenizer, documents)
        found = record(units, name, **({"retrieval_best": max(more["layer_accuracy"][1:])} if more else {}))
        return found | {"values": {measure: found["values"][measure] for measure in self.measures()}} | more

    def _retrieval(self, model, arch, tokenizer, name: str, units: dict) -> dict:
        """Base -> target retrieval at every hidden state; a sentence's unit is its share of hits over h_1 .. h_L.

        The readout, whatever layers were changed: the last hidden state, tokens alike in length, languages centred.
        """
        how = {"seed": self.seed, "batch_size": self.batch_size}
        measured = self.retrieve(model, arch, tokenizer, self.pairs, name, **how)
        accuracy = measured.hits.double().mean(1).tolist()
        units["retrieval_mean"] = measured.hits[1:].double().mean(0).tolist()
        units["retrieval_readout"] = measured.readout.double().tolist()
        reverse = measured.hits_reverse.double().mean(1).tolist()
        return {"layer_accuracy": accuracy, "reverse_accuracy": reverse}

    def _losses(self, model, tokenizer, documents: list[tuple[str, str]]) -> list[float]:
        """Of every document its NLL over the mean length in bytes: their mean is the NLL per byte of them all."""
        contexts, texts = zip(*documents, strict=True)
        scores = scoring.text_nlls(model, tokenizer, list(texts), self.batch_size, list(contexts))
        mean_bytes = sum(score.bytes for score in scores) / len(scores)
        return [score.nll / mean_bytes for score in scores]

    def _task(self, model, tokenizer) -> list[float]:
        """1 for every row whose right choice is the most likely one after the prompt, as lm_eval's `acc`; else 0."""
        prompts, choices = [item.prompt for item in self.task], [item.choices for item in self.task]
        logliks = scoring.choice_logliks(model, tokenizer, prompts, choices, self.batch_size)
        return [float(row.index(max(row)) == item.right) for row, item in zip(logliks, self.task, strict=True)]


def add_flags(p, kinds: tuple[str, ...] = KINDS) -> None:
    """The flags that say what is measured; `test_from_arguments` reads them, and leaves other `kinds` to the script."""
    g = p.add_argument_group("what is measured")
    text = f"{', '.join(kinds)}; default: all that have data"
    g.add_argument("--measures", nargs="+", choices=kinds, metavar="M", help=text)
    g.add_argument("--base-lang", metavar="LANG", help="default: the study's languages.base, else that of LAYERS.json")
    g.add_argument("--target-lang", metavar="LANG", help="the same for the language that CPT brought")
    g.add_argument("--heldout", metavar="FILE", help="text in the target language, a document a line; default: study's")
    g.add_argument(
        "--task", metavar="FILE", help="rows: SIB-200's test.tsv, or a .jsonl of cpt/continuations.py; default: study's"
    )


def languages_from_arguments(args, study, known: dict) -> dict[str, str]:
    """The codes of "base" and "target" from flags, study and a result's header (`known`); "" where nothing says it."""
    return {
        side: study.value(
            getattr(args, f"{side}_lang"), f"--{side}-lang", f"languages.{side}", known.get(f"{side}_lang", "")
        )
        for side in ("base", "target")
    }


def test_from_arguments(
    args, study, known: dict, retrieve: Callable, files: dict[str, str | None] | None = None
) -> Test:
    """What to measure, from flags, study and the languages `known` from a result's header; before any model is loaded.

    Args:
        retrieve: see `Test`.
        files: held-out text by language (data.heldout, or a part of it): beside the target's loss that in each of these
            languages, `nll_per_byte:LANG`, where there is a file.

    Raises:
        InputError: nothing to measure, or a measure asked for by name has no data.
    """
    wanted = args.measures or KINDS
    base, target = languages_from_arguments(args, study, known).values()
    pairs = heldout = task = None
    others: dict = {}
    facts: dict = {"limit": None, "seed": study.seed}
    if "retrieval" in wanted:
        if not (base and target):
            raise InputError("nothing says which languages: give --base-lang and --target-lang, or a study file")
        pairs = sources.from_arguments(args, study, base, target)
        cli.say(pairs.summary())
        facts |= {"base_lang": languages.canonical(base, any_tag=True), "data": pairs.describe()}
        facts["target_lang"] = languages.canonical(target, any_tag=True)
        facts |= {"n_used": len(pairs), "n_available": pairs.n_available, "limit": pairs.facts["limit"]}
    if "nll" in wanted:
        heldout, others = _heldout(args, study, target, files or {}, facts)
    if "task" in wanted:
        found = tasks.from_file(Path(args.task)) if args.task else tasks.of_study(study)
        if found is None and args.measures:
            raise InputError(
                "--measures task: no rows; give --task FILE, or data.task in the study, of SIB-200 or of a local file"
            )
        if found is not None:
            rows = None if args.task else study.get("data.task.rows")
            task = limited(found.items[:rows], args.limit, facts)
            facts["task"] = found.facts | {"rows": len(task)}
    return Test(pairs, heldout, task, args.batch_size, study.seed, facts, retrieve, others)


def _heldout(args, study, target: str, files: dict, facts: dict) -> tuple[list | None, dict[str, list]]:
    """The held-out documents of the target language, and those of `files` by language; `facts` get what they are."""
    mapping, together = study.get("data.heldout") or {}, int(study.get("data.heldout_lines") or 1)
    key = languages.find(mapping, target, default=None) if target else None
    file, heldout = args.heldout or (mapping[key] if key else None), None
    if file is None and args.measures:
        raise InputError("--measures nll: no held-out text; give --heldout FILE, or data.heldout in the study")
    if file is not None:
        heldout = limited(documents(Path(file), together), args.limit, facts)
        facts["heldout"] = {
            "file": file, "sha256": results.file_sha256(file), "documents": len(heldout), "lines": together,
        }  # fmt: skip
    rest = [lang for lang in files if files[lang] and lang != key]
    others, told = heldout_by_language(files, rest, together, None)
    for lang in others:
        others[lang] = limited(others[lang], args.limit, facts)
        told[lang]["documents"] = len(others[lang])
    facts |= {"heldout_others": told} if others else {}
    return heldout, others


def limited(found: list, limit: int | None, facts: dict) -> list:
    """The first `limit` of what was found; `facts` say the limit only where it leaves something out."""
    if limit is not None and limit < len(found):
        facts["limit"] = limit
    return found[:limit]


def documents(file: Path, together: int) -> list[tuple[str, str]]:
    """Held-out documents as (context, text), from the lines of a file (.gz allowed) that are not empty.

    With `together` 1 every line is a text without context. With more, so many lines make a document, and its first line
    is context that is not scored: finding out which language a text is in is no part of knowing that language.
    """
    found = [text for line in textfiles.texts(file) if (text := line.strip())]
    if not found:
        raise InputError(f"{file} holds no text")
    groups = [found[i : i + together] for i in range(0, len(found) - together + 1, together)]
    if not groups:
        raise InputError(f"{file} has {len(found)} lines, fewer than data.heldout_lines ({together})")
    if len(groups) == 1:
        cli.warn(f"{file} is one document, of which intervals have no width and say nothing; give more, a line each")
    return [("", group[0]) if together == 1 else (group[0], " ".join(group[1:])) for group in groups]


def heldout_by_language(
    files: dict[str, str | None], chosen: list[str], together: int, limit: int | None
) -> tuple[dict[str, list[tuple[str, str]]], dict[str, dict]]:
    """The `documents` of every language `chosen`, and what a header says of their files.

    Raises:
        InputError: a language that `files` have not, in any spelling, or a file that is not there.
    """
    texts, facts = {}, {}
    for lang in chosen:
        key = languages.find(files, lang, default=None)
        if key is None or files[key] is None:
            raise InputError(f"no held-out text of {lang}: give --heldout {lang}=FILE, or data.heldout in the study")
        path = Path(files[key])
        if not path.is_file():
            raise InputError(f"{path} does not exist: the held-out text of {lang}")
        texts[lang] = documents(path, together)[:limit]
        facts[lang] = {"file": str(path), "sha256": results.file_sha256(path), "documents": len(texts[lang])}
    return texts, facts
