"""Interface and hub: the split against exhaustive search, its stability, its files and its errors."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
from helpers import load_script

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import identity
from cpt_utils.measures import gate

script = load_script("layer-specialize/layer_specialize.py")


def within(values: np.ndarray, high: np.ndarray) -> float:
    """The sum of squares within the two groups."""
    return sum(((group - group.mean()) ** 2).sum() for group in (values[~high], values[high]) if len(group))


def profiles(count: int, seed: int = 0):
    """Accuracy profiles of many kinds: smooth, noisy, with ties (counts over few sentences), bimodal, one outlier."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        layers = int(rng.integers(2, 49))
        kind = number % 5
        if kind == 0:
            values = rng.random(layers)
        elif kind == 1:
            values = np.sin(np.linspace(0.1, 3, layers)) * rng.random() + 0.05 * rng.random(layers)
        elif kind == 2:
            values = rng.integers(0, 12, layers) / 12
        elif kind == 3:
            values = rng.choice([0.1, 0.6], layers) + 0.1 * rng.random(layers)
        else:
            values = 0.2 + 0.01 * rng.random(layers)
            values[rng.integers(layers)] = rng.random()
        if np.ptp(values) > 1e-3:
            yield values


@pytest.mark.parametrize("layers", range(2, 10))
def test_split_is_the_best_of_all_two_way_splits(layers):
    rng = np.random.default_rng(layers)
    splits = [np.array(s, dtype=bool) for s in itertools.product((False, True), repeat=layers) if 0 < sum(s) < layers]
    for values in [*rng.random((12, layers)), *(rng.integers(0, 5, (12, layers)) / 5)]:
        if np.ptp(values) == 0:
            continue
        best = min(within(values, split) for split in splits)
        assert within(values, script.two_means(values)) <= best + 1e-12


def test_split_on_1000_profiles_against_all_cuts_and_kmeans(capsys):
    from sklearn.cluster import KMeans

    checked, worse = 0, {1: 0, 10: 0}  # KMeans runs on the first 400
    for number, values in enumerate(profiles(1300)):
        high = script.two_means(values)
        ours = within(values, high)
        order = np.argsort(values, kind="stable")
        cuts = [np.isin(np.arange(len(values)), order[k:]) for k in range(1, len(values))]
        assert ours <= min(within(values, cut) for cut in cuts) + 1e-12
        # Lower centre = interface, and every layer is with the nearer centre.
        assert values[~high].max() < values[high].min()
        split = script.specialize(values)
        assert (np.flatnonzero(high) == split["semantic_layers"]).all()
        assert np.array_equal(values > split["threshold"], high) or np.isclose(values, split["threshold"]).any()
        # The second as the published script calls it.
        for starts, state in ((1, number), (10, 0)) if checked < 400 else ():
            kmeans = KMeans(2, n_init=starts, random_state=state).fit(values[:, None])
            theirs = within(values, kmeans.labels_.astype(bool))
            assert theirs >= ours - 1e-12
            worse[starts] += theirs > ours + 1e-12
        checked += 1
        if checked == 1000:
            break
    assert checked == 1000
    with capsys.disabled():
        print(f"\nKMeans of scikit-learn is never better; worse on {worse[1]}, with ten starts on {worse[10]}, of 400")
    assert worse[1] > 40 and 0 < worse[10] < 8


def test_order_of_layers_does_not_matter():
    for number, values in enumerate(profiles(200, seed=1)):
        order = list(range(len(values)))
        random.Random(number).shuffle(order)
        assert np.array_equal(script.two_means(values[order]), script.two_means(values)[order])


def test_ties():
    # {0} | {1, 2} and {0, 1} | {2} are equally good; the smaller interface is taken, in thirds and tenths as well.
    for values in ([0.0, 1.0, 2.0], [2.0, 1.0, 0.0], [0.1, 0.2, 0.3], [1 / 3, 2 / 3, 1.0]):
        assert script.two_means(np.array(values)).sum() == 2
    # Equal accuracies are never parted, not even where they differ by rounding.
    high = script.two_means(np.array([0.2, 0.2 + 1e-16, 0.5, 0.5, 0.5 + 1e-16, 0.9]))
    assert high.tolist() in ([False, False, True, True, True, True], [False, False, False, False, False, True])


