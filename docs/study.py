"""Write docs/study.md: every key of a study file from its model in cpt_utils/base/study_keys.py, templates, advice.

python docs/study.py
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic.fields import FieldInfo

from cpt_utils.base import study_keys
from cpt_utils.base.keys import Keys
from cpt_utils.base.study import as_yaml

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# A study of your own

Written by `python docs/study.py`; its keys are those of `cpt_utils/base/study_keys.py`, and a test compares the two.

## From a clone to the first figure

You need a model from before the continued pre-training (CPT), and a folder of checkpoints from it: what Hugging
Face's Trainer leaves will do as it is (`checkpoint-500/` and so on, with `optimizer.pt`, `trainer_state.json` and the
final model beside them), LoRA adapters too ([what is read](checkpoints.md)). And sentences in two languages, the n-th
of one the translation of the n-th of the other; neither model may have been trained on them.

```
make study STUDY=basque.yaml
. .venv/bin/activate
python sentence-retrieval/sr_experiment.py --study basque.yaml
```

The first command sets everything up (once; Python 3.11 or later), asks where models and texts lie, and says what is
missing and how long the whole will take. The last one draws
`results/basque/sentence-retrieval/eng_Latn-eus_Latn/accuracy.png`: at which layers a sentence finds its translation,
a line for each checkpoint. Then all of it, with an HTML report at the end:

```
make check STUDY=basque.yaml
make reproduce STUDY=basque.yaml
```

`make check` says before anything runs what is left out and which key would add it. `make reproduce` says a line for
each step with the time left for the whole (`results/basque/status.json`: the same for scripts; `VERBOSE=1`:
Snakemake's own words); what a step is at is in its log in `results/basque/logs/`. Interrupted, it goes on where it was
(after a power cut or `kill -9`: `make unlock STUDY=basque.yaml` first), and after a step that failed, whose name and
log are on the report of what there is by then. A single step is
`python <script> --study basque.yaml`, where flags win over the study's keys.

The study file and the texts are not watched: after a change, remove the results that it concerns (after one of
`lsn.rate`, `results/basque/lsn`), and the same command makes them and what rests on them again.

A second run of the same base goes under `runs: {second: my-models/cpt-2}`. `make reproduce` with `ARM=second` measures
it, and the next call without `ARM` sets both side by side.

Without questions:

```
python -m cpt_utils.base.study --init basque.yaml --base my-models/base --run my-models/cpt \\
    --languages eng_Latn,eus_Latn --pairs my-texts/eng_Latn.txt my-texts/eus_Latn.txt \\
    --heldout eus_Latn=my-texts/eus.held.txt --neurons eng_Latn=my-texts/eng.txt eus_Latn=my-texts/eus.txt
```

Paths are relative to the folder that commands are run in. In every text `{seed}` and `{name}` stand for the study's
own, and `${MY_TEXTS}` for a variable of the environment.

## Templates

Each is a whole study. With more keys there is more of it: `data.heldout` adds losses and samples, `data.task` the
downstream task, `tokens` and `languages.lsn` the neurons of Part II, `ablation` and `spectral` Parts III and IV,
`alignment` cosines of gradients. A language without a benchmark gets a task of its held-out text, with four choices, by
`train: {task: continuations}` and `data.task: {name: continuation_eus_Latn, dir: results/basque/task}`. Swaps, arms and
other changed models are measured by SIB-200 or by such a task, not by other tasks of lm_eval.

"""
ADVICE = """
## How much of everything

**Checkpoints: eight to twenty-four, early ones close together.** Whatever is correlated over checkpoints (weights
with the task, activation with weights) has an interval by their number alone: r = .80 lies in [-.03, .98] with six,
in [.34, .95] with ten, in [.59, .91] with twenty-four, and has none with fewer than four. First differences, which
tell more since [curves that both grow correlate for no other reason](claims.md), have one point less. CPT is quick at
first: in the demo 60 % of the change of the weights and 59 % of the gain in loss are there after 80 of 600 steps. So
save steps that grow, each 1.5 to 3 times the one before (10, 30, 80, 180, 360, 600). A Trainer saves at even
distances: leave `save_total_limit` out, which deletes early checkpoints, mind that `optimizer.pt` is twice the weights
(`save_only_model: true` leaves it out, and the run cannot be resumed), and name those that you want in a list:

```yaml
run:
  - my-models/cpt/checkpoint-100
  - my-models/cpt/checkpoint-250
  - my-models/cpt/checkpoint-600
```

Each costs a pass over the sentences, the held-out text and the task. Swaps, neurons and claims are of the last one.

**Sentences: 500 to 1,000.** An accuracy of .5 is known to ± .07 with 200 and to ± .03 with 1,000. It is also easier
among fewer (chance is one in their number), so that studies compare only at equal numbers. The
[gate](../sentence-retrieval/README.md), without which layers mean nothing, wants the model to be better than its
untrained twin by an interval of 99 % over sentences. Scores take time with the square of the number, and memory: 4.3
MB a pair for a model of 7B.

**Controls: 99 or more; never fewer than twenty.** The swap that is looked at is ranked among random sets of layers.
With n sets p cannot be below 1 / (n + 1): .05 with 19, .01 with 99. Fewer than fourteen leave C2b and C5b without the
fit that takes depth into account. `all` measures all sets of that size, or 300 drawn ones; each costs retrieval, loss
and task of one model. [One random set](claims.md), as published, says little.

**Tokens for neurons: start with ten million of a language.** The rate at which a neuron fires has a standard error of
at most 0.5 / √n: .005 with 10,000 tokens, .0002 with ten million; what matters is whether neurons near the cut change
sides. `lsn/identify.py` says so: it makes the mask of each half of the text, and where both agree (Jaccard .9) it was
enough ([convergence](../lsn/README.md)). The demo's 2,048 neurons need 15,000 tokens; the published code takes 100
million of each language. Texts should be about equally long (within a factor of three), not repeat themselves, and be
of one language each.

**Languages for neurons: three or more.** LAPE calls a neuron specific that fires for few of the languages given. With
two of them it cannot tell the new language from everything that is not English.

**Held-out text: 200 documents of each language or more.** Intervals are over documents, and one document has none. It
must not have been trained on. Name the base language and others that the model knew, too: their losses are what CPT
costs.

**Seeds: five or more for a verdict.** [One run is one sample](../report/README.md) of what CPT does, and its page
says *no verdict*. Eight seeds find effects of two standard deviations over seeds, five those of three. Put `{seed}`
into `run` and `results` (and `base`, if it is trained anew), and train CPT again with another seed.

## Every key

"""
# The templates' answers: (title, what it is for, values).
PAIRS = {
    "Text": ("Two files, the n-th line of one the translation of the n-th of the other.",
             {"source": "text", "base_file": "my-texts/eng_Latn.txt", "target_file": "my-texts/eus_Latn.txt"}),
    "TSV": ("One table, a column a language, named by its code in the first line (else a number from 1: "
            "`base_file: my-texts/pairs.tsv:2`, `target_file: my-texts/pairs.tsv:4`).",
            {"source": "tsv", "base_file": "my-texts/pairs.tsv"}),
    "SIB-200, a local copy": ("`<code>/train.tsv`, `dev.tsv` and `test.tsv`; the downstream task is on the same files.",
                              {"source": "sib200", "dir": "my-texts/sib200",
                               "task": {"name": "sib200_eus_Latn", "dir": "my-texts/sib200"}}),
    "FLORES+": ("From the hub (gated: accept its terms there, then `hf auth login`), or with `dir` a local copy, "
                "`<code>.jsonl`. Its `devtest` is another thousand.", {"source": "flores", "split": "dev"}),
}  # fmt: skip


