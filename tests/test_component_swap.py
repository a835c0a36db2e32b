"""attn_int_swap.py and ffn_lsn_swap.py: bits that change and bits that stay, runs on disk, controls, refusals."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import bits, failed_gate, killed, load_script, read_tensors, same_results, save_run, save_study, save_tiny
from launch import launch

from cpt_utils.architectures import archs
from cpt_utils.base import cli, results, sources, stats
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs, tokenization
from cpt_utils.interventions import components, on_disk, surgery
from cpt_utils.measures import controls, evaluation
from cpt_utils.models import loading

ATTENTION = load_script("component-swap/attn_int_swap.py")
FFN = load_script("component-swap/ffn_lsn_swap.py")
component_swap = ATTENTION.component_swap
INTERFACE, RICH = [0, 3], [2, 3]
NAMED = [
    "attention_interface", "attention_lsn_rich", "ffn_interface", "ffn_lsn_rich",
    "attention_interface_embeddings", "attention_lsn_rich_embeddings", "ffn_interface_embeddings",
    "ffn_lsn_rich_embeddings", "embeddings",
]  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A base and a run of 4 layers, 12 sentence pairs, 6 documents."""
    root = tmp_path_factory.mktemp("study")
    save_study(root)
    (root / "interface.json").write_text(json.dumps({"interface_layers": INTERFACE}))
    (root / "rich.json").write_text(json.dumps(RICH))
    return root


@pytest.fixture
def study(shared, tmp_path, monkeypatch):
    """A study.yaml in the current folder, with the two files of layers in their places."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(
        f"""
name: tiny
base: {shared}/base
run: {shared}/run
languages: {{base: eng_Latn, target: qaa_Latn}}
data:
  source: text
  base_file: {shared}/eng.txt
  target_file: {shared}/qaa.txt
  heldout: {{qaa_Latn: {shared}/heldout.txt}}
