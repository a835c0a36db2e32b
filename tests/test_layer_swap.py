"""layer-swap.py from the command line: folders, metadata, controls in memory, refusals, and a kill in the middle."""

from __future__ import annotations

import json
import os
import random
from itertools import combinations

import numpy as np
import pytest
import torch
from helpers import failed_gate, killed, load_script, read_tensors, same_results, save_study, save_tiny
from launch import launch

from cpt_utils.base import cli, results, sources, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs, tokenization
from cpt_utils.interventions import in_memory, on_disk, surgery
from cpt_utils.measures import controls, evaluation, tasks
from cpt_utils.measures.trial import Trial
from cpt_utils.models import loading

SWAP = load_script("layer-swap/layer-swap.py")
LAYERS = {"interface_layers": [0, 3], "semantic_layers": [1, 2]}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A base and a run of 4 layers, 12 sentence pairs, 6 documents, 9 task rows."""
    root = tmp_path_factory.mktemp("study")
    line = save_study(root)
    (root / "layers.json").write_text(json.dumps(LAYERS))
    choices = cli.sibling("lm_eval_sib200/generate.py").CHOICES
    rows = [f"{i}\t{choices[i % 7]}\t{line(3)}" for i in range(9)]
    (root / "task" / "qaa_Latn").mkdir(parents=True)
    (root / "task" / "qaa_Latn" / "test.tsv").write_text("\n".join(["index_id\tcategory\ttext", *rows]) + "\n")
    (root / "study.yaml").write_text(
        f"""
name: tiny
base: {root}/base
run: {root}/run
languages: {{base: eng_Latn, target: qaa_Latn}}
data:
  source: text
  base_file: {root}/eng.txt
  target_file: {root}/qaa.txt
  heldout: {{qaa_Latn: {root}/heldout.txt}}
  task: {{name: sib200_qaa_Latn, dir: {root}/task}}
results: RESULTS
"""
    )
    return root


@pytest.fixture
def study(shared, tmp_path, monkeypatch):
    """A study.yaml in the current folder with step 2's result in its place: commands need no argument."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text((shared / "study.yaml").read_text().replace("RESULTS", "results"))
    place = tmp_path / "results" / "layer-specialize"
    place.mkdir(parents=True)
    (place / "layers.json").write_text(json.dumps(LAYERS))
    return tmp_path


def arguments(shared, out, *more):
    return [str(shared / p) for p in ("base", "run/checkpoint-20", "layers.json")] + ["-o", str(out), *more]


def shared_study(shared, folder):
    """A study that knows the layers, and no model."""
    place = folder / "bare" / "layer-specialize"
    place.mkdir(parents=True)
    (place / "layers.json").write_text(json.dumps(LAYERS))
    (folder / "bare.yaml").write_text(f"results: {folder / 'bare'}\n")
    return folder / "bare.yaml"


def test_folders_and_metadata(shared, tmp_path, capsys):
    SWAP.main(arguments(shared, tmp_path / "out"))
    drawn = random.Random(42).sample(range(4), 2)
    payload, head = results.read_json(tmp_path / "out" / "metadata.json", schema="layer-swap", n_layers=4, seed=42)
    assert payload == {
        "base_model": str(shared / "base"),
        "target_model": str(shared / "run/checkpoint-20"),
        "interface_layers": [0, 3],
        "semantic_hub_layers": [1, 2],
        "random_layers": drawn,
        "seed": 42,
    }
    assert head["models"]["target"]["step"] == 20
    base, target = read_tensors(shared / "base"), read_tensors(shared / "run/checkpoint-20")
    for method, layers in (("semantic_hub", [1, 2]), ("random", drawn)):
        made = read_tensors(tmp_path / "out" / method)
        assert made.keys() == target.keys()
        for name in made:
            source = base if any(f"layers.{layer}." in name for layer in layers) else target
            assert torch.equal(made[name], source[name])
        ref = refs.model(tmp_path / "out" / method)
        loading.load_model(ref, torch.float32, torch.device("cpu"))
        tokenization.load_tokenizer(ref)
    capsys.readouterr()
    SWAP.main(arguments(shared, tmp_path / "out"))
    assert capsys.readouterr().out.count(": kept") == 2
    named = [
        "--base",
        str(shared / "base"),
        "--run",
        str(shared / "run"),
        "--steps",
        "20",
        "--output",
        str(tmp_path / "out"),
    ]
    SWAP.main([*named, "--study", str(shared_study(shared, tmp_path))])
    assert capsys.readouterr().out.count(": kept") == 2
    with pytest.raises(InputError, match=r"metadata\.json describes other swaps \(random_layers"):
        SWAP.main(arguments(shared, tmp_path / "out", "--seed", "7"))
    SWAP.main(arguments(shared, tmp_path / "out", "--seed", "7", "--overwrite", "--methods", "random"))
    assert results.read_json(tmp_path / "out" / "metadata.json")[0]["seed"] == 7


