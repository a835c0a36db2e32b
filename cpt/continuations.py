"""Make a multiple-choice task from plain text in any language: which continuation completes the sentence?

For a language without a benchmark, held-out text is enough: each sentence is cut in half, and a model chooses by
log-likelihood among the true second half and those of other sentences of similar length. lm_eval can run the task.

In:   a text file, one sentence per line (.txt or .gz), held out from training.
Out:  OUT/continuation_<lang>.yaml and .jsonl (`context`, `choices`, `label`), for `lm_eval --include_path OUT`.

Full: python cpt/continuations.py --text held-out.txt --language gle_Latn --out build/task --seed 0
Tiny: python cpt/continuations.py --text held-out.txt --language gle_Latn --out build/task --limit 20
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from cpt_utils.base import cli, languages, results, textfiles
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study, expand_environment

SCHEMA = "continuations"
SHORTEST = 6  # words; many shorter sentences share their halves
TASK = """\
# Made by cpt/continuations.py from {source}; {n} sentences, {choices} choices each, seed {seed}.
task: "{name}"
dataset_path: "json"
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: "test"
output_type: "multiple_choice"
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: " "
metric_list:
  - {{metric: "acc", aggregation: "mean", higher_is_better: true}}
  - {{metric: "acc_norm", aggregation: "mean", higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def items(sentences: list[str], choices: int, seed: int) -> list[dict]:
    """One item per sentence of at least SHORTEST words: `context` (first half), `choices`, `label` (the true one).

    The wrong choices are second halves of the sentences nearest in length, drawn from about ten times as many as
    needed, so length gives nothing away. Sentences with the same second half are never choices in one item.

    Raises:
        InputError: fewer sentences than choices.
    """
    halves = []
    for sentence in dict.fromkeys(sentences):
        words = sentence.split()
        if len(words) >= SHORTEST:
            cut = len(words) // 2
            halves.append((" ".join(words[:cut]), " ".join(words[cut:])))
    if len(halves) < choices:
        raise InputError(f"{len(halves)} sentences of {SHORTEST} words or more are too few for {choices} choices")
    rng = random.Random(seed)
    order = sorted(range(len(halves)), key=lambda i: (len(halves[i][1]), i))
    rows = []
    for rank, i in sorted(enumerate(order), key=lambda pair: pair[1]):
        context, true_ending = halves[i]
        reach = choices * 5
        near = [halves[j][1] for j in order[max(0, rank - reach) : rank + reach + 1]]
        others = sorted({ending for ending in near if ending != true_ending})
        if len(others) < choices - 1:
            continue
        drawn = rng.sample(others, choices - 1)
        label = rng.randrange(choices)
        rows.append({"context": context, "choices": [*drawn[:label], true_ending, *drawn[label:]], "label": label})
    return rows


def write(out: Path, name: str, made: list[dict], source: str, choices: int, seed: int) -> Path:
    """Write the task file and its rows. The task holds the absolute path of the rows: do not move the folder."""
    data = out / f"{name}.jsonl"
    results.write_text(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
    task = out / f"{name}.yaml"
    facts = {"source": source, "n": len(made), "choices": choices, "seed": seed}
    results.write_text(task, TASK.format(name=name, data=json.dumps(str(data.resolve())), **facts))
    return task


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    p.add_argument("--text", metavar="FILE", help="held-out sentences, one per line; default: the study's data.heldout")
    p.add_argument("--language", metavar="LANG", help="their language; default: the study's languages.target")
    p.add_argument("--out", "--output", metavar="FOLDER", help="default: the study's data.task.dir")
    p.add_argument("--choices", type=int, default=4, metavar="N", help="continuations to choose from; default 4")
    p.add_argument("--limit", type=cli.positive, metavar="N", help="use only the first N sentences; default: all")
    return p


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    language = study.value(args.language, "--language", "languages.target")
    languages.canonical(language, any_tag=True)
    heldout = study.get("data.heldout") or {}
    if args.text is None and not heldout:
        raise InputError("nothing says which text to use: give --text, or the key data.heldout in a study file")
    text = Path(expand_environment(args.text or heldout[languages.find(heldout, language)], study.path))
    out = Path(study.value(args.out, "--out", "data.task.dir"))
    if args.choices < 2:
        raise InputError(f"--choices {args.choices}: at least 2 are needed to choose from")
    sentences = [line.strip() for line in textfiles.texts(text)]
    rows = items(sentences[: args.limit], args.choices, study.seed)
    task = write(out, f"continuation_{language}", rows, text.name, args.choices, study.seed)
    cli.say(f"{task}: {len(rows)} items of {len(sentences)} sentences, chance {1 / args.choices:.2f}")


if __name__ == "__main__":
    cli.run(main)