results: results
"""
    )
    ours = {"models": {"model": refs.model(str(shared / "run/checkpoint-20")).describe()}, "n_layers": 4}
    place = tmp_path / "results" / "layer-specialize" / "layers.json"
    results.write_json(place, {"interface_layers": INTERFACE}, results.header("layer-specialize", **ours))
    place = tmp_path / "results" / "lsn" / "result" / "tiny.layers.json"
    head = results.header("lsn-layers", **ours)
    results.write_list(place, "layers", {"layers": RICH, "language": "qaa_Latn"}, head)
    return tmp_path


def test_a_failed_gate_goes_on_and_is_said(study, capsys):
    """Both files of layers carry it: said once, and in the header of what is written."""
    for name in ("layer-specialize/layers.json", "lsn/result/tiny.layers.facts.json"):
        path = study / "results" / name
        content = json.loads(path.read_text())
        content["_header"]["gate"] = failed_gate()
        path.write_text(json.dumps(content))
    out = study / "results/component-swap/attn_int_swap"
    for flags, file in (["--steps", "20"], "metadata"), (["--controls", "2", "--measures", "retrieval"], "controls"):
        ATTENTION.main(flags)
        assert results.read_json(out / f"{file}.json")[1]["gate"] == failed_gate()
        captured = capsys.readouterr()
        assert captured.err.count("everything built on them mean nothing") == 1
    assert "none of these ranks means anything" in captured.out


def attention(shared, out, *more):
    models = ["--base-model", shared / "base", "--checkpoint-dir", shared / "run"]
    return [str(a) for a in (*models, "--layer-selection", shared / "interface.json", "--output-dir", out, *more)]


def ffn(shared, out, *more):
    models = ["--base-model", shared / "base", "--checkpoint-dir", shared / "run"]
    return [str(a) for a in (*models, "--layer-list", shared / "rich.json", "--output-dir", out, *more)]


def expected(base, target, arch, config, projections, layers):
    """What a swap should give, written out by hand for every layout: entry by entry, from base or target."""
    made = {name: tensor.clone() for name, tensor in target.items()}
    hidden, heads, width = 32, 4, 48
    for layer in layers:
        at = next(n for n in target if f".{layer}." in n).split(f".{layer}.")[0] + f".{layer}."
        for name in (n for n in target if n.startswith(at)):
            tail, mine, theirs = name.removeprefix(at), made[name], base[name]
            if arch == "gpt2":  # [in, out]; q, k, v side by side in the columns
                module = {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"}
                kind = module.get(tail.rpartition(".")[0])
                if kind == "qkv" and "q_proj" in projections:
                    mine[..., : 3 * hidden] = theirs[..., : 3 * hidden]
                elif kind and f"{kind}_proj" in projections:
                    mine.copy_(theirs)
            elif arch == "gpt_neox":  # rows: for every head its q, k, v
                module = {"dense": "o", "dense_h_to_4h": "up", "dense_4h_to_h": "down"}
                kind = module.get(tail.split(".")[-2])
                if "query_key_value" in tail:
                    for head in range(heads):
                        for i, projection in enumerate(("q_proj", "k_proj", "v_proj")):
                            if projection in projections:
                                rows = slice((3 * head + i) * 8, (3 * head + i + 1) * 8)
                                mine[rows] = theirs[rows]
                elif kind and f"{kind}_proj" in projections:
                    mine.copy_(theirs)
            elif arch == "phi3" and "gate_up_proj" in tail:
                for i, projection in enumerate(("gate_proj", "up_proj")):
                    if projection in projections:
                        mine[i * width : (i + 1) * width] = theirs[i * width : (i + 1) * width]
            elif arch == "phi3" and "qkv_proj" in tail:
                if "q_proj" in projections:
                    mine.copy_(theirs)
            elif any(f"{projection}." in tail for projection in projections):
                mine.copy_(theirs)
    return made


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3"])
def test_every_bit_of_the_written_models(arch, tmp_path):
    """The declared slices are the base's, biases too; not one bit differs elsewhere."""
    save_tiny(arch, tmp_path / "base", seed=0, layers=3)
    save_tiny(arch, tmp_path / "run" / "checkpoint-7", seed=1, layers=3, shards=2)
    (tmp_path / "layers.json").write_text('{"layers": [1, 2], "interface_layers": [0, 2]}')
    base, target = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "run" / "checkpoint-7")
    common = ["--base-model", str(tmp_path / "base"), "--checkpoint-dir", str(tmp_path / "run")]
    for script, flag, name, layers, projections in (
        (ATTENTION, "--layer-selection", "attn", [0, 2], archs.ATTENTION),
        (FFN, "--layer-list", "ffn", [1, 2], archs.FFN),
    ):
        out = tmp_path / name
        script.main([*common, flag, str(tmp_path / "layers.json"), "--output-dir", str(out)])
        made = read_tensors(out / "checkpoint-7")
        wanted = expected(base, target, arch, None, projections, layers)
        assert made.keys() == target.keys() == wanted.keys()
        changed = {key for key in made if not torch.equal(bits(made[key]), bits(target[key]))}
        for key in made:
            assert torch.equal(bits(made[key]), bits(wanted[key])), key
        assert changed
        biases = sum(key.endswith("bias") for key in changed)
        per_layer = {"llama": (0, 0), "phi3": (0, 0), "qwen2": (3, 0), "gpt2": (2, 2), "gpt_neox": (2, 2)}
        assert biases == 2 * per_layer[arch][script is FFN]
        moved = sum(int((wanted[key] != target[key]).sum()) for key in made)
        told = json.loads((out / "metadata.json").read_text())
        assert told["parameters_from_base"] >= moved  # equal numbers in both models are moved, too
        assert told["parameters_from_base"] - moved < 20
        loading.load_model(refs.model(out / "checkpoint-7"), torch.float32, torch.device("cpu"))


