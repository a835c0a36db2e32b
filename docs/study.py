"""Write docs/study.md: templates, advice, and every key of a study file, from cpt_utils/base/study_keys.py.

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
# Your own study

Written by `python docs/study.py` from the keys in `cpt_utils/base/study_keys.py`; a test compares the two.

## From a clone to the first figure

You need a model from before the continued pre-training (CPT), and a folder of its checkpoints. The output of Hugging
Face's Trainer can be used as it is (`checkpoint-500/` and so on, with `optimizer.pt`, `trainer_state.json` and the
final model beside them), also with LoRA adapters ([supported formats](checkpoints.md)). You also need sentences in two
languages, line n of one being the translation of line n of the other; neither model may have been trained on them.

```
make study STUDY=basque.yaml
. .venv/bin/activate
python sentence-retrieval/sr_experiment.py --study basque.yaml
```

The first command does the set-up (once; Python 3.11 or later), asks for models and texts, and reports what is missing
and how long the whole study will take. The last one draws
`results/basque/sentence-retrieval/eng_Latn-eus_Latn/accuracy.png`: the accuracy of retrieving translations at each
layer, one line per checkpoint. The commands for the whole study, with an HTML report at the end, are:

```
make check STUDY=basque.yaml
make reproduce STUDY=basque.yaml
```

`make check` reports in advance which parts are left out and which key would add them. `make reproduce` prints a line
for each step, with the estimated time left (`results/basque/status.json`: the same for scripts; `VERBOSE=1`:
Snakemake's own messages); the progress of a step is in its log in `results/basque/logs/`. An interrupted run continues
with the same command (after a power cut or `kill -9`, run `make unlock STUDY=basque.yaml` first); so does a run with a
failed step, whose name and log are on a report of the results so far. A single step is
`python <script> --study basque.yaml`, where flags override the study's keys.

The study file and the texts are not watched: after a change, remove the affected results (for `lsn.rate`:
`results/basque/lsn`), and the same command makes them again, with all results that depend on them.

A second run of the same base is added by `runs: {second: my-models/cpt-2}`. `make reproduce` with `ARM=second` measures
it, and the next call without `ARM` compares the two.

Without questions:

```
python -m cpt_utils.base.study --init basque.yaml --base my-models/base --run my-models/cpt \\
    --languages eng_Latn,eus_Latn --pairs my-texts/eng_Latn.txt my-texts/eus_Latn.txt \\
    --heldout eus_Latn=my-texts/eus.held.txt --neurons eng_Latn=my-texts/eng.txt eus_Latn=my-texts/eus.txt
```

Paths are relative to the folder in which commands are run. In all values, `{seed}` and `{name}` are replaced by the
study's seed and name, and `${MY_TEXTS}` by the environment variable.

## Templates

Each is a complete study. More keys add more parts: `data.heldout` losses and samples, `data.task` the downstream task,
`tokens` and `languages.lsn` the neurons of Part II, `ablation` and `spectral` Parts III and IV, `alignment` cosines of
gradients. For a language without a benchmark, `train: {task: continuations}` with
`data.task: {name: continuation_eus_Latn, dir: results/basque/task}` makes a task with four choices from its held-out
text. Swaps, arms and other changed models are evaluated on SIB-200 or on such a task, not on other tasks of lm_eval.

"""
ADVICE = """
## Recommended sizes

**Checkpoints: eight to twenty-four, early ones close together.** For correlations over checkpoints (weights with the
task, activation with weights), the interval depends on their number: r = .80 has the interval [-.03, .98] with six
checkpoints, [.34, .95] with ten, [.59, .91] with twenty-four, and none with fewer than four. First differences, which
are more informative because [any two growing curves correlate](claims.md), have one point less. CPT changes a model
quickly at first: in the demo, 60 % of the weight change and 59 % of the gain in loss are reached after 80 of 600 steps.
So save at growing steps, each 1.5 to 3 times the one before (10, 30, 80, 180, 360, 600). A Trainer saves at equal
distances: do not set `save_total_limit`, which deletes early checkpoints; note that `optimizer.pt` is twice as large as
the weights (`save_only_model: true` omits it, but then the run cannot be resumed); and list the checkpoints to use:

```yaml
run:
  - my-models/cpt/checkpoint-100
  - my-models/cpt/checkpoint-250
  - my-models/cpt/checkpoint-600
```

Each checkpoint costs a pass over the sentences, the held-out text and the task. Swaps, neurons and claims only use the
last one.

**Sentences: 500 to 1,000.** An accuracy of .5 is known to ± .07 with 200 sentences and to ± .03 with 1,000. Retrieval
is also easier among fewer sentences (chance is one divided by their number), so studies can only be compared with equal
numbers. The [gate](../sentence-retrieval/README.md), without which layers mean nothing, requires that the model is
better than its untrained twin, by a 99 % interval over sentences. Time and memory for scores grow with the square of
the number: 4.3 MB a pair for a model of 7B.

**Controls: 99 or more, never fewer than twenty.** The swap of interest is ranked among random sets of layers. With n
sets, p cannot be below 1 / (n + 1): .05 with 19, .01 with 99. With fewer than fourteen, C2b and C5b lack the fit that
accounts for depth. `all` measures all sets of that size, or 300 drawn ones; each costs retrieval, loss and task of one
model. [One random set](claims.md), as published, shows little.

**Tokens for neurons: start with ten million per language.** The rate at which a neuron fires has a standard error of
at most 0.5 / √n: .005 with 10,000 tokens, .0002 with ten million. It matters only if neurons near the threshold change
sides. `lsn/identify.py` reports this: it makes a mask from each half of the text; if they agree (Jaccard .9), the text
was sufficient ([convergence](../lsn/README.md)). The demo's 2,048 neurons need 15,000 tokens; the published code uses
100 million per language. Texts should be about equally long (within a factor of three), not repeat themselves, and be
in one language each.

**Languages for neurons: three or more.** LAPE calls a neuron specific if it fires for few of the languages. With only
two, it cannot distinguish the new language from everything that is not English.

**Held-out text: 200 documents or more per language.** Intervals are over documents; a single document has none. The
text must not have been used for training. Include the base language and others that the model knew: their losses are
the cost of CPT.

**Seeds: five or more for a verdict.** [One run is one sample](../report/README.md) of the effect of CPT, and its page
says *no verdict*. Eight seeds detect effects of two standard deviations over seeds; five seeds, of three. Put `{seed}`
into `run` and `results` (and into `base`, if it is trained anew), and repeat CPT with other seeds.

## Every key

"""
# The templates: title -> (description, the values of `data`).
PAIRS = {
    "Text": ("Two files; line n of one is the translation of line n of the other.",
             {"source": "text", "base_file": "my-texts/eng_Latn.txt", "target_file": "my-texts/eus_Latn.txt"}),
    "TSV": ("One table with a column per language, named by its code in the first line (otherwise by number, from 1: "
            "`base_file: my-texts/pairs.tsv:2`, `target_file: my-texts/pairs.tsv:4`).",
            {"source": "tsv", "base_file": "my-texts/pairs.tsv"}),
    "SIB-200, a local copy": ("`<code>/train.tsv`, `dev.tsv` and `test.tsv`; the downstream task uses the same files.",
                              {"source": "sib200", "dir": "my-texts/sib200",
                               "task": {"name": "sib200_eus_Latn", "dir": "my-texts/sib200"}}),
    "FLORES+": ("From the hub (gated: accept its terms there, then `hf auth login`), or with `dir` from a local copy, "
                "`<code>.jsonl`. Its `devtest` has another thousand.", {"source": "flores", "split": "dev"}),
}  # fmt: skip


