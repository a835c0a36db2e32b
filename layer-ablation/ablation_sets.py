"""The sweeps: which blocks are the checkpoint's and which the base's, and the words that ask for each sweep.

A set K holds the blocks of C; the others are B's. Blocks are 0 .. N-1.

| words | K |
|---|---|
| `ablate_in`, `ablate_out` | k .. N-1; 0 .. N-k-1: k blocks are reverted from the input or the output side |
| `insert_in`, `insert_out` | 0 .. k-1; N-k .. N-1: k blocks are inserted |
| `outer`, `inner` | the first k and the last k; all others |
| `window:w` | all but s .. s+w-1; without w a quarter of the blocks |
| others | layers as in cpt_utils/measures/layer_sets.py: `random:m:seed`, `outer:0.25`, `0,2,5-7`, .. |
"""

from __future__ import annotations

from cpt_utils.base.errors import InputError
from cpt_utils.measures import layer_sets

# k -> K. ablate_in(k) is insert_out(N-k), ablate_out(k) is insert_in(N-k).
SIDES = {
    "insert_in": lambda n, k: range(k),
    "insert_out": lambda n, k: range(n - k, n),
    "ablate_in": lambda n, k: range(k, n),
    "ablate_out": lambda n, k: range(n - k),
    "outer": lambda n, k: [*range(k), *range(n - k, n)],
    "inner": lambda n, k: range(k, n - k),
}
HALF = ("outer", "inner")  # k goes up to N/2
DEFAULT = ("insert_in", "insert_out", "ablate_in", "ablate_out", "outer", "inner", "window")
Kept = tuple[int, ...]


def kept(name: str, n: int, k: int) -> Kept:
    """K of one of SIDES at `k`, for `n` blocks.

    Raises:
        InputError: k is below 0 or above the number of blocks (half of it for sweeps from both sides).
    """
    most = n // 2 if name in HALF else n
    if not 0 <= k <= most:
        raise InputError(f"{name}({k}) does not exist: with {n} blocks k goes from 0 to {most}")
    return tuple(sorted({*SIDES[name](n, k)}))


def window(n: int, start: int, width: int) -> Kept:
    """K of a window: all `n` blocks except `width` ones from `start` on.

    Raises:
        InputError: the window is not within the blocks.
    """
    if not 0 <= start <= start + width <= n:
        raise InputError(f"a window of {width} blocks from {start} on does not exist: there are {n} blocks")
    return tuple(block for block in range(n) if not start <= block < start + width)


def points(last: int, stride: int) -> list[int]:
    """Every `stride`-th of 0 .. `last`, counted from both ends, so that `last` - k is included with every k."""
    half = range(0, last // 2 + 1, stride)
    return sorted({*half, *(last - k for k in half)})


def sweeps(words: list[str], place: layer_sets.Place, stride: int = 1) -> dict[str, list[tuple[int, Kept]]]:
    """Every sweep that `words` ask for, as points (k, K); k is the start of a window, the seed of a random set.

    Raises:
        InputError: words that mean no set, a window wider than the model, or layers that do not exist.
    """
    n, by_name = place.n_layers, {}
    for word in words:
        name, _, more = word.partition(":")
        if word in SIDES:
            by_name[word] = [(k, kept(word, n, k)) for k in points(n // 2 if word in HALF else n, stride)]
        elif name == "window":
            width = _width(word, more, n)
            by_name[f"window:{width}"] = [(s, window(n, s, width)) for s in points(n - width, stride)]
        else:
            part = layer_sets.read(word, place)
            if part.component or part.neurons is not None:
                raise InputError(f"{word!r} is a part of layers, but a sweep takes whole layers; see --component")
            m, _, seed = more.partition(":")
            key, k = (f"random:{m}", int(seed)) if name == "random" else (word, 0)
            by_name.setdefault(key, []).append((k, part.layers))
    return by_name


def _width(word: str, more: str, n: int) -> int:
    width = int(more) if more.isdecimal() else max(1, n // 4) if word == "window" else -1
    if not 0 <= width <= n:
        raise InputError(f"{word!r}: a window is 0 to {n} blocks wide in this model; write window:{max(1, n // 4)}")
    return width
