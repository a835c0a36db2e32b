"""Whether a model retrieves better than its untrained twin: where not, its layers and hub mean nothing, nor does what
is built on them.

Step 1 measures the twin, step 2 writes the answer into the header of its file as `gate`, and every later step that
reads the layers hands it on.
"""

from __future__ import annotations

import json
import math
import operator
import os
import statistics
from pathlib import Path

from cpt_utils.base import cli, forms, results, stats
from cpt_utils.base.lazy import np
from cpt_utils.checkpoints import identity
from cpt_utils.measures import curves

RETRIEVAL = "sentence-retrieval"
LEVEL = 0.99  # see `compare`
MANY = 1000  # times the noise of now: no number of sentences is a remedy
POWER = 0.8416  # standard errors beyond the bound for four tries of five
# In these a model and its twin must have been measured alike.
ALIKE = ("n_layers", "base_lang", "target_lang", "margin_variant", "k", "special_tokens")


# --- the test ---


def at_best(hits: np.ndarray, seed: int) -> np.ndarray:
    """Hits [sentences] at the best of the states behind the first, chosen on the half that a sentence is not in.

    Args:
        hits: 0/1 [states, sentences].
    """
    n = hits.shape[1]
    order, own = np.random.default_rng(seed).permutation(n), np.zeros(n)
    halves = (order[: n // 2], order[n // 2 :]) if n > 1 else (order, order)
    for choose, read in (halves, halves[::-1]):
        own[read] = hits[1 + hits[1:, choose].mean(1).argmax(), read]
    return own


def compare(hits: np.ndarray, untrained: np.ndarray, seed: int = 42) -> dict:
    """Hits of a model at its best layer minus those of its untrained twin at its best hidden state.

    The model's best layer is chosen on one half of the sentences and read on the other, both ways: the best of many
    looks good by chance on the sentences that it was chosen on. A mean over layers would lose a model that retrieves in
    a few of them. The twin's is chosen where it is read, so that doubt speaks for it, and may be h_0 too: what
    embeddings find without any training is no work of layers.

    The interval is a bootstrap over sentences, which knows nothing of other random initialisations. Hence the doubt,
    and 99 %: of untrained models that differ in the seed alone 0 to 5 % then pass as better than another one. (With
    both chosen on the other half it is 6 to 13 % at 95 %. Measured on a byte-level Llama of 4 layers of width 64, 500
    and 1,004 sentences of SIB-200 in English with French and with Basque, all pairs of 16 and 12 seeds.)

    Args:
        hits, untrained: 0/1 [L+1, sentences], over the same sentences.

    Returns:
        `passed` (the interval is above 0), `difference, ci_low, ci_high, level`, and what was subtracted: `accuracy`
        and `untrained_accuracy`; `n` sentences.
    """
    own = at_best(hits, seed)
    twin = untrained[untrained.mean(1).argmax()]
    low, high = stats.bootstrap_mean(own - twin, seed, level=LEVEL)
    return {
        "passed": low > 0,
        "difference": float((own - twin).mean()),
        "ci_low": low,
        "ci_high": high,
        "level": LEVEL,
        "accuracy": float(own.mean()),
        "untrained_accuracy": float(twin.mean()),
        "n": len(own),
    }


def words(found: dict) -> str:
    """The outcome in a line."""
    model = found["model"]
    interval = f"[{found['ci_low']:+.3f}, {found['ci_high']:+.3f}]"
    by = f"{found['difference']:+.3f} {interval} at {found['level']:.0%}, {found['n']} sentences"
    by += f", by {found['measure']}" if "measure" in found else ""
    if found["passed"]:
        return f"{model} retrieves better than its untrained twin ({by})"
    line = (
        f"{model} does not retrieve clearly better than its untrained twin ({by}): its layers, its hub and everything "
        "built on them mean nothing"
    )
    needed = sentences_needed(found)
    return line + (f"; a difference of this size would be clear with some {needed:,} sentences" if needed else "")


def sentences_needed(found: dict) -> int | None:
    """How many sentences would show a difference as large as the one found in four tries of five, to two digits; None
    where it is not above 0, or the interval says nothing of its noise."""
    difference, half, level = found["difference"], found["difference"] - found["ci_low"], found["level"]
    if not (difference > 0 and 0 < half < math.inf and 0 < level < 1 and found["n"] > 0):  # a file may say anything
        return None
    ratio = half / difference * (1 + POWER / statistics.NormalDist().inv_cdf((1 + level) / 2))
    if ratio > MANY:
        return None
    needed = found["n"] * ratio**2
    unit = 10 ** max(0, len(str(math.ceil(needed))) - 2)
    return math.ceil(needed / unit) * unit


def tell(*found: dict) -> None:
    """A line for the models that pass and one for the others, each with the numbers of the model nearest to the bar."""
    for passed in (True, False):
        alike = [one for one in found if one["passed"] is passed]
        if not alike:
            continue
        nearest = min(alike, key=lambda one: abs(one["ci_low"]))
        others = [one["model"] for one in alike if one is not nearest]
        (cli.say if passed else cli.warn)(words(nearest) + cli.likewise(others))


# --- files ---


def of_results(path: Path, untrained: Path, model: str, seed: int, measure: str = "published") -> dict:
    """`compare` of two retrieval results, whose hits lie beside them, with the names of both sides, and of the measure
    where it is not the published one."""
    key = curves.MEASURES[measure].hits
    hits = [results.read_tensors(file.with_suffix(".pt"))[key].numpy() for file in (path, untrained)]
    found = {"model": model, **compare(*hits, seed), "untrained": untrained}
    return found if measure == "published" else found | {"measure": measure}


def twin_beside(path: Path, header: dict) -> Path | None:
    """The result of the untrained twin beside the retrieval result `path`; None where there is none.

    It is one of the model's configuration over the same sentences, whatever its name.
    """
    model = (header.get("models") or {}).get("model")
    own = path.with_name(f"untrained.{path.name}")
    for file in dict.fromkeys([own, *sorted(path.parent.glob("untrained*.json"))]) if model else ():
        if not (file.is_file() and file.with_suffix(".pt").is_file()):
            continue
        _, other = results.read_json(file, RETRIEVAL, allow_limited=True)
        shape = (other.get("models") or {}).get("untrained_like")
        sentences = [(head.get("data") or {}).get("pairs_sha256") for head in (header, other)]
        alike = sentences[0] == sentences[1] and all(header.get(key) == other.get(key) for key in ALIKE)
        if not (shape and alike):
            continue
        # Headers of before have the second hash alone; of a model on the hub neither is known, and the number of layers
        # must do.
        known = model.get("untrained_sha256"), model.get("config_sha256")
        hashes = identity.shape_hash(identity.untrained_like(shape)), identity.shape_hash(shape)
        if not any(known) or any(map(operator.eq, known, hashes)):
            return file
    return None


def carried(*paths: str | os.PathLike) -> dict | None:
    """The `gate` of the first of these steps' files whose header has one, for the header of the next step; one that
    failed is said.

    None: it was not checked, or the files are of before. What is wrong with a file is said by its own reader.
    """
    for file in [file for path in paths for file in (Path(path), results.facts_beside(path))]:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))[results.HEADER]["gate"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if found:
            forms.conform(file, found, forms.GATE, f"{results.HEADER}.gate")
            if not found["passed"]:
                tell(found)
            return found
    return None