def test_a_run_on_disk(shared, tmp_path, capsys):
    out = tmp_path / "out"
    FFN.main(ffn(shared, out))
    payload, head = results.read_json(out / "metadata.json", schema="component-swap", n_layers=4)
    assert (payload["condition"], payload["component"], payload["layers"]) == ("ffn_lsn_rich", "ffn", RICH)
    assert payload["projections"] == list(archs.FFN) and payload["steps"] == [5, 20]
    assert payload["base_model"] == str(shared / "base") and payload["run"] == str(shared / "run")
    total = sum(tensor.numel() for tensor in read_tensors(shared / "run/checkpoint-5").values())
    assert payload["share"] == 2 * 3 * 32 * 48 / total
    assert set(head["models"]["checkpoints"]) == {"5", "20"}
    assert [ref.step for ref in refs.run(out)] == [5, 20]
    assert "[2, 3]: the last layer (3) among them" in capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in out.glob("checkpoint-*/*")}
    FFN.main(ffn(shared, out))
    assert capsys.readouterr().out.count(": kept") == 2
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("checkpoint-*/*")}
    # A folder that a killed run left unfinished is written anew.
    (out / "checkpoint-5").rename(out / "checkpoint-5.partial")
    (out / "checkpoint-5.partial" / ".unfinished").write_text("")
    (out / "checkpoint-5.partial" / "swap.json").unlink()
    FFN.main(ffn(shared, out))
    assert capsys.readouterr().out.count(": kept") == 1
    assert {path.name for path in out.iterdir()} == {"checkpoint-5", "checkpoint-20", "metadata.json"}

    with pytest.raises(InputError, match=r"checkpoint-\d+ would remain|describes another swap \(component ffn"):
        ATTENTION.main(attention(shared, out))
    (tmp_path / "other.json").write_text("[1]")
    again = ffn(shared, out)
    again[again.index("--layer-list") + 1] = str(tmp_path / "other.json")
    with pytest.raises(InputError, match=r"describes another swap \(layers \[2, 3\], now \[1\]\)"):
        FFN.main(again)
    (out / "metadata.json").unlink()
    with pytest.raises(InputError, match="holds another swap"):
        FFN.main(again)
    with pytest.raises(InputError, match="checkpoint-5 would remain, but is not of this swap"):
        FFN.main([*again, "--overwrite", "--steps", "20"])
    FFN.main([*again, "--overwrite"])
    assert results.read_json(out / "metadata.json")[0]["layers"] == [1]


def test_a_part_of_the_run_grows(shared, tmp_path):
    ATTENTION.main(attention(shared, tmp_path / "out", "--steps", "20"))
    assert results.read_json(tmp_path / "out" / "metadata.json")[0]["steps"] == [20]
    ATTENTION.main(attention(shared, tmp_path / "out", "--steps", "5"))
    assert results.read_json(tmp_path / "out" / "metadata.json")[0]["steps"] == [5, 20]


