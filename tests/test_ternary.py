"""Ternary language neurons against their definition, written as plain loops, on random and on real counts."""

from __future__ import annotations

import heapq
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load_script, shared_dir
from test_identify import REAL, some_counts, with_experts, without_header, write_counts

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.measures import masks

script = load_script("lsn/identify.py")
ternary = script.ternary


class Slow:
    """The definition, one neuron after the other; sums are exact."""

    def __init__(self, rates: dict[tuple[int, int], list[float]], n_neurons: int, rate: float, quantile: float = 0.95):
        self.k = k = len(next(iter(rates.values())))
        every = sorted(p for row in rates.values() for p in row)
        self.tau = every[math.floor(Fraction(str(quantile)) * len(every)) - 1]
        self.norm = math.fsum(1 / i for i in range(1, k + 1)) / k
        self.n = {place: sum(p > self.tau for p in row) for place, row in rates.items()}
        self.budget = math.floor(Fraction(str(rate)) * n_neurons)
        self.parts = []
        for place, row in rates.items():
            if total := math.fsum(row):
                entropy = -math.fsum(p / total * math.log(p / total) for p in row if p)
                self.parts.append((entropy / math.log(k), max(row) / self.norm, place))
        low, high = 0.0, 0.2
        if self.general(high) == 0:
            low = high
        elif self.general(low):
            high = low
        while high - low > 1e-3:
            middle = (low + high) / 2
            low, high = (low, middle) if self.general(middle) else (middle, high)
        self.factor, self.chosen = low, sorted(self.lowest(low))

    def lowest(self, factor: float) -> list[tuple[int, int]]:
        scored = ((round(entropy - factor * strength, 12), place) for entropy, strength, place in self.parts)
        return [place for _, place in heapq.nsmallest(self.budget, scored)]

    def general(self, factor: float) -> int:
        return sum(self.n[place] == self.k for place in self.lowest(factor))

    def count(self, *wanted: int) -> int:
        return sum(self.n[place] in wanted for place in self.chosen)

    def agrees_with(self, numbers: dict, selected: list) -> None:
        assert [tuple(pair) for pair in selected] == self.chosen
        assert numbers["lambda"] == self.factor and numbers["bar"] == self.tau
        assert numbers["norm"] == pytest.approx(self.norm, rel=1e-15)
        assert numbers["classes"] == {
            "specific": self.count(1), "related": self.count(*range(2, self.k)), "without": self.count(0),
            "general": sum(n == self.k for n in self.n.values()),
        }  # fmt: skip


def rates_of(over_zero: dict, n: dict) -> dict[tuple[int, int], list[float]]:
    counts = [np.asarray(over_zero[lang]).tolist() for lang in over_zero]
    return {
        (layer, i): [one[layer][i] / n[lang] for one, lang in zip(counts, over_zero, strict=True)]
        for layer in range(len(counts[0])) for i in range(len(counts[0][0]))
    }  # fmt: skip


def found(over_zero: dict, n: dict, **rates):
    return ternary.select([np.asarray(x) for x in over_zero.values()], list(n.values()), list(over_zero), **rates)


def with_general(seed: int) -> tuple[dict, dict]:
    """Random counts of three to five languages with some neurons that fire in all of them, and most in one."""
    langs = ("en", "ga", "eu", "sw", "zu")[: 3 + seed % 3]
    over_zero, n = some_counts(seed, n_layers=4, width=60, langs=langs, high=(60, 4000)[seed % 2])
    for i in range(12):
        for lang in langs:
            over_zero[lang][0, i] = n[lang] - 1 if lang == "en" else n[lang] * (i + 2) // 24
    return over_zero, n


RATES = ((0.05, 0.95), (0.1, 0.7), (0.2, 0.5))


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_definition_on_random_counts(seed):
    over_zero, n = with_general(seed)
    p = rates_of(over_zero, n)
    for rate, quantile in RATES:
        slow = Slow(p, 240, rate, quantile)
        mine = found(over_zero, n, rate=rate, bar_rate=quantile)
        slow.agrees_with(mine.numbers, mine.selected.tolist())
        for g, lang in enumerate(n):
            above = [pair for pair in slow.chosen if p[pair][g] > slow.tau]
            assert [(layer, i) for layer, row in mine.mask[lang].items() for i in row] == above
        by_layer = mine.numbers["classes_by_layer"]
        assert by_layer["specific"] == [sum(slow.n[p] == 1 for p in slow.chosen if p[0] == i) for i in range(4)]
        assert by_layer["general"] == [sum(v == slow.k for p, v in slow.n.items() if p[0] == i) for i in range(4)]
        assert np.sum(mine.numbers["by_n"]) == len(mine.selected)