def test_random_layers_stand_in_the_order_of_the_draw(shared, tmp_path, capsys):
    """As in the published metadata.json; a file of an earlier version, with sorted ones, is of the same swap."""
    (tmp_path / "layers.json").write_text('{"interface_layers": [2]}')
    argv = [*arguments(shared, tmp_path / "out")[:2], str(tmp_path / "layers.json"), "-o", str(tmp_path / "out")]
    argv += ["--methods", "random"]
    SWAP.main(argv)
    random.seed(42)  # as the published script draws
    drawn = random.sample(list(range(4)), 3)
    path = tmp_path / "out" / "metadata.json"

    def rewrite(layers):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"random_layers": layers}))

    assert json.loads(path.read_text())["random_layers"] == drawn == [0, 3, 1]
    base, target = read_tensors(shared / "base"), read_tensors(shared / "run/checkpoint-20")
    for name, tensor in read_tensors(tmp_path / "out" / "random").items():
        source = base if ".layers." in name and ".layers.2." not in name else target
        assert torch.equal(tensor, source[name])
    rewrite(sorted(drawn))
    capsys.readouterr()
    SWAP.main(argv)
    assert ": kept" in capsys.readouterr().out and json.loads(path.read_text())["random_layers"] == drawn
    rewrite([1, 2, 3])
    with pytest.raises(InputError, match=r"describes other swaps \(random_layers \[1, 2, 3\], now \[0, 3, 1\]"):
        SWAP.main(argv)


def test_the_published_file_without_header(shared, tmp_path):
    (tmp_path / "layers.json").write_text('{"interface_layers": [2]}')
    SWAP.main([*arguments(shared, tmp_path / "out")[:2], str(tmp_path / "layers.json"), "-o", str(tmp_path / "out")])
    assert results.read_json(tmp_path / "out" / "metadata.json")[0]["semantic_hub_layers"] == [0, 1, 3]


def test_argument_free_in_a_study(study):
    """The last checkpoint of the run, step 2's layers, the study's place for the result."""
    SWAP.main([])
    payload = results.read_json(study / "results" / "layer-swap" / "metadata.json")[0]
    assert payload["target_model"].endswith("run/checkpoint-20") and payload["semantic_hub_layers"] == [1, 2]
    assert (study / "results" / "layer-swap" / "semantic_hub" / "config.json").is_file()