def template(data: dict) -> str:
    """A complete study file with these parallel sentences."""
    pair = {"base": "eng_Latn", "target": "eus_Latn"}
    models = {"base": "my-models/base", "run": "my-models/cpt"}
    return as_yaml({"name": "basque", **models, "languages": pair, "data": data, "results": "results/basque"})


def templates() -> str:
    blocks = (f"### {title}\n\n{words}\n\n```yaml\n{template(data)}```\n" for title, (words, data) in PAIRS.items())
    return "\n".join(blocks)


# ---------------------------------------------------------------- the keys


def rows(model: type[Keys] = study_keys.Study, above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every key that a study file may have; `<name>` stands for any name."""
    for name, field in model.fields().items():
        dotted = f"{above}{name}"
        yield dotted, field
        for below, named in _models(field.annotation):
            yield from rows(below, f"{dotted}.<name>." if named else f"{dotted}.")


def _models(annotation, named: bool = False) -> Iterator[tuple[type[Keys], bool]]:
    """The models of keys in a type, each with whether it is the value of a mapping."""
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
        # Text, as another notation of lists and numbers, comes last.
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
    """The behaviour without the key."""
    usual = field.json_schema_extra["usual"]
    value = field.default
    return usual or ("none" if value is None else f"`{yaml.safe_dump(value).splitlines()[0]}`")


def example(dotted: str, field: FieldInfo) -> str:
    """The key as written in a file, in one line."""
    values = {dotted.rpartition(".")[2]: field.examples[0]}
    line = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1000)
    return line.strip()[1:-1]


def reference() -> str:
    """One table for the top-level keys, and one for each group below them."""
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