def test_lambda_is_at_times_inside_its_interval():
    """Else the tests of its search would be of its ends alone."""
    found_at = {found(*with_general(s), rate=r, bar_rate=q).numbers["lambda"] for s in range(8) for r, q in RATES}
    assert sum(0 < factor < 0.2 for factor in found_at) > 3


def test_lambda_is_the_largest_without_a_general_neuron():
    for bound in (0.0371, 0.1, 0.1999):
        factor, left = ternary.largest(lambda x, bound=bound: int(x > bound))
        assert left == 0 and factor <= bound < factor + 1e-3
    assert ternary.largest(lambda _: 0) == (0.2, 0)
    assert ternary.largest(lambda _: 7) == (0.0, 7)


def test_a_general_neuron_that_no_lambda_keeps_out_is_said(capsys):
    over_zero = {lang: np.full((1, 10), 50) for lang in ("en", "ga", "eu")}
    over_zero["en"][0, 3], over_zero["ga"][0, 3], over_zero["eu"][0, 3] = 90, 60, 60
    mine = found(over_zero, dict.fromkeys(over_zero, 100), rate=0.1, bar_rate=0.8)
    assert mine.numbers["lambda"] == 0 and mine.selected.tolist() == [[0, 3]]
    assert "with lambda 0 1 of 1" in capsys.readouterr().err