def template(data: dict) -> str:
    """A whole study file with these parallel sentences."""
    pair = {"base": "eng_Latn", "target": "eus_Latn"}
    models = {"base": "my-models/base", "run": "my-models/cpt"}
    return as_yaml({"name": "basque", **models, "languages": pair, "data": data, "results": "results/basque"})


def templates() -> str:
    blocks = (f"### {title}\n\n{words}\n\n```yaml\n{template(data)}```\n" for title, (words, data) in PAIRS.items())
    return "\n".join(blocks)


# ---------------------------------------------------------------- the keys


def rows(model: type[Keys] = study_keys.Study, above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every key that a study file may have; `<name>` stands for a name of one's own."""
    for name, field in model.fields().items():
        dotted = f"{above}{name}"
        yield dotted, field
        for below, named in _models(field.annotation):
            yield from rows(below, f"{dotted}.<name>." if named else f"{dotted}.")


def _models(annotation, named: bool = False) -> Iterator[tuple[type[Keys], bool]]:
    """The models of keys in a type, and whether they are the values of a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, Keys):
        yield annotation, named
    for part in get_args(annotation):
        yield from _models(part, named or get_origin(annotation) is dict)


def kind(annotation: Any, facts: tuple = ()) -> str:
    """A type in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        below = [fact for part in parts[1:] for fact in getattr(part, "metadata", [part])]
        return kind(parts[0], (*facts, *below))
    if origin in (Union, types.UnionType):
        # Text that lists and numbers may be written as comes last.
        return " or ".join(dict.fromkeys(kind(part, facts) for part in parts if part is not type(None)))
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is list:
        return f"list of {kind(parts[0])}".replace("list of `", "list of: `")
    if origin is dict:
        return f"mapping to {kind(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Keys):
        return "keys"
    word = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "true or false"}[annotation]
    return word + _bounds(facts)


def _bounds(facts: tuple) -> str:
    words = []
    for fact in facts:
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
            if isinstance(fact, getattr(annotated_types, name.capitalize())):
                words.append(f"{sign} {getattr(fact, name):g}")
    return f" {', '.join(dict.fromkeys(words))}" if words else ""


def default(field: FieldInfo) -> str:
    """What holds where the key is left out."""
    usual = field.json_schema_extra["usual"]
    value = field.default
    return usual or ("none" if value is None else f"`{yaml.safe_dump(value).splitlines()[0]}`")


def example(dotted: str, field: FieldInfo) -> str:
    """The key as it stands in a file, in one line."""
    values = {dotted.rpartition(".")[2]: field.examples[0]}
    line = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1000)
    return line.strip()[1:-1]


def reference() -> str:
    """A table for the keys at the top, and one for each group below them."""
    groups: dict[str, list[str]] = {}
    for dotted, field in rows():
        above, _, _ = dotted.rpartition(".")
        cells = (f"`{dotted}`", field.title, kind(field.annotation, tuple(field.metadata)), default(field),
                 f"`{example(dotted, field)}`")  # fmt: skip
        groups.setdefault(above, []).append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    head = "| key | is | type | without it | example |\n|---|---|---|---|---|\n"
    return "\n".join(f"### {f'`{above}`' if above else 'The study'}\n\n{head}" + "\n".join(lines) + "\n"
                     for above, lines in groups.items())  # fmt: skip


def page() -> str:
    return HEAD + templates() + ADVICE + reference()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