def test_controls_against_written_folders(shared, study):
    """Every set's numbers are those of the folder it would write, and of the folder's own retrieval run."""
    SWAP.main(["--controls", "all"])
    out = study / "results" / "layer-swap"
    payload, head = results.read_json(out / "controls.json", schema="swap-controls", n_layers=4, base_lang="eng_Latn")
    assert head["n_used"] == 12 and head["heldout"]["documents"] == 6 and head["task"]["rows"] == 9
    assert payload["n_possible_sets"] == 6 and payload["enumerated"]
    sets = payload["sets"]
    assert [row["name"] for row in sets] == ["base", "target", "semantic_hub", *["random"] * 5]
    others = [row["layers"] for row in sets[3:]]
    assert sorted([*others, [1, 2]]) == [list(s) for s in combinations(range(4), 2)]
    assert sorted(p.name for p in out.iterdir()) == ["controls.json", "controls.pdf", "controls.png", "controls.pt"]

    test = evaluation.Test(
        pairs=sources.parallel(
            "text", "eng_Latn", "qaa_Latn", base_file=shared / "eng.txt", target_file=shared / "qaa.txt"
        ),
        heldout=[("", line) for line in (shared / "heldout.txt").read_text().splitlines()],
        task=tasks.from_file(shared / "task" / "qaa_Latn" / "test.tsv").items,
        retrieve=SWAP.retrieval.of_pairs,
    )
    with surgery.Pair(shared / "base", shared / "run/checkpoint-20") as pair:
        for row in (sets[0], sets[1], sets[2], sets[5]):
            folder = shared / "base" if row["name"] == "base" else shared / "run/checkpoint-20"
            if row["layers"]:
                folder = study / f"written{row['layers']}"
                on_disk.write_model(pair, surgery.layers_from_base(pair, row["layers"]), folder)
            ref = refs.model(folder)
            model = loading.load_model(ref, torch.float32, torch.device("cpu"))
            found = test.on(model, pair.arch, tokenization.load_tokenizer(ref), "x")
            assert found["values"] == row["values"]
            assert found["layer_accuracy"] == row["layer_accuracy"]
    retrieval = cli.sibling("sentence-retrieval/sr_experiment.py")
    retrieval.main(["--model_path", str(study / "written[1, 2]"), "--artifact-out", "sr", "--no-untrained"])
    result = json.loads(next((study / "sr" / "eng_Latn-qaa_Latn").glob("*.json")).read_text())
    assert [accuracy for _, accuracy in result["layer_accuracy"]] == sets[2]["layer_accuracy"]
    assert result["unit_centred_accuracy"][-1] == [4, sets[2]["values"]["retrieval_readout"]]
    assert sets[2]["values"]["retrieval_mean"] == pytest.approx(np.mean(sets[2]["layer_accuracy"][1:]), abs=1e-12)

    units = results.read_tensors(out / "controls.pt")
    assert units["retrieval_mean"].shape == (8, 12) and units["task_accuracy"].shape == (8, 9)
    for name, row in payload["comparison"].items():
        values = [s["values"][name] for s in sets[3:]]
        sign = 1 if row["higher_is_better"] else -1
        as_good = sum(sign * v >= sign * sets[2]["values"][name] for v in values)
        assert row["share_at_least_as_good"] == as_good / 5 and row["p_value"] == (1 + as_good) / 6
        assert row["own_minus_random"] == pytest.approx(sets[2]["values"][name] - np.mean(values))
        if name in units:
            assert row["ci_low"] <= row["own_minus_random"] <= row["ci_high"]
            assert units[name].double().mean(1).tolist() == pytest.approx([s["values"][name] for s in sets], rel=1e-6)
        base, target, hub = (s["values"][name] for s in sets[:3])
        if sign * (target - base) > 0 and row["gain"]["ci_low"] > 0:
            assert row["own_gain_lost"] == pytest.approx((target - hub) / (target - base))
        else:
            assert row["own_gain_lost"] is None


def test_the_loss_in_other_languages_is_measured_where_it_is_asked_for(shared, study, capsys):
    args = SWAP.build_parser().parse_args(["--measures", "nll"])
    files = {"qaa_Latn": shared / "heldout.txt", "eng_Latn": shared / "eng.txt", "qab_Latn": None}
    test = evaluation.test_from_arguments(args, Study.find(), {}, SWAP.retrieval.of_pairs, files)
    assert test.measures() == ["nll_per_byte", "nll_per_byte:eng_Latn"]
    assert test.facts["heldout_others"]["eng_Latn"]["documents"] == 12
    with surgery.Pair(shared / "base", shared / "run/checkpoint-20") as pair:
        swapper, names = in_memory.Swapper(pair), {0: "own", 1: "random", 2: "random"}
        swaps = [swapper.condition(name, surgery.layers_from_base(pair, [layer]), layers=[layer])
                 for layer, name in names.items()]  # fmt: skip
        Trial.from_arguments(args, Study.find(), pair.models, test).compare(study / "out.json", swaps, "own")
        whole = loading.load_model(pair.base_ref, torch.float32, torch.device("cpu"))
        alone = evaluation.Test(heldout=evaluation.documents(shared / "eng.txt", 1))
        found = alone.on(whole, pair.arch, tokenization.load_tokenizer(pair.base_ref), "x")["values"]["nll_per_byte"]
    payload, units = results.read_json(study / "out.json")[0], results.read_tensors(study / "out.pt")
    assert payload["sets"][0]["values"]["nll_per_byte:eng_Latn"] == found
    assert units["nll_per_byte:eng_Latn"].shape == (5, 12) and units["nll_per_byte"].shape == (5, 6)
    assert payload["comparison"]["nll_per_byte:eng_Latn"]["higher_is_better"] is False
    assert "NLL of held-out text (nats per byte), eng_Latn: " in capsys.readouterr().out


