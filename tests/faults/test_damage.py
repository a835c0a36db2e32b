"""Inputs that are cut off or have a bit turned: refused in one line, or used where nothing in the file can tell."""

from __future__ import annotations

import random
from pathlib import Path

import folders
import harness
import pytest

ROUNDS = 8 if harness.LONG else 1  # cut and flipped in turn
HEAVY = (
    "figures",
    "claims",
    "lm_eval",
    "retrieval_swapped",
    "ffn_controls",
    "correlation",
    "downstream",
    "attn_controls",
)
NAMES = [name for name in harness.NAMES if harness.LONG or name not in HEAVY]
# Of these a part is no whole: a cut must show. Of text, a part is text.
BINARY = (".safetensors", ".pt", ".json", ".tiny")
# Copied, or described by a hash in the header, by commands that need no tokenizer; they do not read what is in it.
SIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def cut(path: Path, draw: random.Random) -> str:
    size = path.stat().st_size
    length = draw.randrange(size)
    with path.open("rb+") as file:
        file.truncate(length)
    return f"{path.name} cut to {length} of {size} bytes"


def flip(path: Path, draw: random.Random) -> str:
    """Turn one bit: in weights half of the time within the header, which is a small part of the file."""
    data = bytearray(path.read_bytes())
    end = len(data)
    if path.suffix == ".safetensors" and draw.random() < 0.5:
        end = 8 + int.from_bytes(data[:8], "little")
    place, bit = draw.randrange(end), draw.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"{path.name}: bit {bit} of byte {place} of {len(data)} turned"


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_input_is_refused_or_used(bench, tally, name):
    draw, known = random.Random(f"{harness.SEED} damage {name}"), bench.known[name]
    files = [file for file in known.read if (known.before / file).stat().st_size]
    for number in range(ROUNDS):
        bench.put(name)
        file = draw.choice(files)
        damage = (cut, flip)[(number + harness.NAMES.index(name)) % 2]
        what = f"{file}: {damage(bench.case / file, draw)}"
        before = folders.tree(bench.case)
        outcome = bench.run(name)
        now = bench.tree()
        if outcome.code:
            assert not outcome.refused(), (what, outcome.refused(), outcome.output[-1500:])
        assert outcome.code or "Traceback" not in outcome.output, (what, outcome.output[-1500:])
        changed = [other for other, value in known.inputs.items()
                   if known.after.get(other) == value and now.get(other) != before[other]]  # fmt: skip
        assert not changed, (what, changed)
        new = [other for other in now if other not in before and not folders.temporary(other)]
        unlike = [other for other in new if not other.endswith("/") and now[other] != known.after.get(other)]
        if (
            damage is cut and file.endswith(BINARY) and Path(file).name not in SIDE
        ):  # what was written is as from the whole file, which was not needed
            assert not unlike, (what, "accepted", unlike, outcome.output[-800:])
        kind = f"damaged input ({'cut off' if damage is cut else 'a bit turned'}): "
        if outcome.code:
            tally[kind + "refused"] += 1
        elif not unlike:
            tally[kind + "of no effect"] += 1
        elif all(
            folders.header(bench.case / other) != known.headers[other] for other in unlike if other in known.headers
        ):
            tally[kind + "other results, and their headers show it"] += 1
        else:
            tally[kind + "other results, and nothing shows it"] += 1