def test_many_profiles_at_once_equal_one_by_one():
    values = np.random.default_rng(3).random((50, 12))
    values[7] = 0.5
    together = script.two_means(values)
    assert not together[7].any()
    for one, row in zip(values, together, strict=True):
        assert np.array_equal(script.two_means(one), row)


def test_silhouette_equals_scikit_learn():
    from sklearn.metrics import silhouette_score

    for values in profiles(60, seed=2):
        high = script.two_means(values)
        if len(values) > 2:
            assert script.silhouette(values, high) == pytest.approx(silhouette_score(values[:, None], high), abs=1e-9)


def test_blocks():
    assert script.curves.blocks([3, 4, 5, 8]) == [[3, 5], [8, 8]]
    assert script.curves.blocks([]) == []
    assert script.specialize(np.array([0.1, 0.8, 0.2, 0.9]))["hub_contiguous"] is False


def test_label_stability_equals_a_loop():
    rng = np.random.default_rng(5)
    hits = (rng.random((6, 40)) < np.array([0.2, 0.25, 0.45, 0.8, 0.5, 0.3])[:, None]).astype(np.uint8)
    high = script.two_means(hits.mean(1))
    shares, counted = script.label_stability(hits, high, seed=11, draws=200)
    kept = np.zeros(6)
    for weights in script.stats.resample_weights(40, 11, 200):
        sample = np.repeat(np.arange(40), weights.astype(int))
        assert len(sample) == 40
        kept += script.two_means(hits[:, sample].mean(1)) == high
    assert counted == 200
    assert shares == (kept / 200).tolist()
    assert 0.3 < min(shares) < 1


def test_stability_of_a_clear_split_is_one_and_empty_resamples_do_not_count():
    clear = np.zeros((4, 100), dtype=np.uint8)
    clear[1:3] = 1
    assert script.label_stability(clear, script.two_means(clear.mean(1)), 0, 50) == ([1.0] * 4, 50)
    one = np.zeros((2, 3), dtype=np.uint8)
    one[1, 0] = 1  # a resample without the first sentence has no split
    shares, counted = script.label_stability(one, np.array([False, True]), 0, 400)
    assert shares == [1.0, 1.0] and 200 < counted < 400


# --- files ---


def retrieval(path, accuracy, hits=None, limit=None, shuffle=False, **facts):
    """A retrieval result with the accuracies of hidden states 0..L, and its hits."""
    states = [[state, value] for state, value in enumerate(accuracy)]
    if shuffle:
        random.Random(0).shuffle(states)
    facts = {"n_layers": len(accuracy) - 1, "base_lang": "eng_Latn", "target_lang": "gle_Latn", "limit": limit} | facts
    payload = {"model_path": "m", "base_lang": "en", "target_lang": "ga", "timestamp": "t", "layer_accuracy": states}
    results.write_json(path, payload, results.header("sentence-retrieval", **facts))
    if hits is not None:
        import torch

        results.write_tensors(path.with_suffix(".pt"), {"hits": torch.tensor(hits, dtype=torch.uint8)})
    return path


def measured(n=60, rates=(0.05, 0.1, 0.3, 0.8, 0.7, 0.2), seed=0):
    hits = (np.random.default_rng(seed).random((len(rates), n)) < np.array(rates)[:, None]).astype(np.uint8)
    return hits.mean(1).tolist(), hits


