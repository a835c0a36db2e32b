"""Whether a model retrieves better than its untrained twin: if not, its layers, its hub and everything built on them
mean nothing.

Step 1 measures the twin, step 2 writes the answer into the header of its file as `gate`, and every later step that
reads the layers passes it on.
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
MANY = 1000  # if the noise must shrink more than this, no realistic number of sentences suffices
POWER = 0.8416  # standard errors beyond the bound for a power of 80 %
# Header entries that a model and its twin must agree in.
ALIKE = ("n_layers", "base_lang", "target_lang", "margin_variant", "k", "special_tokens")


# --- the test ---


def at_best(hits: np.ndarray, seed: int) -> np.ndarray:
    """Hits [sentences] at the best state after the first one, chosen on the half that does not hold the sentence.

    Args:
        hits: 0/1 [states, sentences].
    """
    n = hits.shape[1]
    order, chosen_hits = np.random.default_rng(seed).permutation(n), np.zeros(n)
    halves = (order[: n // 2], order[n // 2 :]) if n > 1 else (order, order)
    for choose, read in (halves, halves[::-1]):
        chosen_hits[read] = hits[1 + hits[1:, choose].mean(1).argmax(), read]
    return chosen_hits


def compare(hits: np.ndarray, untrained: np.ndarray, seed: int = 42) -> dict:
    """Hits of a model at its best layer minus those of its untrained twin at its best hidden state.

    The model's best layer is chosen on one half of the sentences and evaluated on the other, both ways: the best of
    many looks good by chance on the sentences it was chosen on. A mean over layers would miss a model that retrieves in
    only a few of them. The twin's is chosen on the same sentences, which favours the twin, and may be h_0: what
    embeddings find without any training is not due to the layers.

    The interval is a bootstrap over sentences and ignores the variation between random initialisations. Hence the
    favour, and 99 %: of untrained models that differ only in the seed, 0 to 5 % then pass as better than another one.
    (With both chosen on the other half it is 6 to 13 % at 95 %. Measured on a byte-level Llama of 4 layers of width 64,
    500 and 1,004 sentences of SIB-200 in English with French and with Basque, all pairs of 16 and 12 seeds.)

    Args:
        hits, untrained: 0/1 [L+1, sentences], over the same sentences.

    Returns:
        `passed` (the interval is above 0), `difference, ci_low, ci_high, level`, the two accuracies that it is the
        difference of, `accuracy` and `untrained_accuracy`, and `n` sentences.
    """
    trained = at_best(hits, seed)
    twin = untrained[untrained.mean(1).argmax()]
    low, high = stats.bootstrap_mean(trained - twin, seed, level=LEVEL)
    return {
        "passed": low > 0,
        "difference": float((trained - twin).mean()),
        "ci_low": low,
        "ci_high": high,
        "level": LEVEL,
        "accuracy": float(trained.mean()),
        "untrained_accuracy": float(twin.mean()),
        "n": len(trained),
    }


def words(found: dict) -> str:
    """The outcome in one line."""
    model = found["model"]
    interval = f"[{found['ci_low']:+.3f}, {found['ci_high']:+.3f}]"
    numbers = f"{found['difference']:+.3f} {interval} at {found['level']:.0%}, {found['n']} sentences"
    numbers += f", by {found['measure']}" if "measure" in found else ""
    if found["passed"]:
        return f"{model} retrieves better than its untrained twin ({numbers})"
    line = (
        f"{model} does not retrieve clearly better than its untrained twin ({numbers}): its layers, its hub and "
        "everything built on them mean nothing"
    )
    needed = sentences_needed(found)
    return line + (f"; a difference of this size would be clear with some {needed:,} sentences" if needed else "")


def sentences_needed(found: dict) -> int | None:
    """How many sentences would show a difference of the observed size with a power of 80 %, to two digits; None if it
    is not above 0, or its noise cannot be told from the interval."""
    difference, half, level = found["difference"], found["difference"] - found["ci_low"], found["level"]
    if not (difference > 0 and 0 < half < math.inf and 0 < level < 1 and found["n"] > 0):  # files may hold anything
        return None
    ratio = half / difference * (1 + POWER / statistics.NormalDist().inv_cdf((1 + level) / 2))
    if ratio > MANY:
        return None
    needed = found["n"] * ratio**2
    unit = 10 ** max(0, len(str(math.ceil(needed))) - 2)
    return math.ceil(needed / unit) * unit


def tell(*found: dict) -> None:
    """Print one line for the models that pass and one for the others, each with the numbers of the closest case."""
    for passed in (True, False):
        alike = [one for one in found if one["passed"] is passed]
        if not alike:
            continue
        nearest = min(alike, key=lambda one: abs(one["ci_low"]))
        others = [one["model"] for one in alike if one is not nearest]
        (cli.say if passed else cli.warn)(words(nearest) + cli.likewise(others))


# --- files ---


def of_results(path: Path, untrained: Path, model: str, seed: int, measure: str = "published") -> dict:
    """`compare` for two retrieval results, with the hits in the `.pt` beside each, plus the names of both sides, and of
    the measure if it is not the published one."""
    key = curves.MEASURES[measure].hits
    hits = [results.read_tensors(file.with_suffix(".pt"))[key].numpy() for file in (path, untrained)]
    gate = {"model": model, **compare(*hits, seed), "untrained": untrained}
    return gate if measure == "published" else gate | {"measure": measure}


def twin_beside(path: Path, header: dict) -> Path | None:
    """The result of the untrained twin beside the retrieval result `path`; None if there is none.

    It must have the model's configuration and the same sentences; any name will do.
    """
    model = (header.get("models") or {}).get("model")
    expected = path.with_name(f"untrained.{path.name}")
    for file in dict.fromkeys([expected, *sorted(path.parent.glob("untrained*.json"))]) if model else ():
        if not (file.is_file() and file.with_suffix(".pt").is_file()):
            continue
        _, other = results.read_json(file, RETRIEVAL, allow_limited=True)
        twin_config = (other.get("models") or {}).get("untrained_like")
        sentences = [(head.get("data") or {}).get("pairs_sha256") for head in (header, other)]
        alike = sentences[0] == sentences[1] and all(header.get(key) == other.get(key) for key in ALIKE)
        if not (twin_config and alike):
            continue
        # Older headers have only the second hash; for a model on the hub neither is known, and the number of layers
        # must suffice.
        known = model.get("untrained_sha256"), model.get("config_sha256")
        hashes = identity.shape_hash(identity.untrained_like(twin_config)), identity.shape_hash(twin_config)
        if not any(known) or any(map(operator.eq, known, hashes)):
            return file
    return None


def carried(*paths: str | os.PathLike) -> dict | None:
    """The first `gate` in the headers of these steps' files, for the header of the next step; prints a failed one.

    None: it was not checked, or the files are older. Faults of a file are reported by its own reader.
    """
    for file in [file for path in paths for file in (Path(path), results.facts_beside(path))]:
        try:
            gate = json.loads(file.read_text(encoding="utf-8"))[results.HEADER]["gate"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if gate:
            forms.conform(file, gate, forms.GATE, f"{results.HEADER}.gate")
            if not gate["passed"]:
                tell(gate)
            return gate
    return None