def test_controls_against_written_folders(shared, study):
    """Every condition's numbers are those of the folder it would write, and of the folder's own retrieval run."""
    ATTENTION.main(["--controls", "all"])
    out = study / "results" / "component-swap" / "attn_int_swap"
    assert sorted(p.name for p in out.iterdir()) == ["controls.json", "controls.pdf", "controls.png", "controls.pt"]
    payload, _ = results.read_json(out / "controls.json", schema="swap-controls", n_layers=4)
    assert (payload["own"], payload["step"], payload["left_out"]) == ("attention_interface", 20, {})
    assert payload["layers"] == {"interface": INTERFACE, "lsn_rich": RICH} and not payload["places_coincide"]
    assert payload["lsn_rich_holds"] == {"first_layer": False, "last_layer": True}
    assert payload["n_possible_sets"] == 6 and payload["enumerated"]
    sets = payload["sets"]
    assert [row["name"] for row in sets] == ["base", "target", *NAMED, *["random"] * 10]
    assert [row["component"] for row in sets[11:]] == ["attention"] * 5 + ["ffn"] * 5
    others = [row["layers"] for row in sets[11:16]]
    assert others == [row["layers"] for row in sets[16:]]
    assert sorted([*others, INTERFACE]) == [list(s) for s in combinations(range(4), 2)]

    test = evaluation.Test(
        pairs=sources.parallel(
            "text", "eng_Latn", "qaa_Latn", base_file=shared / "eng.txt", target_file=shared / "qaa.txt"
        ),
        heldout=[("", line) for line in (shared / "heldout.txt").read_text().splitlines()],
        retrieve=component_swap.retrieval.of_pairs,
    )
    rows = {name: sets[controls.find(sets, name)] for name in NAMED}
    with surgery.Pair(shared / "base", shared / "run/checkpoint-20") as pair:
        for name, row in {**rows, "random": sets[-1]}.items():
            condition = component_swap.ComponentSwap(
                name, row["component"].partition("+")[0], tuple(row["layers"]), "embeddings" in row["component"]
            )
            if name == "embeddings":
                condition = component_swap.ComponentSwap(name, None, embeddings=True)
            recipe = component_swap.recipe_of(components.Recipes(pair), condition)
            on_disk.write_model(pair, recipe, study / name)
            ref = refs.model(study / name)
            model = loading.load_model(ref, torch.float32, torch.device("cpu"))
            found = test.on(model, pair.arch, tokenization.load_tokenizer(ref), "x")
            assert found["values"] == row["values"] and found["layer_accuracy"] == row["layer_accuracy"], name
            moved, total = pair.share(recipe)
            assert row["share"] == moved / total
        made, base = read_tensors(study / "ffn_lsn_rich_embeddings"), read_tensors(shared / "base")
        for key in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.2.mlp.up_proj.weight"):
            assert torch.equal(made[key], base[key])
    # The folders that the scripts themselves write are the same models.
    ATTENTION.main(["--steps", "20", "--crossed-folders", "ffn_lsn_rich", "ffn_interface_embeddings"])
    for name, folder in (
        ("attention_interface", out),
        ("ffn_lsn_rich", out.with_name(out.name + ".ffn_lsn_rich")),
        ("ffn_interface_embeddings", out.with_name(out.name + ".ffn_interface_embeddings")),
    ):
        one, other = read_tensors(folder / "checkpoint-20"), read_tensors(study / name)
        assert one.keys() == other.keys() and all(torch.equal(bits(one[key]), bits(other[key])) for key in one)
        assert results.read_json(folder / "metadata.json")[0]["condition"] == name
    retrieval = cli.sibling("sentence-retrieval/sr_experiment.py")
    retrieval.main(["--model_path", str(out), "--artifact-out", "sr", "--no-untrained"])
    measured = json.loads(next((study / "sr" / "eng_Latn-qaa_Latn").glob("*checkpoint-20.json")).read_text())
    accuracy = [value for _, value in measured["layer_accuracy"]]
    assert accuracy == rows["attention_interface"]["layer_accuracy"]

    units = results.read_tensors(out / "controls.pt")
    for i, row in enumerate(sets):
        assert units["nll_per_byte"][i].double().mean().item() == pytest.approx(row["values"]["nll_per_byte"], rel=1e-6)
        assert ("change" in row) == (row["name"] != "random")
    row, target = rows["ffn_lsn_rich"], units["nll_per_byte"][1].double().numpy()
    mine = units["nll_per_byte"][controls.find(sets, "ffn_lsn_rich")].double().numpy()
    low, high = stats.bootstrap_mean(mine, 42)
    assert (row["ci_low"]["nll_per_byte"], row["ci_high"]["nll_per_byte"]) == pytest.approx((low, high), rel=1e-5)
    low, high = stats.bootstrap_mean(mine - target, 42)
    change = row["change"]["nll_per_byte"]
    assert (change["ci_low"], change["ci_high"]) == pytest.approx((low, high), rel=1e-3, abs=1e-6)

    # Places: the same component and number of layers; a crossed set stands among the random ones and the script's own.
    assert {name for name in NAMED if "place" in rows[name]} == {"attention_interface", "attention_lsn_rich"}
    place = rows["attention_lsn_rich"]["place"]["nll_per_byte"]
    others = [r["values"]["nll_per_byte"] for r in [sets[2], *sets[11:16]] if r["layers"] != RICH]
    assert place["n_random"] == len(others) == 5 and place["random_mean"] == pytest.approx(np.mean(others))
    comparison = payload["comparison"]["nll_per_byte"]
    own = rows["attention_interface"]["place"]["nll_per_byte"]
    assert own == {key: comparison[key] for key in own}

    component_swap.shown.draw(study / "again", {key: value for key, value in payload.items() if key != "request"})
    assert (study / "again.png").read_bytes() == (out / "controls.png").read_bytes()