@pytest.mark.figures
def test_command_writes_layers_and_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    accuracy, hits = measured()
    source = retrieval(tmp_path / "run__checkpoint-1.5.json", accuracy, hits, models={"model": {"spec": "run"}})
    script.main([str(source), "-o", "out/layers.json", "--draws", "100"])
    found, header = results.read_json("out/layers.json", "layer-specialize", n_layers=5, base_lang="en")
    assert found["interface_layers"] == [0, 1, 4] and found["semantic_layers"] == [2, 3]
    assert found["centres"]["interface"] == pytest.approx(np.mean([accuracy[i + 1] for i in (0, 1, 4)]))
    assert found["threshold"] == pytest.approx(sum(found["centres"].values()) / 2)
    assert found["hub_contiguous"] is True and found["hub_blocks"] == [[2, 3]]
    assert len(found["label_stability"]) == 5 and found["stability_draws"] == 100 and found["n_sentences"] == 60
    assert found["layer_accuracy"] == [[layer, value] for layer, value in enumerate(accuracy[1:])]
    assert header["models"] == {"model": {"spec": "run"}} and header["seed"] == 42
    assert header["retrieval"] == str(source)
    for suffix in (".pdf", ".png"):
        assert (tmp_path / "out" / f"layers{suffix}").stat().st_size > 1000
    assert "interface [0, 1, 4], semantic hub [2, 3]" in capsys.readouterr().out
    first = json.loads((tmp_path / "out" / "layers.json").read_text())
    pdf = (tmp_path / "out" / "layers.pdf").read_bytes()
    retrieval(source, accuracy, hits, models={"model": {"spec": "run"}}, shuffle=True)
    script.main([str(source), "-o", "out/layers.json", "--draws", "100"])
    second = json.loads((tmp_path / "out" / "layers.json").read_text())
    for payload in (first, second):
        del payload["_header"]
    assert first == second
    assert (tmp_path / "out" / "layers.pdf").read_bytes() == pdf


def test_without_hits_stability_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "by_hand.json"
    source.write_text(json.dumps({"layer_accuracy": [[0, 0.0], [1, 0.1], [2, 0.9], [3, 0.2]]}))
    script.main([str(source), "-o", "layers.json"])
    found, _ = results.read_json("layers.json")
    assert found["interface_layers"] == [0, 2] and found["semantic_layers"] == [1]
    assert found["label_stability"] is None and found["n_sentences"] is None
    captured = capsys.readouterr()
    assert "label stability is left out" in captured.out and "has no header" in captured.err


@pytest.mark.parametrize(
    ("accuracy", "message"),
    [
        ([0.0, 0.5], "1 layer cannot be split"),
        ([0.1, 0.5, 0.5, 0.5], "all 3 layers have the accuracy 0.5"),
        ([0.1, 0.5, 0.5 + 1e-9, 0.5], "all 3 layers have the accuracy"),
        ([0.1, 0.5, float("nan"), 0.7], "the accuracy of layer 1 is not a number"),
    ],
)
def test_profiles_without_a_split(tmp_path, accuracy, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = retrieval(tmp_path / "m.json", accuracy)
    with pytest.raises(InputError, match=message):
        script.main([str(source), "-o", "layers.json"])
    assert not (tmp_path / "layers.json").exists() and not list(tmp_path.glob("*.pdf"))


def test_bad_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    accuracy, hits = measured()
    good = retrieval(tmp_path / "good.json", accuracy, hits)

    def fails(source, message, *more):
        with pytest.raises(InputError, match=message):
            script.main([str(source), "-o", "layers.json", *more])

    fails(tmp_path / "none.json", "does not exist")
    fails(retrieval(tmp_path / "limited.json", accuracy, hits, limit=5), "made with --limit 5")
    fails(retrieval(tmp_path / "other.json", accuracy, 1 - hits), "do not match the accuracies")
    fails(retrieval(tmp_path / "short.json", accuracy, hits[:-1]), r"does not hold the hits \[6, n\]")
    fails(retrieval(tmp_path / "layers9.json", accuracy, hits, n_layers=9), "do not fit a model of 9 layers")
    (tmp_path / "damaged.pt").write_bytes(b"no tensors")
    fails(retrieval(tmp_path / "damaged.json", accuracy), "cannot be read as tensors")
    (tmp_path / "gap.json").write_text(json.dumps({"layer_accuracy": [[0, 0.1], [2, 0.2]]}))
    fails(tmp_path / "gap.json", r"each hidden state from 0 to L once; it has \[0, 2\]")
    (tmp_path / "twice.json").write_text(json.dumps({"layer_accuracy": [[0, 0.1], [0, 0.2]]}))
    fails(tmp_path / "twice.json", "each hidden state from 0 to L once")
    (tmp_path / "stranger.json").write_text(json.dumps({"acc": 1}))
    fails(tmp_path / "stranger.json", "has no layer_accuracy")
    assert not (tmp_path / "layers.json").exists()

    (tmp_path / "layers.json").write_text('{"interface_layers": [1]}')
    fails(good, "was not made by this script; give --overwrite")
    script.main([str(good), "-o", "layers.json", "--overwrite"])
    script.main([str(good), "-o", "layers.json"])
    with pytest.raises(InputError, match=r"name SR.json, or run inside a study"):
        script.main(["-o", "x.json"])
    with pytest.raises(InputError, match=r"name SR.json, or run inside a study"):
        script.main([])


def test_without_a_place_the_layers_are_printed_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    """As by the published script: stdout is JSON that the next step reads."""
    monkeypatch.chdir(tmp_path)
    source = retrieval(tmp_path / "m.json", *measured())
    script.main([str(source), "--draws", "20"])
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"interface_layers": [0, 1, 4], "semantic_layers": [2, 3]}
    assert "silhouette" in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.json", "m.pt"]