@pytest.mark.figures
def test_matched_sets_are_measured_beside_the_drawn_ones(study, capsys):
    """With one random set the only one of the hub's shape is not among them: it is added, and counts apart."""
    place = study / "results" / "layer-specialize" / "layers.json"
    place.write_text('{"interface_layers": [2]}')
    SWAP.main(["--controls", "1", "--measures", "retrieval", "nll"])
    out = study / "results" / "layer-swap"
    payload, _ = results.read_json(out / "controls.json", schema="swap-controls")
    sets = payload["sets"]
    assert [row["name"] for row in sets] == ["base", "target", "semantic_hub", "random", "matched"]
    assert (sets[2]["layers"], sets[4]["layers"]) == ([0, 1, 3], [0, 2, 3]) != sets[3]["layers"]
    assert sets[2]["shape"] == {"size": 3, "first": 0, "last": 3, "mean_depth": 4 / 3, "blocks": 2}
    assert payload["comparison"]["nll_per_byte"]["n_random"] == 1 and not payload["enumerated"]
    row, units = payload["matched"]["semantic_hub"], results.read_tensors(out / "controls.pt")
    assert row["layers"] == [[0, 2, 3]] and row["nll_per_byte"]["n_matched"] == 1
    assert list(units) == ["retrieval_mean", "retrieval_readout", "nll_per_byte"]
    for name, values in units.items():
        own, other = sets[2]["values"][name], sets[4]["values"][name]
        assert values.double().mean(1).tolist() == pytest.approx([one["values"][name] for one in sets], rel=1e-6)
        assert row[name]["own_minus_matched"] == pytest.approx(own - other)
        assert row[name]["ci_low"] <= own - other + 1e-9 and own - other - 1e-9 <= row[name]["ci_high"]
    assert payload["additive"]["nll_per_byte"]["why"] == "3 sets are too few for a fit of 4 layers"
    said = capsys.readouterr().out
    assert "1 of 1 sets of the treatments' shape" in said and "rank" in said and "matched [0, 2, 3]" not in said
    payload["matched"] = {}  # drawn apart: without them the figure is another
    before = (out / "controls.png").read_bytes()
    SWAP.draw(out / "controls", payload, 4)
    assert (out / "controls.png").read_bytes() != before