def test_controls_go_on_after_a_kill(study, capsys):
    """Killed after the second set, then run again: the same result as an unbroken run, measured sets not repeated."""
    flags = ["--controls", "2", "--measures", "nll"]
    FFN.main([*flags, "--output-dir", "unbroken"])
    killed(lambda: FFN.main([*flags, "--output-dir", "out"]), evaluation.Test, "on", 3)
    assert not (study / "out" / "controls.json").exists()
    capsys.readouterr()
    FFN.main([*flags, "--output-dir", "out"])
    assert "3 of 13 sets were measured before" in capsys.readouterr().out
    found = same_results(study / "unbroken/controls.json", study / "out/controls.json")
    assert [row["name"] for row in found["sets"][2:6]] == [
        "ffn_lsn_rich", "ffn_interface", "attention_lsn_rich", "attention_interface",
    ]  # fmt: skip
    assert (study / "unbroken" / "controls.pt").read_bytes() == (study / "out" / "controls.pt").read_bytes()
    FFN.main([*flags, "--output-dir", "out"])
    assert "kept" in capsys.readouterr().out
    with pytest.raises(InputError, match="another request"):
        FFN.main(["--controls", "3", "--measures", "nll", "--output-dir", "out"])


@pytest.mark.slow
def test_two_processes_measure_what_one_does(study):
    flags = ["--controls", "2", "--measures", "nll", "--output-dir"]
    for script, name in ((ATTENTION, "attn_int_swap"), (FFN, "ffn_lsn_swap")):
        script.main([*flags, f"{name}.one"])
        launch(f"component-swap/{name}.py", *flags, f"{name}.two")
        same_results(study / f"{name}.one/controls.json", study / f"{name}.two/controls.json")
        assert (study / f"{name}.one/controls.pt").read_bytes() == (study / f"{name}.two/controls.pt").read_bytes()


def made_up(interface, rich, n_layers=6, drawn=None, seed=0):
    """Records of attn_int_swap.py in which what a set costs is drawn; `drawn`: the random sets, else all others."""
    rng = np.random.default_rng(seed)

    def record(name, layers=(), component=None):
        units = {"nll_per_byte": rng.normal(1, 0.3, 20).tolist()}
        row = {"name": name, "layers": list(layers), "units": units, "component": component}
        return row | {"values": {"nll_per_byte": float(np.mean(units["nll_per_byte"]))}}

    every = [list(s) for s in combinations(range(n_layers), len(interface)) if list(s) != interface]
    places = {"interface": interface, "lsn_rich": rich}
    named = [(f"{kind}_{place}", places[place], kind) for kind in ("attention", "ffn") for place in places]
    sets = [("random", layers, kind) for kind in ("attention", "ffn") for layers in drawn or every]
    return [record("base"), record("target"), *(record(*one) for one in [*named, *sets])]


