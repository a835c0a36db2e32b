"""What is measured on a changed model: retrieval, loss on held-out text, accuracy on a multiple-choice task.

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
    """A number measured on a model; `units` says whether it is the mean of values per unit."""

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
# The measures that decide whether a swap costs much. The mean over h_1 .. h_L and the best of them also depend on the
# depth of the swapped layers: a swap reaches no hidden state before its first layer.
DECIDING = ("retrieval_readout", "nll_per_byte", "task_accuracy")
KINDS = ("retrieval", "nll", "task")


def named(name: str) -> Measure:
    """The measure with a name; `nll_per_byte:LANG` is the loss in a language other than the target."""
    name, _, language = name.partition(":")
    measure = MEASURES[name]
    return replace(measure, label=f"{measure.label}, {language}") if language else measure


def record(units: dict[str, list[float]], name: str, **values: float) -> dict:
    """A record of the model `name`: `units` by measure, and `values`: their means, and measures without units.

    Raises:
        InputError: a value that is not finite.
    """
    values = {measure: math.fsum(numbers) / len(numbers) for measure, numbers in units.items()} | values
    for measure, value in values.items():
        if not math.isfinite(value):
            raise InputError(f"{name}: {measure} is not finite; try --dtype float32")
    return {"values": values, "units": units}


# --- what is measured ---


@dataclass(frozen=True)
class Test:
    """What is measured on every model: any of parallel sentences, held-out text, and rows of a multiple-choice task.

    `heldout` holds (context, text) pairs, of which only the text is scored, `others` those of other languages; `facts`
    go into the header and identify the request. `retrieve` measures the sentences: the function of
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
        names = [name for name, measure in MEASURES.items() if kinds[measure.kind] is not None]
        return names + [f"nll_per_byte:{lang}" for lang in self.others]

    def on(
        self,
        model: transformers.PreTrainedModel,
        arch: archs.Arch,
        tokenizer: transformers.PreTrainedTokenizerBase,
        name: str,
    ) -> dict:
        """A `record`, with `layer_accuracy` and `reverse_accuracy` [L+1] if there are sentences."""
        units: dict = {}
        by_layer = self._retrieval(model, arch, tokenizer, name, units) if self.pairs is not None else {}
        if self.heldout is not None:
            units["nll_per_byte"] = self._losses(model, tokenizer, self.heldout)
        if self.task is not None:
            units["task_accuracy"] = self._task(model, tokenizer)
        for lang, documents in self.others.items():
            units[f"nll_per_byte:{lang}"] = self._losses(model, tokenizer, documents)
        result = record(units, name, **({"retrieval_best": max(by_layer["layer_accuracy"][1:])} if by_layer else {}))
        return result | {"values": {measure: result["values"][measure] for measure in self.measures()}} | by_layer

    def _retrieval(self, model, arch, tokenizer, name: str, units: dict) -> dict:
        """Base -> target retrieval at every hidden state; a sentence's unit is its share of hits over h_1 .. h_L.

        The readout is the last hidden state, whichever layers were changed, with tokens of unit norm and languages
        centred.
        """
        options = {"seed": self.seed, "batch_size": self.batch_size}
        measured = self.retrieve(model, arch, tokenizer, self.pairs, name, **options)
        accuracy = measured.hits.double().mean(1).tolist()
        units["retrieval_mean"] = measured.hits[1:].double().mean(0).tolist()
        units["retrieval_readout"] = measured.readout.double().tolist()
        reverse = measured.hits_reverse.double().mean(1).tolist()
        return {"layer_accuracy": accuracy, "reverse_accuracy": reverse}

    def _losses(self, model, tokenizer, documents: list[tuple[str, str]]) -> list[float]:
        """The NLL of each document over the mean length in bytes: their mean is the NLL per byte of all documents."""
        contexts, texts = zip(*documents, strict=True)
        scores = scoring.text_nlls(model, tokenizer, list(texts), self.batch_size, list(contexts))
        mean_bytes = sum(score.bytes for score in scores) / len(scores)
        return [score.nll / mean_bytes for score in scores]

    def _task(self, model, tokenizer) -> list[float]:
        """1 for every row whose right choice is the most likely one after the prompt, like lm_eval's `acc`; else 0."""
        prompts, choices = [item.prompt for item in self.task], [item.choices for item in self.task]
        logliks = scoring.choice_logliks(model, tokenizer, prompts, choices, self.batch_size)
        return [float(row.index(max(row)) == item.right) for row, item in zip(logliks, self.task, strict=True)]