def test_experts_padding_and_neurons_that_never_fire(tmp_path, monkeypatch):
    """Rates of an expert's neuron are over its tokens; padding has no rate; what never fires is not selected."""
    monkeypatch.setattr(script.reporting, "draw", lambda *_: None)
    over_zero, n, routed, width = with_experts(1)
    for lang in n:
        over_zero[lang][1, :7] = 0
    rates = {}
    for layer, i in [(at, i) for at in range(3) for i in range(width[at])]:
        tokens = {lang: n[lang] if layer == 1 else int(routed[lang][layer][i // 20]) for lang in n}
        rates[layer, i] = [over_zero[lang][layer, i] / t if t else 0.0 for lang, t in tokens.items()]
    slow = Slow(rates, 150, 0.1, 0.9)
    folder = write_counts(tmp_path / "counts", over_zero, n)
    for lang in n:
        tensors = results.read_tensors(folder / f"tag.{lang}.pt")
        tensors |= {"routed": torch.tensor(routed[lang]), "width": torch.tensor(width)}
        results.write_tensors(folder / f"tag.{lang}.pt", tensors | {"snapshots_routed": torch.zeros(0, 3, 3)})
    flags = ["--method", "ternary", "-t", "tag", "-l", "en,ga,eu", "-a", str(folder), "-o", str(tmp_path)]
    script.main([*flags, "--rate", "0.1", "--bar-rate", "0.9"])
    report, _ = results.read_json(tmp_path / "tag.ternary.report.json")
    slow.agrees_with(report, slow.chosen)
    assert report["n_neurons"] == 150 and report["n_wanted"] == 15
    assert report["n_candidates"] == sum(max(row) > 0 for row in rates.values()) < 150
    mask = masks.read(tmp_path / "tag.ternary.json", "ga", 3, width)
    own = {(layer, i) for layer, row in mask.items() for i in row}
    assert own == {pair for pair in slow.chosen if rates[pair][1] > slow.tau}


def test_files_header_and_refusals(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    over_zero, n = some_counts(5, n_layers=4)
    header = {"models": {"model": {"spec": "org/n", "model_id": "org__n", "revision": "b"}}}
    write_counts(tmp_path / "activation_count", over_zero, n, snapshots=(1, 4), header=header)
    flags = ["-t", "tag", "-l", "en,ga,eu", "--rate", "0.1"]
    script.main(flags)
    before = {path.name: path.read_bytes() for path in Path("result").iterdir()}
    more = [*flags, "--method", "ternary", "--control-mask-out", "c.json", "--layers-out", "l.json"]
    script.main([*more, "--layers-lang", "ga", "--n-layers", "2"])
    assert {name: Path("result", name).read_bytes() for name in before} == before  # LAPE's own stay
    made = sorted(path.name for path in Path("result").iterdir() if path.name not in before)
    kinds = ("convergence", "counts", "overlap")
    figures = [f"tag.ternary.report-{kind}.{end}" for kind in kinds for end in ("pdf", "png")]
    assert made == sorted(["tag.ternary.json", "tag.ternary.report.json", *figures])
    _, head = results.read_json("result/tag.ternary.json", "lsn-mask")
    assert (head["method"], head["rates"]) == ("ternary", {"rate": 0.1, "bar_rate": 0.95})
    assert "method" not in results.read_json("result/tag.json")[1]
    assert (
        set(without_header(Path("c.json"))) == {"en", "ga", "eu"} and len(json.loads(Path("l.json").read_text())) == 2
    )
    report = without_header(Path("result/tag.ternary.report.json"))
    part = {lang: counts * 4 // 8 for lang, counts in over_zero.items()}
    part_n = {lang: n[lang] * 4 // 8 + 1 for lang in n}
    masks_of = [
        {(lang, layer, i) for lang, layers in one.mask.items() for layer, row in layers.items() for i in row}
        for one in (
            found(part, part_n, rate=0.1),
            found({x: over_zero[x] - part[x] for x in n}, {x: n[x] - part_n[x] for x in n}, rate=0.1),
        )
    ]
    jaccard = len(masks_of[0] & masks_of[1]) / len(masks_of[0] | masks_of[1])
    assert report["convergence"]["halves"]["jaccard"] == jaccard
    script.main([*more, "--layers-lang", "ga", "--n-layers", "2"])
    assert "finished (--overwrite" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"tag.ternary.json is of another request \(rates.bar_rate: 0.8 asked for"):
        script.main([*flags, "--method", "ternary", "--bar-rate", "0.8"])
    with pytest.raises(InputError, match="--filter-rate means nothing to --method ternary; leave it out"):
        script.main([*flags, "--method", "ternary", "--filter-rate", "0.8"])
    two = ["-t", "tag", "-l", "en,ga", "--method", "ternary", "-o", "two"]
    with pytest.raises(InputError, match=r"needs three languages or more, but got en and ga: of two, no neuron"):
        script.main(two)
    assert not Path("two").exists()


def test_the_real_counts_of_a_7b_model(tmp_path, monkeypatch):
    """Lambda, thresholds and class sizes as lsn/README.md states them, and as the definition has them."""
    folder = Path(shared_dir() or "nowhere") / "activation-counts"
    if not folder.is_dir():
        pytest.skip("no activation-counts/ in the shared folder beside the repository")
    monkeypatch.setattr(script.reporting, "draw", lambda *_: None)
    flags = ["-t", "mistral-7b-mgsm", "-l", ",".join(REAL), "-o", str(tmp_path), "-a", str(folder)]
    script.main(["--method", "ternary", *flags])
    read = {lang: torch.load(folder / f"mistral-7b-mgsm.{lang}.pt", weights_only=True) for lang in REAL}
    slow = Slow(rates_of({x: f["over_zero"] for x, f in read.items()}, {x: int(f["n"]) for x, f in read.items()}),
                32 * 14336, 0.01)  # fmt: skip
    report = without_header(tmp_path / "mistral-7b-mgsm.ternary.report.json")
    mask = {lang: masks.read(tmp_path / "mistral-7b-mgsm.ternary.json", lang, 32, 14336) for lang in REAL}
    slow.agrees_with(report, slow.chosen)
    owners = {}
    for layers in mask.values():
        for pair in ((layer, i) for layer, row in layers.items() for i in row):
            owners[pair] = owners.get(pair, 0) + 1
    assert owners == {pair: slow.n[pair] for pair in slow.chosen if slow.n[pair]}
    # No general neuron at lambda, and one a step further.
    assert slow.general(slow.factor) == 0 < slow.general(slow.factor + 1e-3)
    assert report["n_selected"] == slow.budget == 4587
    assert (report["lambda"], round(report["bar"], 7), round(report["norm"], 7)) == (0.1078125, 0.5450119, 0.2928968)
    assert report["classes"] == {"specific": 2386, "related": 1731, "without": 470, "general": 6740}
    assert report["n_neurons"] - report["n_candidates"] == 8