CONFIG = {"model_type": "llama", "num_hidden_layers": 5}


def with_twin(folder, hits, n=None, **facts):
    """A checkpoint's retrieval with `hits`, and beside it an untrained model's of the same configuration."""
    model = {"spec": "run/checkpoint-10", "config_sha256": identity.shape_hash(CONFIG)}
    facts = {"data": {"pairs_sha256": "p"}, "k": 4} | facts
    path = retrieval(folder / "run__checkpoint-10.json", hits.mean(1), hits, models={"model": model}, **facts)
    accuracy, twin = measured(n or hits.shape[1], [0.1] * 6, seed=3)
    retrieval(folder / "untrained.json", accuracy, twin, models={"untrained_like": CONFIG}, **facts)
    return path, twin


@pytest.mark.parametrize("good", [True, False])
def test_the_gate_stands_in_the_header_and_is_said(tmp_path, monkeypatch, capsys, good):
    monkeypatch.chdir(tmp_path)
    _, hits = measured(200) if good else measured(200, [0.05, 0.1, 0.06, 0.13, 0.12, 0.04])
    path, twin = with_twin(tmp_path, hits)
    script.main([str(path), "-o", "layers.json", "--draws", "20"])
    found = results.read_json("layers.json")[1]["gate"]
    assert found == results.plain(
        {"model": "run/checkpoint-10", **gate.compare(hits, twin, 42), "untrained": tmp_path / "untrained.json"}
    )
    assert found["passed"] is good
    captured = capsys.readouterr()
    if good:
        assert "run/checkpoint-10 retrieves better than its untrained twin (+0." in captured.out
        assert not captured.err
    else:
        assert captured.err.count("built on them mean nothing") == 1


def test_without_a_twin_the_gate_is_not_checked_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, hits = measured(200)
    path, _ = with_twin(tmp_path, hits)
    (tmp_path / "untrained.json").unlink()
    script.main([str(path), "-o", "layers.json", "--draws", "20"])
    header = results.read_json("layers.json")[1]
    assert "gate" in header and header["gate"] is None
    assert capsys.readouterr().out.count("than an untrained model is not checked: its untrained twin must be next") == 1


def study_folder(tmp_path):
    """A study with a base and a run of two checkpoints; only what this step looks at is there."""
    for name in ("base", "run/checkpoint-2", "run/checkpoint-10"):
        (tmp_path / "build" / name).mkdir(parents=True)
    (tmp_path / "study.yaml").write_text(
        "base: build/base\nrun: build/run\nlanguages: {base: eng_Latn, target: ga}\nresults: results\nseed: 7\n"
    )
    return tmp_path / "results" / "sentence-retrieval" / "eng_Latn-gle_Latn"