@pytest.mark.parametrize("drawn", [None, [[0, 1], [2, 3], [4, 5], [3, 4]]])
def test_pairs_of_attention_and_ffn_are_those_of_the_slow_way(drawn):
    """Costs of all pairs of sets, the own row and column among them; the same difference in the same layers."""
    interface, rich = [0, 5], [3, 4]
    records = made_up(interface, rich, drawn=drawn)
    found = component_swap.shown.pairs(records, "attention_interface", 7)["pairs"]["nll_per_byte"]
    cost = {}
    for row in records[2:]:  # where a set was measured under a name and as a random one, the name counts
        lost = row["values"]["nll_per_byte"] - records[1]["values"]["nll_per_byte"]
        cost.setdefault((row["component"], tuple(row["layers"])), lost)
    sets = [tuple(s) for s in [interface, *(drawn or combinations(range(6), 2))]]
    sides = [{(kind, layers) for layers in sets} for kind in ("attention", "ffn")]
    grid = [cost[one] - cost[other] for one in sides[0] for other in sides[1]]
    row, own = found["crossed"], cost["attention", (0, 5)] - cost["ffn", (3, 4)]
    assert row["n_pairs"] == len(grid) == len(set(sets)) ** 2 and row["own"] == pytest.approx(own)
    assert row["rank"] == 1 + sum(d > own + 1e-9 for d in grid)
    assert row["p_value"] == sum(d >= own - 1e-9 for d in grid) / len(grid)
    assert row["p_opposite"] == sum(d <= own + 1e-9 for d in grid) / len(grid)
    units = np.subtract(records[2]["units"]["nll_per_byte"], records[5]["units"]["nll_per_byte"])
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(stats.bootstrap_mean(units, 7))
    for place, layers in (("interface", (0, 5)), ("lsn_rich", (3, 4))):
        row = found["same_layers"][place]
        differences = {s: cost["attention", s] - cost["ffn", s] for s in sets}
        own = differences.pop(layers)
        assert row["own"] == pytest.approx(own) and row["n_random"] == len(differences)
        assert row["rank"] == 1 + sum(d > own for d in differences.values())
        assert row["p_value"] == (1 + sum(d >= own for d in differences.values())) / (1 + len(differences))
        assert row["random_mean"] == pytest.approx(np.mean(list(differences.values())))


def test_places_of_two_sizes_are_no_pair():
    """More layers cost more: nothing is said of them as a pair, but of the one that has its random sets."""
    records = made_up([0, 5], [2, 3, 4])
    found = component_swap.shown.pairs(records, "attention_interface", 7)["pairs"]["nll_per_byte"]
    assert found["crossed"] is None and found["same_layers"]["lsn_rich"] is None
    assert found["same_layers"]["interface"]["n_random"] == 14
    alone = [row for row in records if row["component"] != "ffn" or row["name"] != "random"]
    assert component_swap.shown.pairs(alone, "attention_interface", 7) == {}


def test_which_sets_are_measured_beside_the_crossed_ones():
    """The same random sets for both components in attention's file; matched sets of each that are not among them."""
    lists = {"interface": [0, 2, 3, 5], "lsn_rich": [1, 3, 4, 6]}
    having = {"attention": list(range(8)), "ffn": [0, 1, 2, 3, 4, 5, 6]}
    drawn = [[0, 1, 2, 3], [0, 2, 4, 5], [4, 5, 6, 7]]
    wanted = component_swap.crossed("attention_interface", lists, having)
    found = component_swap._controls(wanted, drawn, having, 0)
    assert found[:5] == [
        *(("random", "attention", layers) for layers in drawn), *(("random", "ffn", layers) for layers in drawn[:2]),
    ]  # fmt: skip
    mates = [0, 1, 3, 5], [1, 2, 4, 6], [1, 3, 5, 6]  # and [0, 2, 4, 5], which was drawn
    assert found[5:] == [("matched", kind, layers) for kind in having for layers in mates]
    alone = component_swap._controls(component_swap.crossed("ffn_lsn_rich", lists, having), drawn, having, 0)
    assert {kind for _, kind, _ in alone} == {"ffn"}


