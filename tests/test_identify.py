"""LAPE against its definition, written as plain loops; the mask's companions; and counts that are refused."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, failed_gate, load_script, save_run, save_tiny, shared_dir

from cpt_utils.base import experiments, figures, results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.measures import counts as activations
from cpt_utils.measures import masks

script = load_script("lsn/identify.py")
REAL = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "th", "zh")


def by_definition(over_zero: dict, n: dict, rate: float = 0.01, quantile: float = 0.95) -> dict:
    """The mask from the definition, one neuron after the other. Sums are exact, so equal entropies are equal."""
    langs = list(over_zero)
    counts = {lang: over_zero[lang].tolist() for lang in langs}
    n_layers, width = over_zero[langs[0]].shape
    every = sorted(count / n[lang] for lang in langs for row in counts[lang] for count in row)
    bar = every[math.floor(quantile * len(every)) - 1]
    candidates = []
    for layer in range(n_layers):
        for neuron in range(width):
            p = [counts[lang][layer][neuron] / n[lang] for lang in langs]
            if max(p) > bar:
                total = math.fsum(p)
                entropy = -math.fsum(x / total * math.log(x / total) for x in p if x > 0)
                candidates.append((round(entropy, 12), layer, neuron))
    mask = {lang: {layer: [] for layer in range(n_layers)} for lang in langs}
    for _, layer, neuron in sorted(candidates)[: math.floor(rate * n_layers * width)]:
        for lang in langs:
            if counts[lang][layer][neuron] / n[lang] > bar:
                mask[lang][layer].append(neuron)
    return {lang: {layer: sorted(found) for layer, found in layers.items()} for lang, layers in mask.items()}


def lape(over_zero: dict, n: dict, **rates):
    return script.lape.select([np.asarray(x) for x in over_zero.values()], list(n.values()), list(over_zero), **rates)


@pytest.mark.figures
def test_languages_without_neurons_have_a_figure_of_their_overlap(tmp_path):
    """Jaccard is undefined then: None off the diagonal."""
    shared = {"languages": ["en", "ga"], "jaccard": [[None, None], [None, None]], "shared": [[0, 0], [0, 0]]}
    script.reporting.draw_overlap(tmp_path / "overlap", shared)
    assert (tmp_path / "overlap.png").stat().st_size > 1000


def some_counts(seed: int, n_layers=3, width=40, langs=("en", "ga", "eu"), high=60) -> tuple[dict, dict]:
    """Random counts with many zeros and ties, of a different number of tokens for each language."""
    draw = np.random.default_rng(seed)
    n = {lang: int(draw.integers(high, 3 * high)) for lang in langs}
    skew = {lang: draw.beta(0.3, 1.5, (n_layers, width)) for lang in langs}
    return {lang: draw.binomial(n[lang], skew[lang]) for lang in langs}, n


def write_counts(folder: Path, over_zero: dict, n: dict, tag="tag", snapshots=(), header=None) -> Path:
    """Files as lsn/activation.py writes them; without `header` those of the published scripts (int32, no header)."""
    folder.mkdir(parents=True, exist_ok=True)
    for lang, counts in over_zero.items():
        tensors = {"n": n[lang], "over_zero": torch.tensor(np.asarray(counts), dtype=torch.int32)}
        if header is not None:
            facts = {"language": lang} | (header(lang) if callable(header) else header)
            tensors["over_zero"] = tensors["over_zero"].long()
            tensors["header"] = json.dumps(results.plain(results.header(activations.SCHEMA, **facts)))
            parts = [np.asarray(counts) * k // 8 for k in snapshots]
            tensors["snapshots_n"] = torch.tensor([n[lang] * k // 8 + 1 for k in snapshots], dtype=torch.long)
            tensors["snapshots"] = torch.tensor(np.array(parts), dtype=torch.long)
        results.write_tensors(folder / f"{tag}.{lang}.pt", tensors)
    return folder


@pytest.fixture
def no_figure(monkeypatch):
    monkeypatch.setattr(script.reporting, "draw", lambda *_: None)


def command(folder: Path, *more, langs="en,ga,eu") -> None:
    script.main([*["-t", "tag", "-l"], langs, "-a", str(folder), "--rate", "0.1", *map(str, more)])


def without_header(path: Path) -> dict:
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "_header"}


# ---------------------------------------------------------------- the method


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_definition_on_random_counts(seed):
    over_zero, n = some_counts(seed, high=(4, 60, 4000)[seed % 3])
    for rate, quantile in ((0.1, 0.95), (0.01, 0.95), (0.3, 0.8), (1.0, 0.5)):
        found = lape(over_zero, n, rate=rate, filter_rate=quantile)
        assert found.mask == by_definition(over_zero, n, rate, quantile)
        assert len(found.selected) <= found.n_wanted == math.floor(rate * 120)


def with_experts(seed: int) -> tuple[dict, dict, dict, list[int]]:
    """Counts of a model whose layers 0 and 2 have 3 experts of 20 neurons, and whose layer 1 has 30: over_zero, n,
    routed, width. Expert 2 of layer 2 gets no token of ga, expert 0 of layer 0 none at all."""
    draw, langs = np.random.default_rng(seed), ("en", "ga", "eu")
    width, over_zero, routed = [60, 30, 60], {}, {}
    n = {lang: int(draw.integers(100, 300)) for lang in langs}
    for lang in langs:
        over_zero[lang], routed[lang] = np.zeros((3, 60), int), np.zeros((3, 3), int)
        for layer in (0, 2):
            routed[lang][layer] = [0, n[lang], n[lang] - 7] if layer == 0 else [n[lang], 40, 0 if lang == "ga" else 50]
        for layer, neurons in enumerate(width):
            for i in range(neurons):
                tokens = n[lang] if layer == 1 else routed[lang][layer][i // 20]
                over_zero[lang][layer, i] = draw.binomial(tokens, draw.beta(0.3, 1.5))
    return over_zero, n, routed, width


@pytest.mark.parametrize("seed", range(3))
def test_experts_by_definition(seed, tmp_path, no_figure):
    """Rates are over the tokens routed to the neuron's expert, and padding is no neuron."""
    over_zero, n, routed, width = with_experts(seed)
    rates = {}  # (layer, neuron) -> rate by language
    for layer, i in [(at, i) for at in range(3) for i in range(width[at])]:
        tokens = {lang: n[lang] if layer == 1 else int(routed[lang][layer][i // 20]) for lang in n}
        rates[layer, i] = {lang: over_zero[lang][layer, i] / t if t else 0.0 for lang, t in tokens.items()}
    every = sorted(rate for row in rates.values() for rate in row.values())
    bar = every[math.floor(0.9 * len(every)) - 1]
    order = []
    for place, row in rates.items():
        if max(row.values()) > bar:
            shares = [rate / math.fsum(row.values()) for rate in row.values() if rate]
            order.append((round(-math.fsum(x * math.log(x) for x in shares), 12), *place))
    chosen = [place for _, *place in sorted(order)[: math.floor(0.1 * 150)]]
    expected = {
        lang: {layer: sorted(i for at, i in chosen if at == layer and rates[at, i][lang] > bar) for layer in range(3)}
        for lang in n
    }
    folder = write_counts(tmp_path / "counts", over_zero, n)
    for lang in n:
        tensors = results.read_tensors(folder / f"tag.{lang}.pt")
        half = {"snapshots_n": torch.tensor([n[lang] // 2]), "snapshots": tensors["over_zero"][None] // 2}
        half["snapshots_routed"] = torch.tensor((routed[lang] + 1) // 2)[None]
        tensors |= {"routed": torch.tensor(routed[lang]), "width": torch.tensor(width), **half}
        results.write_tensors(folder / f"tag.{lang}.pt", tensors)
    flags = ["-t", "tag", "-l", "en,ga,eu", "-a", str(folder), "-o", str(tmp_path / "out"), "--rate", "0.1"]
    script.main([*flags, "--filter-rate", "0.9", "--control-mask-out", str(tmp_path / "out/control.json")])
    found, header = results.read_json(tmp_path / "out/tag.json")
    assert {lang: {int(i): x for i, x in layers.items()} for lang, layers in found.items()} == expected
    assert header["ffn_width"] == 60
    report, _ = results.read_json(tmp_path / "out/tag.report.json")
    assert (report["n_neurons"], report["n_wanted"], report["filter_bar"]) == (150, 15, bar)
    for lang in n:  # of the control, too, no neuron is padding
        masks.read(tmp_path / "out/control.json", lang, 3, width)


def test_counts_of_experts_that_are_refused(tmp_path):
    over_zero, n, routed, width = with_experts(0)
    folder = write_counts(tmp_path, over_zero, n)

    def fails(message, *langs, **changes):
        for lang in n:
            tensors = results.read_tensors(folder / f"tag.{lang}.pt")
            tensors |= {"routed": torch.tensor(routed[lang]), "width": torch.tensor(width)}
            tensors |= {"snapshots_routed": torch.zeros(0, 3, 3, dtype=torch.long)}
            results.write_tensors(folder / f"tag.{lang}.pt", tensors | (changes if lang in langs else {}))
        with pytest.raises(InputError, match=message):
            activations.refuse_mixed([activations.read(folder / f"tag.{lang}.pt", lang) for lang in n])

    message = "its experts' tokens do not fit its counts"
    fails(message, "ga", routed=torch.tensor(routed["ga"]) // 2)
    fails(message, "ga", width=torch.tensor([60, 30, 59]))
    fails(message, "ga", width=torch.tensor([60, 20, 60]))  # counts in the padding
    fails(message, "ga", snapshots_routed=torch.zeros(2, 3, 3, dtype=torch.long))
    fails("differ in experts", "ga", width=torch.tensor([60, 40, 60]))


def test_ties_go_to_the_lower_layer_and_neuron():
    # Every neuron is permuted from the same three rates, so all entropies are equal but for rounding.
    draw = np.random.default_rng(0)
    rates = np.array([draw.permutation([70, 20, 10]) for _ in range(40)]).reshape(2, 20, 3)
    over_zero = {lang: rates[..., g] for g, lang in enumerate(("en", "ga", "eu"))}
    found = lape(over_zero, dict.fromkeys(over_zero, 100), rate=0.3, filter_rate=0.6)
    assert found.selected.tolist() == [[0, neuron] for neuron in range(12)]
    # The same shares at another scale tie as well.
    rates[0, 3] = [35, 10, 5]
    over_zero = {lang: rates[..., g] for g, lang in enumerate(("en", "ga", "eu"))}
    found = lape(over_zero, dict.fromkeys(over_zero, 100), rate=0.3, filter_rate=0.6)
    assert found.selected.tolist() == [[0, neuron] for neuron in range(12)]
    # Languages in another order: the same mask.
    turned = lape(dict(reversed(over_zero.items())), dict.fromkeys(over_zero, 100), rate=0.3, filter_rate=0.6)
    assert {lang: turned.mask[lang] for lang in found.mask} == found.mask


def test_a_language_without_neurons_and_neurons_that_never_fire():
    over_zero, n = some_counts(1)
    over_zero["eu"][:] = over_zero["eu"].min()
    over_zero["eu"][0, :5] = 0
    for lang in over_zero:
        over_zero[lang][1, :30] = 0
    found = lape(over_zero, n, rate=0.2, filter_rate=0.9)
    assert found.mask == by_definition(over_zero, n, 0.2, 0.9)
    assert found.mask["eu"] == {0: [], 1: [], 2: []}
    # Where almost nothing fires the bar is zero, and a rate of zero is not above it.
    sparse = {lang: np.zeros((2, 50), int) for lang in ("en", "ga")}
    sparse["en"][1, 7] = 3
    found = lape(sparse, {"en": 10, "ga": 20}, rate=0.5)
    assert found.numbers["bar"] == 0 and found.n_candidates == 1 and found.n_wanted == 50
    assert found.mask == {"en": {0: [], 1: [7]}, "ga": {0: [], 1: []}}


def test_rates_are_decimals_and_ranks_are_floored():
    shares = ((0.29, 100, 29), (0.95, 20, 19), (0.01, 199, 1), (1.0, 7, 7), (1e-5, 200_000, 2))
    assert all(script.lape.share(rate, size) == found for rate, size, found in shares)
    values = np.arange(1.0, 11.0)
    assert (
        script.lape.kth_smallest(values, 0.95, "--filter-rate") == 9 and script.lape.kth_smallest(values, 1, "") == 10
    )
    with pytest.raises(InputError, match=r"--filter-rate 0.05 of 10 rates is rank 0"):
        script.lape.kth_smallest(values, 0.05, "--filter-rate")
    over_zero, n = some_counts(3)
    with pytest.raises(InputError, match=r"--rate 0.001 of 120 neurons is less than one; give --rate 0.0084 or more"):
        lape(over_zero, n, rate=0.001)
    # A bar of its own for belonging to a language: the same neurons, in fewer languages.
    one = lape(over_zero, n, rate=0.3, filter_rate=0.7)
    two = lape(over_zero, n, rate=0.3, filter_rate=0.7, bar_rate=0.95)
    assert (one.selected == two.selected).all() and two.numbers["bar"] > one.numbers["bar"]
    assert all(set(two.mask[lang][i]) <= set(one.mask[lang][i]) for lang in n for i in range(3))


def test_all_ten_languages_of_a_7b_model_equal_the_definition(tmp_path, no_figure, capsys):
    folder = Path(shared_dir() or "nowhere") / "activation-counts"
    if not folder.is_dir():
        pytest.skip("no activation-counts/ in the shared folder beside the repository")
    more = ("--control-mask-out", str(tmp_path / "c.json"), "-o", str(tmp_path), "-a", str(folder))
    script.main(["-t", "mistral-7b-mgsm", "-l", ",".join(REAL), *more])
    files = {lang: torch.load(folder / f"mistral-7b-mgsm.{lang}.pt", weights_only=True) for lang in REAL}
    slow = by_definition({x: f["over_zero"] for x, f in files.items()}, {x: int(f["n"]) for x, f in files.items()})
    path = tmp_path / "mistral-7b-mgsm.json"
    for lang in REAL:
        assert masks.read(path, lang, 32, 14336) == slow[lang]
        control = masks.read(tmp_path / "c.json", lang, 32, 14336, control=True)
        assert [len(control[layer]) for layer in control] == [len(slow[lang][layer]) for layer in slow[lang]]
        assert not any(set(control[i]) & set(slow[other][i]) for other in REAL for i in range(32))
    report = without_header(tmp_path / "mistral-7b-mgsm.report.json")
    assert report["n_selected"] == 4587 and report["convergence"] is None
    assert sum(report["selected_by_n_languages"].values()) == 4587 and report["selected_by_n_languages"]["0"] == 0
    assert capsys.readouterr().err.count("warning") == 1  # no header: once for all files


# ---------------------------------------------------------------- files


@pytest.mark.figures
def test_mask_control_layers_report_and_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    over_zero, n = some_counts(5, n_layers=4)
    model = {"spec": "org/name", "model_id": "org__name", "step": None, "revision": "a" * 40}
    header = {"models": {"model": model}, "tokens": {"text": {"file": "x.txt"}, "vocabulary_sha256": "t"}}
    write_counts(tmp_path / "activation_count", over_zero, n, snapshots=(1, 2, 4), header=header)
    more = ["--control-mask-out", "c.json", "--layers-out", "l.json", "--layers-lang", "gle_Latn", "--n-layers", "2"]
    arguments = ["-t", "tag", "-l", "en,ga,eu", "--rate", "0.1", "--seed", "3", *more]
    script.main(arguments)
    out = capsys.readouterr()
    slow = by_definition(over_zero, n, 0.1)
    raw = json.loads(Path("result/tag.json").read_text())
    head = raw.pop("_header")
    assert raw == {lang: {str(layer): found for layer, found in layers.items()} for lang, layers in slow.items()}
    assert head["languages"] == {"en": "eng_Latn", "ga": "gle_Latn", "eu": "eus_Latn"}
    assert (head["schema"], head["n_layers"], head["ffn_width"], head["control"]) == ("lsn-mask", 4, 40, False)
    assert head["models"]["model"] == model and head["tokens"]["ga"]["n_tokens"] == n["ga"]
    assert head["tokens"]["ga"]["tokens"]["vocabulary_sha256"] == "t"
    assert head["rates"] == {"rate": 0.1, "filter_rate": 0.95, "bar_rate": 0.95}
    assert without_header(Path("c.json")) == {
        lang: {str(layer): found for layer, found in layers.items()}
        for lang, layers in masks.random_control(slow, 4, 40, 3).items()
    }

    # A bare list, which the published ffn_lsn_swap.py reads, and its facts beside it.
    layers, head = results.read_json("l.json", "lsn-layers", n_layers=4)
    assert json.loads(Path("l.json").read_text()) == layers["layers"] and head["models"]["model"] == model
    sizes = [len(slow["ga"][layer]) for layer in range(4)]
    assert layers["counts"] == sizes and layers["language"] == "ga"
    assert layers["layers"] == sorted(sorted(range(4), key=lambda layer: -sizes[layer])[:2])
    report = without_header(Path("result/tag.report.json"))
    assert report["languages"]["ga"]["counts"] == sizes and report["languages"]["en"]["n_tokens"] == n["en"]
    ours = [{(i, x) for i in range(4) for x in slow[lang][i]} for lang in slow]
    assert report["overlap"]["shared"][0][2] == len(ours[0] & ours[2])
    alone = ours[1] - ours[0] - ours[2]
    assert sum(report["languages"]["ga"]["own"]) == len(alone)
    assert out.err.count("so chance decides part of the mask") == 3 and "standard error of up to 0.0" in out.err
    figs = sorted(path.name for path in Path("result").glob("*.p*"))
    assert figs == [f"tag.report-{x}.{end}" for x in ("convergence", "counts", "overlap") for end in ("pdf", "png")]

    written = {path: path.read_bytes() for path in [*Path("result").iterdir(), Path("c.json"), Path("l.json")]}
    script.main(arguments)
    assert "finished (--overwrite redoes them)" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in written.items())
    Path("c.json").unlink()  # one is missing: all are made again, to the same bytes but for the command and the time
    script.main(arguments)
    for path, content in written.items():
        now = path.read_bytes()
        if path.suffix == ".json":
            now, content = (json.loads(x) for x in (now, content))
        if isinstance(now, dict):
            assert now["_header"].pop("time") and content["_header"].pop("time")
        assert now == content, path
    told = r"tag.json is of another request \(rates.rate: 0.2 asked for, 0.\d+ in the file\); give --overwrite"
    with pytest.raises(InputError, match=told):
        script.main([*arguments, "--rate", "0.2"])
    script.main([*arguments, "--rate", "0.2", "--overwrite"])
    Path("l.json").write_text("{}")
    with pytest.raises(InputError, match=r"l.json is of another request \(how the file was made is not known\)"):
        script.main([*arguments, "--rate", "0.2"])
    # The figures come from the report alone.
    assert [path.name for path in script.reporting.draw(Path("again"), json.loads(json.dumps(report)))][
        -1
    ] == "again-convergence"
    assert Path("again-counts.png").stat().st_size > 1000
    assert figures.colours(3)[0] == figures.colours(10)[0]


def test_convergence_is_that_of_masks_from_the_snapshots(tmp_path, no_figure, capsys):
    over_zero, n = some_counts(9, n_layers=4, width=60, high=4000)
    header = {"models": {"model": {"spec": "org/n", "model_id": "org__n", "revision": "b"}}}
    folder = write_counts(tmp_path, over_zero, n, snapshots=(1, 4), header=header)
    command(folder, "-o", tmp_path)
    found = without_header(tmp_path / "tag.report.json")["convergence"]

    def pairs(mask):
        return {lang: {(i, x) for i in mask[lang] for x in mask[lang][i]} for lang in mask}

    full = pairs(by_definition(over_zero, n, 0.1))
    part = {lang: counts * 4 // 8 for lang, counts in over_zero.items()}
    part_n = {lang: n[lang] * 4 // 8 + 1 for lang in n}
    half = pairs(by_definition(part, part_n, 0.1))
    rest = pairs(by_definition({x: over_zero[x] - part[x] for x in n}, {x: n[x] - part_n[x] for x in n}, 0.1))
    for ours, other, told in ((half, full, found["against_full"][1]), (half, rest, found["halves"])):
        for lang in n:
            assert told["languages"][lang] == len(ours[lang] & other[lang]) / len(ours[lang] | other[lang])
        shared = sum(len(ours[lang] & other[lang]) for lang in n)
        assert told["jaccard"] == shared / sum(len(ours[lang] | other[lang]) for lang in n)
    assert found["against_full"][1]["tokens"] == part_n and len(found["against_full"]) == 2
    assert found["halves"]["tokens_second"] == {lang: n[lang] - part_n[lang] for lang in n}
    # Here counts grow in proportion: an eighth of the tokens says it all.
    assert found["enough"]["tokens"] == found["against_full"][0]["tokens"]
    assert "fewer tokens would have been enough: 1/8 of them" in capsys.readouterr().out
    found["enough"] = None
    script.reporting.say_convergence(found)
    assert "parts of the tokens do not give this mask with a Jaccard of 0.9" in capsys.readouterr().out


def test_published_files_and_a_language_that_gets_none(tmp_path, no_figure, capsys):
    over_zero, n = some_counts(1)
    over_zero["eu"][:] = 1
    n["en"] = max(n.values()) * 9
    command(write_counts(tmp_path, over_zero, n), "-o", tmp_path / "out", "--layers-out", tmp_path / "l.json",
            "--layers-lang", "eu", "--n-layers", 2)  # fmt: skip
    path = tmp_path / "out" / "tag.json"
    assert without_header(path)["eu"] == {"0": [], "1": [], "2": []}
    assert masks.read(path, "en", 3, 40) == by_definition(over_zero, n, 0.1)["en"]
    assert json.loads((tmp_path / "l.json").read_text()) == [0, 1]
    err = capsys.readouterr().err
    assert "no header in tag.en.pt and 2 more: model, tokenizer and text are taken on trust" in err
    assert "eu gets no neurons, only an empty entry in the mask" in err
    assert "eu has no neurons in layers [0, 1]: only 0 layers have any" in err
    assert re.search(r"en has [\d.]+ times the tokens of (ga|eu) \([\d,]+ and \d+\), whose rates are noisier", err)
    assert not list(tmp_path.rglob("*control*"))  # outside a study on request only


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    over_zero, n = some_counts(2)
    model = {"spec": "org/n", "model_id": "org__n", "revision": "b"}
    folder = tmp_path / "counts"

    def fails(message, *more, langs="en,ga,eu"):
        with pytest.raises(InputError, match=message) as error:
            command(folder, "-o", tmp_path / "out", *more, langs=langs)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists() and not (tmp_path / "c.json").exists()

    def files(**changes):
        for path in folder.glob("*.pt"):
            path.unlink()
        write_counts(folder, over_zero, n, header=lambda lang: {"models": {"model": model}} | changes.get(lang, {}))

    def change(lang, **tensors):
        path = folder / f"tag.{lang}.pt"
        results.write_tensors(path, results.read_tensors(path) | tensors)

    fails("counts does not exist; run lsn/activation.py first, or give -a")
    folder.mkdir()
    fails(r"counts has no counts tag.<lang>.pt; run lsn/activation.py first")
    files()
    fails(r"nothing for fr \(fra_Latn\); there is en, eu, ga", langs="en,fr")
    fails("-l .* names no language; give codes like en,ga", langs=",")
    fails("-l en: neurons of one language .*: python lsn/identify.py -t tag -l en,eu,ga -a .*counts", langs="en,")
    fails("give all that were counted: python lsn/identify.py -t tag -l ga,en,eu", langs="gle_Latn")
    fails("ga and gle_Latn are one language", langs="ga,gle_Latn")
    fails("no counts other.<lang>.pt; its tags are tag: give one with -t", "-t", "other")
    fails("--rate .study key lsn.rate. is 1.5; give a share above 0 and at most 1", "--rate", "1.5")
    fails("--filter-rate is 0.0; give a share", "--filter-rate", "0")
    fails("--bar-rate is 2.0; give a share", "--bar-rate", "2")
    fails("nothing says languages target: give --layers-lang", "--layers-out", "c.json")
    fails("nothing for fr", "--layers-out", "c.json", "--layers-lang", "fr", "--n-layers", "1")
    wanted = ["--layers-out", "c.json", "--layers-lang", "en"]
    fails("4 layers asked for, but the model has 3", *wanted, "--n-layers", "4")
    fails("nothing says where the result of layer-specialize/layer_specialize.py is: give --n-layers", *wanted)
    fails("two results would go to the same file", "--control-mask-out", tmp_path / "out" / "tag.json")
    files(ga={"models": {"model": model | {"spec": "org/other", "model_id": "org__other"}}})
    fails(r"counts of different models: tag.en.pt is of org/n, tag.ga.pt of org/other; count every language with")
    files(ga={"models": {"model": model | {"revision": "c"}}})
    fails(r"counts of different models: tag.en.pt is of org/n, tag.ga.pt of org/n \(trained again\)")
    files(en={"tokens": {"vocabulary_sha256": "x"}}, eu={"tokens": {"vocabulary_sha256": "y"}})
    fails(r"tag.en.pt and tag.eu.pt come from tokens of different tokenizers; run lsn/load_oscar.py")
    files(ga={"language": "eus_Latn"})
    fails(r"tag.ga.pt counts eus_Latn, not ga")
    files(ga={"limit": 3})
    fails(r"tag.ga.pt was made with --limit 3")
    files()
    change("ga", header=json.dumps({"schema": "token-ids"}))
    fails(r"tag.ga.pt holds 'token-ids', not 'activation-counts'")
    files()
    change("ga", over_zero=torch.zeros(2, 40, dtype=torch.long), snapshots=torch.zeros(0, 2, 40))
    fails(r"counts of different models: tag.en.pt has 3 layers of 40 neurons, tag.ga.pt has 2 of 40")
    for tensors, message in (
        ({"n": 0}, "counts 0 tokens"),
        ({"n": 1}, r"a neuron is active on \d+ of 1 tokens"),
        ({"over_zero": torch.zeros(5)}, r"over_zero is \[5\], not \[layers, neurons\]"),
        ({"over_zero": "x"}, "has no counts"),
        ({"header": "[1]"}, r"header is \[1\], not a mapping"),
        ({"header": '{"models": {"model": 5}}'}, "header.models.model is 5, not a mapping"),
        ({"snapshots_n": torch.tensor([1])}, "its snapshots are not parts of its counts"),
    ):
        files()
        change("eu", **tensors)
        fails(rf"tag.eu.pt:? {message}")
    (folder / "tag.eu.pt").write_bytes(b"x")
    fails(r"tag.eu.pt cannot be read as tensors")
    files()
    # Nowhere to draw a control from: every neuron of layer 0 belongs to someone.
    crowded = {lang: np.zeros((3, 40), int) for lang in n}
    crowded["en"][0, :20] = crowded["ga"][0, 20:] = 50
    write_counts(folder, crowded, n)
    fails("layer 0 has 0 of 40 neurons outside the mask, but the control of en needs 20",
          "--rate", "0.5", "--filter-rate", "0.5", "--control-mask-out", "c.json")  # fmt: skip


def study(tmp_path, monkeypatch) -> dict:
    """A study in the current folder with a base, a run of two checkpoints, counts of the last one, and its layers."""
    monkeypatch.chdir(tmp_path)
    save_tiny("llama", tmp_path / "base", tokenizer=False)
    save_run("llama", tmp_path / "run", (1, 2), tokenizer=False)
    last = refs.model("run/checkpoint-2").describe()
    over_zero, n = some_counts(4, width=48)
    write_counts(
        tmp_path / "results" / experiments.result("lsn_counts"),
        over_zero,
        n,
        "small",
        header={"models": {"model": last}},
    )
    values = {
        "name": "small", "base": "base", "run": "run", "results": "results", "seed": 5,
        "languages": {"base": "eng_Latn", "target": "gle_Latn", "lsn": ["en", "ga", "eu"]},
        "lsn": {"rate": 0.1},
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(json.dumps(values))
    return by_definition(over_zero, n, 0.1)


def layers_file(interface, **facts) -> None:
    payload = {"interface_layers": interface, "semantic_layers": [1]}
    path = Path("results") / experiments.result("layers")
    results.write_json(path, payload, results.header("layer-specialize", **({"n_layers": 3} | facts)))


def test_without_arguments_in_a_study(tmp_path, monkeypatch, no_figure):
    mask = study(tmp_path, monkeypatch)
    with pytest.raises(InputError, match=r"layers.json does not exist; run layer-specialize/layer_specialize.py first"):
        script.main([])
    layers_file([0, 2], models={"model": refs.model("run/checkpoint-2").describe()})
    script.main([])
    made = {
        step: Path("results") / experiments.result(f"lsn_{step}").format(name="small")
        for step in ("mask", "control", "layers")
    }
    models = [refs.model("base").describe(), refs.model("run/checkpoint-1").describe()]
    assert masks.read(made["mask"], "ga", 3, 48, models, control=False) == mask["ga"]
    assert masks.read(made["control"], "ga", 3, 48, models, True) == masks.random_control(mask, 3, 48, 5)["ga"]
    layers, header = results.read_json(made["layers"], "lsn-layers", n_layers=3)
    assert len(layers["layers"]) == 2 and layers["language"] == "ga"
    assert header["models"]["model"]["spec"] == "run/checkpoint-2"
    # Another number of layers, and another folder for all of it.
    script.main(["-o", "elsewhere", "--n-layers", "1"])
    names = [f"small{part}.json" for part in (".control", "", ".layers.facts", ".layers", ".report")]
    assert sorted(path.name for path in Path("elsewhere").iterdir()) == names
    assert len(json.loads(Path("elsewhere/small.layers.json").read_text())) == 1


def test_counts_where_the_published_readme_has_them_written(tmp_path, monkeypatch, no_figure, capsys):
    """`activation.py -s activation_count`, then `identify.py -t TAG -l ..`, in a folder with a study.yaml."""
    study(tmp_path, monkeypatch)
    layers_file([0, 2])
    place = Path("results") / experiments.result("lsn_counts")
    over_zero, n = some_counts(4, width=48)
    at_step_1 = {"models": {"model": refs.model("run/checkpoint-1").describe()}}
    write_counts(tmp_path / "activation_count", over_zero, n, "hand", header=at_step_1)
    script.main(["-t", "hand", "-l", "en,ga,eu"])
    assert "has no counts hand.<lang>.pt; using those in activation_count" in capsys.readouterr().out
    out = Path("results") / "lsn" / "result"
    assert masks.read(out / "hand.json", "ga", 3, 48) == by_definition(over_zero, n, 0.1)["ga"]
    # With the study's own tag: its own counts first, then those by hand; another model's have another place.
    place.rename(place.with_name("aside"))
    write_counts(tmp_path / "activation_count", over_zero, n, "small", header=at_step_1)
    script.main([])
    assert not (out / "small.json").exists() and (out / "small.run__checkpoint-1.json").is_file()
    last = {"models": {"model": refs.model("run/checkpoint-2").describe()}}
    write_counts(tmp_path / "activation_count", over_zero, n, "small", header=last)
    script.main(["-l", "en,ga"])
    assert not (out / "small.json").exists() and (out / "small.en-ga.layers.json").is_file()
    script.main(["-l", "eng_Latn,gle_Latn,eus_Latn"])
    assert (out / "small.json").is_file()
    place.with_name("aside").rename(place)
    capsys.readouterr()
    script.main(["--overwrite"])
    assert "using those in" not in capsys.readouterr().out
    with pytest.raises(InputError, match=r"activation_count has no counts none.<lang>.pt; its tags are small"):
        script.main(["-t", "none"])


def test_layers_of_an_earlier_version_are_finished(tmp_path, monkeypatch, no_figure, capsys):
    """They held list and facts in one file; both forms are read alike."""
    study(tmp_path, monkeypatch)
    layers_file([0, 2])
    script.main([])
    path = Path("results/lsn/result/small.layers.json")
    facts = path.with_suffix(".facts.json")
    before = results.read_json(path)
    facts.rename(path)
    capsys.readouterr()
    script.main([])
    assert "finished (--overwrite redoes them)" in capsys.readouterr().out
    payload, head = results.read_json(path)
    assert (payload, head) == before
    script.main(["--overwrite"])
    assert json.loads(path.read_text()) == payload["layers"] and facts.is_file()


def test_counts_of_the_original_lape_code(tmp_path, no_figure):
    """`activation.<lang>.train.<model>`, with the sums that its code stores beside the counts."""
    over_zero, n = some_counts(3, langs=("en", "id", "vi"))
    folder = write_counts(tmp_path / "data", over_zero, n, "llama-7b")
    for lang in over_zero:
        path = folder / f"llama-7b.{lang}.pt"
        content = results.read_tensors(path) | {f"sum{i}": torch.ones(3, 40) for i in (1, 2, 3, 4)}
        torch.save(content, folder / f"activation.{lang}.train.llama-7b")
        path.unlink()
    argv = [
        "-t",
        "llama-7b",
        "--langs",
        "en,id,vi",
        "-a",
        str(folder),
        "--outdir",
        str(tmp_path / "out"),
        "--rate",
        "0.1",
    ]
    script.main(argv)
    assert masks.read(tmp_path / "out/llama-7b.json", "id", 3, 40) == by_definition(over_zero, n, 0.1)["id"]
    with pytest.raises(InputError, match="its tags are llama-7b: give one with -t"):
        script.main(["-t", "llama", *argv[2:]])
    write_counts(folder, over_zero, n, "llama-7b")
    with pytest.raises(InputError, match=r"activation.en.train.llama-7b and llama-7b.en.pt are both counts of en"):
        script.main([*argv, "--overwrite"])


def test_the_gate_of_the_interface_goes_into_the_file_of_rich_layers(tmp_path, monkeypatch, no_figure, capsys):
    study(tmp_path, monkeypatch)
    layers_file([0, 2], gate=failed_gate())
    script.main([])
    made = Path("results") / experiments.result("lsn_layers").format(name="small")
    assert results.read_json(made)[1]["gate"] == failed_gate()
    assert capsys.readouterr().err.count("everything built on them mean nothing") == 1
    layers_file([0, 2])  # as before there was a gate: the same request
    script.main([])
    assert "finished" in capsys.readouterr().out
    script.main(["--n-layers", "2", "-o", "own"])  # a number that is not the interface's
    assert results.read_json("own/small.layers.json")[1]["gate"] is None


def test_a_study_whose_models_changed(tmp_path, monkeypatch, no_figure):
    study(tmp_path, monkeypatch)
    layers_file([0], models={"model": refs.model(save_tiny("llama", tmp_path / "other", seed=9)).describe()})
    with pytest.raises(InputError, match=r"layers.json was made for .*other, but the counts are of run/checkpoint-2"):
        script.main([])
    layers_file([0], n_layers=7)
    with pytest.raises(InputError, match="made for n_layers 7, but 3 is needed"):
        script.main([])
    layers_file([])
    with pytest.raises(InputError, match="has no interface layers; give --n-layers"):
        script.main([])
    save_tiny("llama", tmp_path / "run" / "checkpoint-2", seed=8, tokenizer=False)
    with pytest.raises(InputError, match=r"counts of run/checkpoint-2, .* or was trained again since"):
        script.main([])
    assert not (tmp_path / "results" / "lsn" / "result").exists()


def test_help_answers_without_heavy_imports_and_commands_parse():
    code = (
        "import runpy, sys; sys.argv = ['identify.py', '--help']\n"
        "try: runpy.run_path('lsn/identify.py', run_name='__main__')\n"
        "except SystemExit: print({'torch', 'numpy', 'matplotlib', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    for line in script.__doc__.splitlines():
        if line.startswith(("Full: ", "Tiny: ")):
            script.build_parser().parse_args(line.partition("lsn/identify.py ")[2].split())


def test_one_part_that_agrees_is_no_convergence():
    """An eighth that happens to agree says nothing where a half does not, or where the halves disagree."""
    from cpt_utils.measures.counts import Counts

    def made(*parts):
        arrays = [np.array([part], dtype=np.int64) for part in parts]
        return Counts(Path("x"), "a", 100, arrays[-1], [10, 50], arrays[:-1]), Counts(
            Path("y"), "b", 100, arrays[-1][:, ::-1], [10, 50], [a[:, ::-1] for a in arrays[:-1]]
        )

    for parts, expected in (
        (([9, 0, 0, 0], [45, 0, 0, 0], [90, 0, 0, 0]), 10),
        (([9, 0, 0, 0], [0, 45, 0, 0], [90, 45, 0, 0]), None),
    ):
        counts = list(made(*parts))
        langs = [one.lang for one in counts]
        rates = {"rate": 0.5, "filter_rate": 0.5, "bar_rate": 0.5}
        full = script.lape.select([one.over_zero for one in counts], [one.n for one in counts], langs, **rates)
        found = script.reporting.convergence(counts, full, script.lape.select, **rates)
        assert (found["enough"] and found["enough"]["tokens"]["a"]) == expected