def test_in_a_study_the_last_checkpoint_is_read_and_the_base_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = study_folder(tmp_path)
    with pytest.raises(InputError, match=r"sentence-retrieval does not exist; run sentence-retrieval/sr_experiment.py"):
        script.main([])
    retrieval(folder / "run__checkpoint-2.json", [0, 0.9, 0.1])
    with pytest.raises(InputError, match=r"run__checkpoint-10.json does not exist; run .* on build/run/checkpoint-10"):
        script.main([])
    retrieval(folder / "run__checkpoint-10.json", *measured())
    retrieval(folder / "build__base.json", [0, 0.9, 0.8, 0.1, 0.1, 0.1])
    script.main(["--draws", "20"])
    out = capsys.readouterr().out
    assert "run__checkpoint-10: interface [0, 1, 4], semantic hub [2, 3]" in out
    assert "the base's own split differs in layers [0, 1, 2, 3]: interface [2, 3, 4], hub [0, 1]" in out
    found, header = results.read_json("results/layer-specialize/layers.json", "layer-specialize")
    assert found["base_split"]["semantic_layers"] == [0, 1] and header["seed"] == 7
    retrieval(folder / "build__base.json", [0, 0.5, 0.5, 0.5, 0.5, 0.5])
    script.main(["--draws", "20"])
    assert "the base has no split of its own: all 5 layers" in capsys.readouterr().out
    # Another checkpoint's split leaves the place of the study's own free, however it is asked for.
    own = (tmp_path / "results/layer-specialize/layers.json").read_bytes()
    retrieval(folder / "run__checkpoint-2.json", *measured(seed=4))
    for asked in ([str(folder / "run__checkpoint-2.json")], ["--steps", "2"]):
        script.main([*asked, "--draws", "5"])
        beside = tmp_path / "results/layer-specialize/layers.run__checkpoint-2.json"
        assert results.read_json(beside)[1]["retrieval"].endswith("run__checkpoint-2.json")
        beside.unlink()
    assert (tmp_path / "results/layer-specialize/layers.json").read_bytes() == own
    capsys.readouterr()
    script.main([str(folder / "run__checkpoint-10.json"), "--draws", "20"])
    assert "wrote results/layer-specialize/layers.json and" in capsys.readouterr().out
    # Another language does not go to the study's place, but may go elsewhere.
    other = retrieval(tmp_path / "other.json", *measured(), target_lang="eus_Latn")
    with pytest.raises(InputError, match="target_lang eus_Latn, but ga is needed"):
        script.main([str(other)])
    script.main([str(other), "-o", "elsewhere.json", "--draws", "5"])


def with_curves(path, rates, seed=0, n=200, **facts):
    """A retrieval result with the curves of `rates` {measure: the rate of hits at hidden states 0..L}."""
    import torch

    hits = {name: measured(n, values, seed + at)[1] for at, (name, values) in enumerate(rates.items())}
    retrieval(path, hits["published"].mean(1), **facts)
    content = json.loads(path.read_text())
    names = script.curves.MEASURES
    content |= {names[name].key: [[i, float(v)] for i, v in enumerate(own.mean(1))] for name, own in hits.items()}
    path.write_text(json.dumps(content))
    tensors = {names[name].hits: torch.tensor(own, dtype=torch.uint8) for name, own in hits.items()}
    results.write_tensors(path.with_suffix(".pt"), tensors)
    return path


RATES = {
    "published": (0.05, 0.9, 0.8, 0.1, 0.1, 0.1),
    "unit_centred": (0.05, 0.1, 0.1, 0.8, 0.9, 0.1),
    "mexa_last": (0, 0, 0, 0, 0, 0),
}


@pytest.mark.figures
def test_any_curve_splits_and_where_splits_differ_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = with_curves(tmp_path / "m.json", RATES)
    script.main([str(source), "-o", "published.json", "--draws", "20"])
    said = capsys.readouterr().out
    assert "unit_centred: 4 differ (0 to 3); mexa_last: no split" in said
    script.main([str(source), "-o", "other.json", "--draws", "20", "--measure", "unit_centred"])
    said = capsys.readouterr().out
    assert "m by unit_centred: interface [0, 1, 4], semantic hub [2, 3]" in said
    found, header = results.read_json("published.json")
    other, facts = results.read_json("other.json")
    assert (header["measure"], facts["measure"]) == ("published", "unit_centred")
    assert found["semantic_layers"] == [0, 1] and other["semantic_layers"] == [2, 3]
    assert list(found["splits"]) == list(other["splits"]) == list(RATES)
    for payload, own in ((found, "published"), (other, "unit_centred")):
        assert payload["splits"][own]["differs"] == [] and payload["splits"]["mexa_last"]["semantic_layers"] is None
        assert "all 5 layers have the accuracy 0" in payload["splits"]["mexa_last"]["why"]
        for key in ("interface_layers", "semantic_layers", "silhouette"):
            assert payload["splits"][own][key] == payload[key]
    assert found["splits"]["unit_centred"]["differs"] == [0, 1, 2, 3] == other["splits"]["published"]["differs"]
    assert (tmp_path / "published.png").read_bytes() != (tmp_path / "other.png").read_bytes()
    with pytest.raises(InputError, match="all 5 layers have the accuracy 0"):
        script.main([str(source), "-o", "x.json", "--measure", "mexa_last"])
    # A result of before has the published curve alone.
    old = retrieval(tmp_path / "old.json", *measured())
    with pytest.raises(InputError, match=r"old.json has no unit_accuracy, .* run sentence-retrieval/sr_experiment.py"):
        script.main([str(old), "-o", "x.json", "--measure", "unit"])
    script.main([str(old), "-o", "x.json", "--draws", "5"])
    assert list(results.read_json("x.json")[0]["splits"]) == ["published"]