def test_places_that_coincide(study, shared, capsys):
    (study / "same.json").write_text(json.dumps({"layers": INTERFACE[::-1]}))
    flags = ["--controls", "1", "--measures", "nll", "--limit", "3", "--layer-list", "same.json"]
    ATTENTION.main([*flags, "--output-dir", "out"])
    told = capsys.readouterr().out
    assert "the same: each crossed pair is one swap" in told
    assert "the first layer (0) and the last layer (3) among them" in told
    payload, _ = results.read_json(study / "out" / "controls.json", allow_limited=True)
    assert payload["places_coincide"]
    assert [(row["name"], row.get("also")) for row in payload["sets"][2:7]] == [
        ("attention_interface", ["attention_lsn_rich"]),
        ("ffn_interface", ["ffn_lsn_rich"]),
        ("attention_interface_embeddings", ["attention_lsn_rich_embeddings"]),
        ("ffn_interface_embeddings", ["ffn_lsn_rich_embeddings"]),
        ("embeddings", None),
    ]
    assert controls.find(payload["sets"], "ffn_lsn_rich") == 3
    assert controls.find(payload["sets"], "ffn_nowhere") is None
    with pytest.raises(InputError, match="attention_lsn_rich is the same swap as attention_interface"):
        ATTENTION.main(["--layer-list", "same.json", "--output-dir", "x", "--crossed-folders", "attention_lsn_rich"])
    assert not Path("x").exists()


def test_outside_a_study_and_another_vocabulary(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    measured = ["--controls", "1", "--measures", "nll", "--heldout", shared / "heldout.txt", "--limit", "2"]
    ATTENTION.main(attention(shared, "alone", *measured))
    assert "without --layer-list the crossed controls are left out" in capsys.readouterr().out
    payload, _ = results.read_json("alone/controls.json", allow_limited=True)
    assert [row["name"] for row in payload["sets"]] == ["base", "target", "attention_interface", "random"]

    save_run("llama", tmp_path / "wide", (3, 4), layers=4, vocab_size=280)
    arguments = attention(shared, "wider", *measured, "--layer-list", shared / "rich.json")
    arguments[arguments.index("--checkpoint-dir") + 1] = str(tmp_path / "wide")
    ATTENTION.main(arguments)
    assert "left out: attention_interface_embeddings, " in capsys.readouterr().out
    payload, _ = results.read_json("wider/controls.json", allow_limited=True)
    assert set(payload["left_out"]) == {name for name in NAMED if "embeddings" in name}
    assert [row["name"] for row in payload["sets"]] == ["base", "target", *NAMED[:4], "random", "random"]
    given = {flag: arguments[arguments.index(flag) + 1] for flag in ("--base-model", "--layer-selection")}
    flags = [str(word) for pair in given.items() for word in pair]
    ATTENTION.main([*flags, "--checkpoint-dir", str(tmp_path / "wide"), "--output-dir", "written"])
    assert capsys.readouterr().out.count("base and target also differ outside the swap") == 1  # of two checkpoints


def test_tied_heads_and_crossed_folders(tmp_path):
    """A tied head has no tensor of its own: the embeddings alone are put back."""
    config = {"layers": 2, "tie_word_embeddings": True}
    save_tiny("llama", tmp_path / "base", seed=0, **config)
    save_tiny("llama", tmp_path / "run" / "checkpoint-7", seed=1, **config)
    (tmp_path / "layers.json").write_text('{"layers": [1], "interface_layers": [0]}')
    flags = {"base-model": "base", "checkpoint-dir": "run", "layer-selection": "layers.json"}
    flags |= {"layer-list": "layers.json", "output-dir": "out"}
    arguments = [word for flag, place in flags.items() for word in (f"--{flag}", str(tmp_path / place))]
    FFN.main([*arguments, "--crossed-folders"])
    wanted = {"out", "out.ffn_interface", "out.attention_interface", "out.attention_lsn_rich"}
    assert {path.name for path in tmp_path.glob("out*")} == wanted
    FFN.main([*arguments, "--crossed-folders", "ffn_lsn_rich_embeddings"])
    made = read_tensors(tmp_path / "out.ffn_lsn_rich_embeddings" / "checkpoint-7")
    base, target = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "run" / "checkpoint-7")
    changed = {key for key in made if not torch.equal(made[key], target[key])}
    assert changed == {"model.embed_tokens.weight"} | {f"model.layers.1.mlp.{name}.weight" for name in archs.FFN}
    assert all(torch.equal(made[key], base[key]) for key in changed)


def refused(script, match, *argv):
    with pytest.raises(InputError, match=match) as caught:
        script.main([str(a) for a in argv])
    assert "\n" not in str(caught.value)