@pytest.mark.figures
def test_controls_go_on_after_a_kill(study, capsys):
    """Killed after the second set, then run again: the same bytes as an unbroken run, measured sets not repeated."""
    flags = ["--controls", "3", "--measures", "retrieval", "nll"]
    SWAP.main([*flags, "-o", "unbroken"])
    killed(lambda: SWAP.main([*flags, "-o", "out"]), evaluation.Test, "on", 3)
    partial = study / "out" / "controls.partial.jsonl"
    lines = partial.read_text().splitlines()
    assert len(lines) == 4 and not (study / "out" / "controls.json").exists()
    partial.write_text("\n".join(lines[:3]) + "\n" + lines[3][: len(lines[3]) // 2])  # cut inside the last line
    capsys.readouterr()
    SWAP.main([*flags, "-o", "out"])
    assert "2 of 6 sets were measured before" in capsys.readouterr().out
    assert not partial.exists()
    same_results(study / "unbroken/controls.json", study / "out/controls.json")
    assert (study / "unbroken" / "controls.png").read_bytes() == (study / "out" / "controls.png").read_bytes()
    SWAP.main([*flags, "-o", "out"])
    assert "kept" in capsys.readouterr().out
    with pytest.raises(InputError, match="another request"):
        SWAP.main(["--controls", "2", "--measures", "nll", "-o", "out"])
    SWAP.main(["--controls", "2", "--measures", "nll", "-o", "out", "--overwrite"])
    assert len(json.loads((study / "out" / "controls.json").read_text())["sets"]) == 5


@pytest.mark.slow
def test_two_processes_measure_what_one_does(study):
    """Begun by one process and killed, gone on with by two."""
    flags = ["--controls", "4", "--measures", "retrieval", "nll"]
    SWAP.main([*flags, "-o", "one"])
    killed(lambda: SWAP.main([*flags, "-o", "two"]), evaluation.Test, "on", 2)
    said = launch("layer-swap/layer-swap.py", *flags, "-o", "two").stdout
    assert said.count("2 of 7 sets were measured before") == said.count("of the 5 other sets") == 1
    same_results(study / "one/controls.json", study / "two/controls.json")
    assert sorted(os.listdir("one")) == sorted(os.listdir("two"))
    assert (study / "one" / "controls.pt").read_bytes() == (study / "two" / "controls.pt").read_bytes()


def test_the_gate_of_the_layers_goes_on(study, capsys):
    failed = failed_gate()
    place = study / "results" / "layer-specialize" / "layers.json"
    results.write_json(place, LAYERS, results.header("layer-specialize", n_layers=4, gate=failed))
    out = study / "results" / "layer-swap"
    for flags, file in (([], "metadata"), (["--in-memory"], "in_memory"), (["--controls", "2"], "controls")):
        SWAP.main([*flags, *(["--measures", "retrieval"] if flags else [])])
        assert results.read_json(out / f"{file}.json")[1]["gate"] == failed
        captured = capsys.readouterr()
        assert captured.err.count("run/checkpoint-20 does not retrieve clearly better than its untrained twin") == 1
        assert ("none of these ranks means anything" in captured.out) is (file == "controls")
    # Kept, though layers and header are of before the gate: it is no part of the request.
    results.write_json(place, LAYERS, results.header("layer-specialize", n_layers=4))
    SWAP.main(["--controls", "2", "--measures", "retrieval"])
    captured = capsys.readouterr()
    assert "kept" in captured.out and not captured.err.count("twin")


def test_paths_are_no_part_of_a_request(shared, study, capsys, monkeypatch):
    """The same by hand, with other spellings of every path, as by the study."""
    SWAP.main(["--controls", "2"])
    monkeypatch.chdir(shared)
    (study / "study.yaml").rename(study / "other.yaml")
    files = ["--source", "text", "--base-file", "eng.txt", "--target-file", "qaa.txt", "--heldout", "./heldout.txt"]
    files += ["--task", "task/qaa_Latn/../qaa_Latn/test.tsv", "--base-lang", "en", "--target-lang", "qaa_Latn"]
    out = study / "results" / "layer-swap"
    more = ["--controls", "2", "--limit", "99", "--dtype", "float32", "--device", "cpu", "--batch-size", "5"]
    capsys.readouterr()
    SWAP.main(["base/", "run/checkpoint-20", "layers.json", "-o", str(out), *files, *more])
    assert "kept" in capsys.readouterr().out
    told = r"request \(test\.limit: 7 asked for, none in the file; .*; test\.n_used: 7 asked for, 12 in the file; "
    with pytest.raises(InputError, match=told):
        SWAP.main(["base", "run/checkpoint-20", "layers.json", "-o", str(out), *files[:6], *more, "--limit", "7"])


def test_folders_are_written_by_one_process(study, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="the work of one process"):
        SWAP.main([])


def test_in_memory_writes_no_folder(study):
    SWAP.main(["--in-memory", "--methods", "random", "--measures", "nll", "--limit", "3"])
    out = study / "results" / "layer-swap.limit-3"  # the study's own place stays free
    assert [p.name for p in out.iterdir()] == ["in_memory.json"] and not (study / "results" / "layer-swap").exists()
    payload, head = results.read_json(out / "in_memory.json", allow_limited=True)
    assert [row["name"] for row in payload["sets"]] == ["base", "target", "random"] and head["limit"] == 3
    with pytest.raises(InputError, match="--limit 3"):
        results.read_json(out / "in_memory.json")


def test_which_sets(capsys):
    others, possible = controls.layer_sets(6, [1, 2], "all", 0)
    assert possible == 15 and len(others) == 14 and [1, 2] not in others
    assert controls.layer_sets(6, [2, 1], 14, 0)[0] == others
    drawn, possible = controls.layer_sets(12, range(3, 9), 40, 7)
    assert possible == 924 and len(drawn) == 40 == len({tuple(s) for s in drawn})
    assert drawn == controls.layer_sets(12, range(3, 9), 40, 7)[0] != controls.layer_sets(12, range(3, 9), 40, 8)[0]
    assert all(len(s) == 6 and s != [3, 4, 5, 6, 7, 8] for s in drawn)
    assert len(controls.layer_sets(12, range(3, 9), "all", 7)[0]) == controls.SMALL
    capsys.readouterr()
    controls.layer_sets(4, [0, 1, 2], "all", 0)
    assert "p cannot be below 0.25" in capsys.readouterr().err
    with pytest.raises(InputError, match="no other set"):
        controls.layer_sets(4, range(4), "all", 0)


def test_places_and_gains():
    row = controls.rank_among_random(0.3, [0.1, 0.3, 0.5, 0.2], True)
    assert (row["rank"], row["quantile"], row["share_at_least_as_good"], row["p_value"]) == (2, 0.375, 0.5, 0.6)
    row = controls.rank_among_random(0.3, [0.1, 0.3, 0.5, 0.2], False)
    assert (row["rank"], row["share_at_least_as_good"]) == (3, 0.75)
    assert row["random_sd"] == pytest.approx(np.std([0.1, 0.3, 0.5, 0.2], ddof=1))
    assert controls.rank_among_random(1.0, [0.5], True)["random_sd"] is None
    assert controls.gain_lost(5.6, 6.2, 5.0, False) == pytest.approx(0.5)
    assert controls.gain_lost(0.30, 0.20, 0.40, True) == pytest.approx(0.5)
    assert controls.gain_lost(0.45, 0.20, 0.40, True) == pytest.approx(-0.25)
    assert controls.gain_lost(0.3, 0.4, 0.2, True) is None


def record(name, retrieval, nll=None, layers=()):
    units = {"retrieval_mean": list(retrieval)} | ({"nll_per_byte": list(nll)} if nll is not None else {})
    values = {key: float(np.mean(value)) for key, value in units.items()}
    return {
        "name": name, "layers": list(layers), "units": units,
        "values": values | {"retrieval_best": values["retrieval_mean"] + 0.1},
    }  # fmt: skip


def test_a_gain_that_may_be_nothing_has_no_share(capsys):
    """.25 to .27 over 100 sentences: a swap that ends at .242 would have lost 140 % of it. The loss is clear."""
    base, target = np.zeros(100), np.zeros(100)
    base[:25], target[2:29] = 1, 1
    nll = np.random.default_rng(0).normal(2, 0.1, 40)
    records = [record("base", base, nll), record("target", target, nll - 0.5)]
    records += [record("semantic_hub", target - 0.028, nll - 0.3), record("random", target - 0.05, nll - 0.1)]
    gained = controls.gains(records, 7)
    units = target - base
    low, high = (float(x) for x in np.quantile(stats.resample_weights(100, 7, 2000) @ units / 100, [0.025, 0.975]))
    assert gained["retrieval_mean"] == pytest.approx({"gain": 0.02, "ci_low": low, "ci_high": high}) and low < 0
    assert gained["retrieval_best"] == gained["retrieval_mean"]
    assert gained["nll_per_byte"] == pytest.approx({"gain": 0.5, "ci_low": 0.5, "ci_high": 0.5})
    compared = controls.compare(records, "semantic_hub", 7)
    for name in ("retrieval_mean", "retrieval_best"):
        assert compared[name]["own_gain_lost"] is compared[name]["random_gain_lost"] is None
        assert compared[name]["gain"] == gained[name] and compared[name]["rank"] == 1
    assert compared["nll_per_byte"]["own_gain_lost"] == pytest.approx(0.4)
    assert compared["nll_per_byte"]["random_gain_lost"] == pytest.approx(0.8)
    rows = controls.summary(records, 7)
    assert [row["gain_lost"]["retrieval_mean"] for row in rows] == [None] * 4
    assert [row["gain_lost"]["nll_per_byte"] for row in rows] == pytest.approx([1, 0, 0.4, 0.8])
    controls.say(rows, compared)
    said = capsys.readouterr().out
    assert "retrieval (published), mean over layers: it is not clear that CPT gained anything (+0.0200 [-0.0" in said
    assert "nll_per_byte 1.694" in said and said.count("of the gain lost") == 1 and "(40% of the gain lost)" in said
    ends = {"base": target, "target": target - 0.2, "semantic_hub": target, "random": target}
    worse = [record(name, units) for name, units in ends.items()]
    controls.say(controls.summary(worse, 7), controls.compare(worse, "semantic_hub", 7))
    assert "CPT lost, and gained nothing (-0.2000 [-0.2000, -0.2000]), so no share" in capsys.readouterr().out
    # The same difference in four times the sentences is clear, and so is what is lost of it.
    many = [record(row["name"], np.repeat(row["units"]["retrieval_mean"], 40)) for row in records]
    assert controls.compare(many, "semantic_hub", 7)["retrieval_mean"]["own_gain_lost"] == pytest.approx(1.4)


def test_a_shared_place_and_a_failed_gate_are_no_success(capsys):
    equal = [record("random", [0.5] * 9, layers=[i]) for i in range(19)]
    records = [record("base", [0.2] * 9), record("target", [0.6] * 9), record("semantic_hub", [0.5] * 9), *equal]
    compared = controls.compare(records, "semantic_hub", 1)
    assert (compared["retrieval_mean"]["rank"], compared["retrieval_mean"]["n_equal"]) == (1, 19)
    controls.say(controls.summary(records, 1), compared, {"passed": True})
    said = capsys.readouterr().out
    assert "rank 1 of 20 (with 19 others), p = 1.000 for costing less" in said and "gate" not in said
    controls.say(controls.summary(records, 1), compared, {"passed": False})
    assert "none of these ranks means anything: the layers did not pass the gate" in capsys.readouterr().out


def refused(match, *argv):
    with pytest.raises(InputError, match=match) as caught:
        SWAP.main([str(a) for a in argv])
    assert "\n" not in str(caught.value)


def test_bad_input(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, target, layers = (shared / p for p in ("base", "run/checkpoint-20", "layers.json"))
    out = ("-o", tmp_path / "out")
    refused("nothing says base: give BASE")
    refused("no such folder", base, tmp_path / "none", layers, *out)
    refused("where the result goes", base, target, layers)
    refused("does not exist", base, target, tmp_path / "none.json", *out)
    refused(r"base holds config\.json, which does not belong to a layer swap", base, target, layers, "-o", base)
    refused("is a file", base, target, layers, "-o", layers)
    for text, match in (
        ('{"interface_layers": [0, 9]}', "names layer 9; the model has layers 0 to 3"),
        ('{"interface_layers": "0"}', "no list interface_layers"),
        ('{"layers": [0]}', "no list interface_layers"),
        ('{"interface_layers": [0, 1, 2, 3]}', "no layer is left"),
        ("{", "not valid JSON"),
        ('{"_header": {"schema": "layer-specialize", "n_layers": 8}, "interface_layers": [0]}', "n_layers 8"),
        ('{"_header": {"schema": "sentence-retrieval"}, "interface_layers": [0]}', "sentence-retrieval"),
        ('{"_header": {"schema": "layer-specialize", "limit": 5}, "interface_layers": [0]}', "--limit 5"),
        (
            '{"_header": {"schema": "layer-specialize", "models": {"model": {"spec": "org/other", "step": null}}}, '
            '"interface_layers": [0]}',
            "was made from org/other, neither the base nor",
        ),
    ):
        (tmp_path / "bad.json").write_text(text)
        refused(match, base, target, tmp_path / "bad.json", *out)
    ours = {"schema": "layer-specialize", "models": {"model": refs.model(str(shared / "run/checkpoint-5")).describe()}}
    (tmp_path / "run.json").write_text(json.dumps({"_header": ours, **LAYERS}))  # another checkpoint of the same run
    SWAP.main([str(a) for a in (base, target, tmp_path / "run.json", "-o", tmp_path / "fine", "--methods", "random")])
    deep = save_tiny("llama", tmp_path / "deep", layers=5)
    refused("5 layers .*target must have the same|deep has 5 layers", deep, target, layers, *out)
    refused("which languages", base, target, layers, *out, "--controls", "2")
    refused("no held-out text", base, target, layers, *out, "--controls", "2", "--measures", "nll")
    refused("no rows", base, target, layers, *out, "--in-memory", "--measures", "task")
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, match in (("none.txt", "does not exist"), ("empty.txt", "holds no text")):
        refused(match, base, target, layers, *out, "--controls", "2", "--measures", "nll", "--heldout", tmp_path / name)
    for wrong in ("some", "0", "-3"):
        with pytest.raises(SystemExit) as caught:
            SWAP.main([*map(str, (base, target, layers, *out)), f"--controls={wrong}"])
        assert caught.value.code == 2
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_by_hand_leaves_the_study_s_place_free(shared, study):
    SWAP.main([str(shared / "base"), str(shared / "run/checkpoint-5"), "--methods", "random"])
    SWAP.main(["--steps", "5", "--methods", "random"])  # the same
    place = study / "results"
    assert sorted(p.name for p in place.iterdir()) == ["layer-specialize", "layer-swap.run__checkpoint-5"]
    SWAP.main([str(shared / "base"), str(shared / "run/checkpoint-20"), "--methods", "random"])  # the study's own
    SWAP.main([])
    assert sorted(p.name for p in (place / "layer-swap").iterdir()) == ["metadata.json", "random", "semantic_hub"]