def add_flags(p, kinds: tuple[str, ...] = KINDS) -> None:
    """Add the flags for what is measured. `test_from_arguments` reads them, and leaves other `kinds` to the script."""
    g = p.add_argument_group("what is measured")
    text = f"{', '.join(kinds)}; default: all for which there is data"
    g.add_argument("--measures", nargs="+", choices=kinds, metavar="M", help=text)
    g.add_argument("--base-lang", metavar="LANG", help="default: the study's languages.base, else that of LAYERS.json")
    g.add_argument("--target-lang", metavar="LANG", help="the same for the language that CPT brought")
    text = "text in the target language, one document per line; default: the study's"
    g.add_argument("--heldout", metavar="FILE", help=text)
    text = "rows: SIB-200's test.tsv, or a .jsonl of cpt/continuations.py; default: the study's"
    g.add_argument("--task", metavar="FILE", help=text)


def languages_from_arguments(args, study, known: dict) -> dict[str, str]:
    """The codes of "base" and "target" from flags, study or a result's header (`known`); "" if none states them."""
    return {
        side: study.value(
            getattr(args, f"{side}_lang"), f"--{side}-lang", f"languages.{side}", known.get(f"{side}_lang", "")
        )
        for side in ("base", "target")
    }


def test_from_arguments(
    args, study, known: dict, retrieve: Callable, files: dict[str, str | None] | None = None
) -> Test:
    """What to measure, from flags, study and the languages `known` from a result's header. Loads no model.

    Args:
        retrieve: see `Test`.
        files: held-out text by language (data.heldout, or a part of it), for the loss in languages other than the
            target, `nll_per_byte:LANG`; languages without a file are skipped.

    Raises:
        InputError: nothing to measure, or a measure asked for by name has no data.
    """
    wanted = args.measures or KINDS
    base, target = languages_from_arguments(args, study, known).values()
    pairs = heldout = task = None
    other_languages: dict = {}
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
        heldout, other_languages = _heldout(args, study, target, files or {}, facts)
    if "task" in wanted:
        whole_task = tasks.from_file(Path(args.task)) if args.task else tasks.of_study(study)
        if whole_task is None and args.measures:
            raise InputError(
                "--measures task: no rows; give --task FILE, or data.task in the study, of SIB-200 or of a local file"
            )
        if whole_task is not None:
            rows = None if args.task else study.get("data.task.rows")
            task = limited(whole_task.items[:rows], args.limit, facts)
            facts["task"] = whole_task.facts | {"rows": len(task)}
    return Test(pairs, heldout, task, args.batch_size, study.seed, facts, retrieve, other_languages)


def _heldout(args, study, target: str, files: dict, facts: dict) -> tuple[list | None, dict[str, list]]:
    """The held-out documents of the target language, and those of `files` by language; adds both to `facts`."""
    mapping, lines_each = study.get("data.heldout") or {}, int(study.get("data.heldout_lines") or 1)
    key = languages.find(mapping, target, default=None) if target else None
    file, heldout = args.heldout or (mapping[key] if key else None), None
    if file is None and args.measures:
        raise InputError("--measures nll: no held-out text; give --heldout FILE, or data.heldout in the study")
    if file is not None:
        heldout = limited(documents(Path(file), lines_each), args.limit, facts)
        facts["heldout"] = {
            "file": file, "sha256": results.file_sha256(file), "documents": len(heldout), "lines": lines_each,
        }  # fmt: skip
    remaining = [lang for lang in files if files[lang] and lang != key]
    others, other_facts = heldout_by_language(files, remaining, lines_each, None)
    for lang in others:
        others[lang] = limited(others[lang], args.limit, facts)
        other_facts[lang]["documents"] = len(others[lang])
    facts |= {"heldout_others": other_facts} if others else {}
    return heldout, others


def limited(found: list, limit: int | None, facts: dict) -> list:
    """The first `limit` entries of `found`; the limit goes into `facts` only if it leaves something out."""
    if limit is not None and limit < len(found):
        facts["limit"] = limit
    return found[:limit]


def documents(file: Path, together: int) -> list[tuple[str, str]]:
    """Held-out documents as (context, text), from the non-empty lines of a file (.gz allowed).

    If `together` is 1, every line is a text without context. Otherwise so many lines make a document, and its first
    line is context that is not scored: recognising the language of a text is no part of knowing that language.
    """
    lines = [text for line in textfiles.texts(file) if (text := line.strip())]
    if not lines:
        raise InputError(f"{file} holds no text")
    groups = [lines[i : i + together] for i in range(0, len(lines) - together + 1, together)]
    if not groups:
        raise InputError(f"{file} has {len(lines)} lines, fewer than data.heldout_lines ({together})")
    if len(groups) == 1:
        cli.warn(f"{file} is one document, so intervals have no width and mean nothing; give more, one per line")
    return [("", group[0]) if together == 1 else (group[0], " ".join(group[1:])) for group in groups]


def heldout_by_language(
    files: dict[str, str | None], chosen: list[str], together: int, limit: int | None
) -> tuple[dict[str, list[tuple[str, str]]], dict[str, dict]]:
    """The `documents` of each of the `chosen` languages, and the facts on their files for a header.

    Raises:
        InputError: a language that `files` lack in any spelling, or a missing file.
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