def test_bad_input(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, out = ffn(shared, "out")[:4], ("--output-dir", "out")
    layers = ("--layer-list", shared / "rich.json")
    refused(FFN, "nothing says base: give --base-model")
    refused(FFN, "give --checkpoint-dir", *good[:2])
    refused(FFN, "where the result goes: give --output-dir", *good, *layers)
    refused(FFN, "the result of lsn/identify.py is: give --layer-list", *good, *out)
    refused(ATTENTION, "layer_specialize.py is: give --layer-selection", *good, *out)
    refused(FFN, "no checkpoint of step 6; the run has 5, 20", *good, *layers, *out, "--steps", "6")
    refused(FFN, "is the run that is swapped", *good, *layers, "--output-dir", shared / "run")
    refused(FFN, r"holds config\.json, which does not belong to a", *good, *layers, "--output-dir", good[1])
    refused(FFN, "is a file", *good, *layers, "--output-dir", shared / "rich.json")
    refused(FFN, "--controls writes no folders", *good, *layers, *out, "--controls", "2", "--crossed-folders")
    refused(FFN, "give --layer-selection", *good, *layers, *out, "--crossed-folders")
    both = (*layers, "--layer-selection", shared / "interface.json")
    refused(FFN, "no condition ffn_hub; there are ffn_interface, ", *good, *both, *out, "--crossed-folders", "ffn_hub")
    refused(FFN, "no condition ffn_lsn_rich;", *good, *both, *out, "--crossed-folders", "ffn_lsn_rich")
    refused(FFN, "no held-out text", *good, *layers, *out, "--controls", "2", "--measures", "nll")
    other = {"spec": "org/other", "step": None, "model_id": "org__other"}
    for text, match in (
        ("[]", "names no layer: there is nothing to swap"),
        ("[1, 4]", "names layer 4; the model has layers 0 to 3"),
        ("[-1]", "names layer -1"),
        ('["1"]', "no list layers; give the file of lsn/identify.py"),
        ('{"interface_layers": [0]}', "no list layers"),
        ("{", "not valid JSON"),
        ('{"_header": {"schema": "lsn-layers", "n_layers": 8}, "layers": [0]}', "n_layers 8, but 4 is needed"),
        ('{"_header": {"schema": "lsn-mask"}, "layers": [0]}', "lsn-mask"),
        (json.dumps({"_header": {"schema": "lsn-layers", "models": {"model": other}}, "layers": [0]}), "org/other"),
    ):
        (tmp_path / "bad.json").write_text(text)
        refused(FFN, match, *good, "--layer-list", "bad.json", *out)
    (tmp_path / "all.json").write_text("[0, 1, 2, 3]")
    refused(
        FFN, "no other set of that size", *good, "--layer-list", "all.json", *out, "--controls", "2",
        "--measures", "nll", "--heldout", shared / "heldout.txt",
    )  # fmt: skip
    save_tiny("llama", tmp_path / "deep" / "checkpoint-3", layers=5)
    refused(FFN, "4 layers .* 5; base and target must", *good[:2], "--checkpoint-dir", "deep", *layers, *out)
    (tmp_path / "out").mkdir()
    save_tiny("llama", tmp_path / "out" / "checkpoint-9", layers=4)
    refused(FFN, "checkpoint-9 would remain", *good, *layers, *out)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-9"]
    for wrong in ("some", "0"):
        with pytest.raises(SystemExit) as caught:
            FFN.main([*good, f"--controls={wrong}"])
        assert caught.value.code == 2


def test_neurons_of_another_language_are_named(study, capsys):
    place = study / "results" / "lsn" / "result" / "tiny.layers.facts.json"
    place.write_text(place.read_text().replace("qaa_Latn", "fra_Latn"))
    FFN.main(["--steps", "20"])
    assert "is about the neurons of fra_Latn, not of qaa_Latn" in capsys.readouterr().err
    assert refs.is_run("results/component-swap/ffn_lsn_swap")