def test_in_a_study_its_measure_has_the_place_and_the_gate_is_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = study_folder(tmp_path)
    model = {"spec": "run/checkpoint-10", "config_sha256": identity.shape_hash(CONFIG)}
    facts = {"data": {"pairs_sha256": "p"}, "k": 4}
    with_curves(folder / "run__checkpoint-10.json", RATES, models={"model": model}, **facts)
    twin = RATES | {"published": [0.9] * 6, "unit_centred": [0.1] * 6}
    with_curves(folder / "untrained.json", twin, seed=9, models={"untrained_like": CONFIG}, **facts)
    script.main(["--draws", "5"])
    script.main(["--draws", "5", "--measure", "unit_centred"])
    place = tmp_path / "results/layer-specialize"
    assert results.read_json(place / "layers.json")[1]["gate"]["passed"] is False
    found = results.read_json(place / "layers.unit_centred.json")[1]
    assert found["gate"]["passed"] is True and found["gate"]["measure"] == "unit_centred"
    assert "sentences, by unit_centred)" in capsys.readouterr().out
    with open("study.yaml", "a") as file:
        file.write("measure: unit_centred\n")
    # The study's split of before is not taken by the steps after this one; a file that is given, is.
    study = Study.find()
    with pytest.raises(InputError, match=r"layers.json splits layers by published, .* is unit_centred; run layer"):
        study.input(None, "--hub-json", "layers")
    assert study.input(str(place / "layers.json"), "--hub-json", "layers") == place / "layers.json"
    script.main(["--draws", "5"])
    assert study.input(None, "--hub-json", "layers").samefile(place / "layers.json")
    assert results.read_json(place / "layers.json")[1]["measure"] == "unit_centred"
    script.main(["--draws", "5", "--measure", "published"])
    assert results.read_json(place / "layers.published.json")[0]["semantic_layers"] == [0, 1]


@pytest.mark.figures
def test_half_of_the_sentences_split_layers_and_leave_the_rest_for_tests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = with_curves(study_folder(tmp_path) / "run__checkpoint-10.json", RATES)
    hits = results.read_tensors(source.with_suffix(".pt"))["hits"].numpy()
    script.main(["--draws", "5", "--sentences", "half"])
    place = tmp_path / "results/layer-specialize"
    found, header = results.read_json(place / "layers.half.json")
    assert [value for _, value in found["layer_accuracy"]] == hits[1:, ::2].mean(1).tolist()
    assert (found["n_sentences"], header["sentences"]) == (100, "half")
    assert found["splits"]["published"]["semantic_layers"] == found["semantic_layers"]
    script.main(["--draws", "5"])
    assert "sentences" not in results.read_json(place / "layers.json")[1]
    with open("study.yaml", "a") as file:
        file.write("sentences: half\n")
    with pytest.raises(InputError, match="splits layers by all, the study's sentences is half; run layer"):
        Study.find().input(None, "--hub-json", "layers")
    source.with_suffix(".pt").unlink()
    with pytest.raises(InputError, match="does not exist; --sentences half needs its hits"):
        script.main(["--draws", "5"])


def test_the_measures_of_a_study_are_the_curves():
    from typing import get_args

    from cpt_utils.base.study_keys import Study

    named = get_args(get_args(Study.model_fields["measure"].annotation)[0])
    assert named == tuple(script.curves.MEASURES)
