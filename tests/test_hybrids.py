"""Models whose layers differ, through the scripts: no attention here, no FFN there, experts with an FFN beside them.

Qwen 3.5 has linear attention in some layers; a layer of Nemotron-H is Mamba, a mixture of experts, attention or an FFN.
"""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from helpers import load_script, read_tensors, save_tiny
from test_activation import ACTIVATION, write_ids

from cpt_utils.architectures import archs
from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.interventions import activations
from cpt_utils.measures import controls, counts, masks
from cpt_utils.models import loading

ATTN_VS_FFN = load_script("weight-diff/attn_vs_ffn.py")
INT_AND_SEM = load_script("weight-diff/int_and_sem.py")
GATE_LSN = load_script("weight-diff/gate_lsn.py")
CORRELATION = load_script("activation-correlation/activation-correlation.py")
FOLLOWED = load_script("lsn/lsn_activation_cpt.py")
IDENTIFY = load_script("lsn/identify.py")
COMPONENT_SWAP = load_script("component-swap/component_swap.py")
ATTENTION_SWAP = load_script("component-swap/attn_int_swap.py")
# Of layers: what each has, as the type's definition says.
HAVE = {
    "qwen3_5_text": [("self_attn", "mlp"), ("mlp",), ("self_attn", "mlp")],
    "nemotron_h": [(), ("experts", "shared_experts"), ("attention",), ("mlp",)],
}


@pytest.fixture(scope="module", params=list(HAVE))
def run(request, tmp_path_factory):
    """A base and a run of one checkpoint."""
    root = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, root / "base")
    save_tiny(request.param, root / "run" / "checkpoint-5", seed=5)
    return request.param, root


def changes_by_hand(model_type: str, root) -> list[dict[str, float]]:
    """Mean |dW| of every projection of every layer, from the tensors on disk and their names."""
    base, other = (read_tensors(root / folder) for folder in ("base", "run/checkpoint-5"))
    found = []
    for layer, parts in enumerate(HAVE[model_type]):
        inside = {
            n.split(f"layers.{layer}.")[1]: n for n in base if f"layers.{layer}." in n and n.endswith("_proj.weight")
        }
        moved = {short: (other[n].double() - base[n].double()).abs() for short, n in inside.items()}
        wanted = set()
        if {"self_attn", "attention"} & {*parts}:
            wanted |= {"q_proj", "k_proj", "v_proj", "o_proj"}
        if {"mlp", "experts"} & {*parts}:
            wanted |= {"up_proj", "down_proj"} | ({"gate_proj"} if model_type == "qwen3_5_text" else set())
        own = {}
        for name in wanted:
            several = [t.flatten() for n, t in moved.items() if n.split(".")[-2] == name and "linear_attn" not in n]
            own[name] = torch.cat(several).mean().item()
        found.append(own)
    return found


def test_weight_change(run, tmp_path, capsys):
    """Layers enter the means of what they have; the others are named, and have null."""
    model_type, root = run
    flags = ["--base-model", str(root / "base"), "--output", str(tmp_path / "out.json")]
    ATTN_VS_FFN.main([*flags, "--ckpt-model", str(root / "run"), "--details"])
    said = capsys.readouterr().out
    row = results.read_json(tmp_path / "out.json", "attn_vs_ffn")[0]["checkpoints"]["5"]
    slow = changes_by_hand(model_type, root)
    sides = {"attention": ("q", "k", "v", "o"), "ffn": ("gate", "up", "down")}
    highest = {side: {} for side in sides}
    for layer, own in enumerate(slow):
        here = row["layers"][f"layer_{layer}"]
        assert {name: here[name] for name in here if name.endswith("_proj")} == pytest.approx(own, rel=1e-6)
        for side, names in sides.items():
            values = [own[f"{name}_proj"] for name in names if f"{name}_proj" in own]
            assert here[f"{side}_max"] == (pytest.approx(max(values), rel=1e-6) if values else None)
            assert here[f"{side}_mean"] == (pytest.approx(np.mean(values), rel=1e-6) if values else None)
            highest[side] |= {layer: max(values)} if values else {}
        both = all(layer in highest[side] for side in sides)
        assert (here["delta_attn_ffn"] is not None) == both
    assert row["summary"] == pytest.approx(
        {"attn": np.mean([*highest["attention"].values()]), "ffn": np.mean([*highest["ffn"].values()])}, rel=1e-6
    )
    shared = set(highest["attention"]) & set(highest["ffn"])
    ahead = sum(highest["attention"][layer] > highest["ffn"][layer] for layer in shared)
    assert (
        row["attention_above_ffn"]["summary"] == ahead
        and f"{ahead} (max)" in said
        and f"of {len(shared)} layers" in said
    )
    lacking = {side: [layer for layer in range(len(slow)) if layer not in highest[side]] for side in sides}
    assert row["without"] == lacking
    instead = "linear_attn" if model_type == "qwen3_5_text" else "mixer"
    assert f"layers {lacking['attention']} have no attention ({instead} in its place); they are left out of" in said
    assert ("have no FFN; they are left out of its means" in said) == bool(lacking["ffn"])
    assert len(ATTN_VS_FFN.pairs(list(row["layers"].values()), "summary")) == len(shared)


def test_interface_and_hub(run, tmp_path, capsys):
    """The mean over the projections present, and over the layers that have some."""
    model_type, root = run
    n, slow = len(HAVE[model_type]), changes_by_hand(model_type, root)
    groups = {"interface_layers": [0, 1], "semantic_layers": list(range(2, n))}
    results.write_json(tmp_path / "layers.json", groups, results.header("layer-specialize", n_layers=n))
    flags = ["--base-model", root / "base", "--target-dir", root / "run", "--output", tmp_path / "out.json"]
    flags += ["--interface-json", tmp_path / "layers.json", "--hub-json", tmp_path / "layers.json"]
    INT_AND_SEM.main(list(map(str, flags)))
    found = results.read_json(tmp_path / "out.json", "int_and_sem")[0]
    means = [np.mean([*own.values()]) if own else None for own in slow]
    assert list(found["layers"]["5"].values()) == [m if m is None else pytest.approx(m, rel=1e-6) for m in means]
    interface = np.mean([m for m in means[:2] if m is not None])
    assert found["checkpoints"]["5"]["interface_avg"] == pytest.approx(interface, rel=1e-6)
    with pytest.raises(InputError, match=r"none of the layers \[0\] has attention or an FFN"):
        INT_AND_SEM.group_mean([None, 1.0], [0])


def test_interface_attention_of_a_hybrid():
    """Step 10: interface layers without attention enter no mean; published files have no `attention_max` at all."""
    both = {f"{name}_proj": value for name, value in zip("qkvo", (1.0, 4.0, 2.0, 3.0), strict=True)}
    layers = {"layer_0": both | {"attention_max": 4.0}, "layer_1": {"attention_max": None, "up_proj": 9.0}}
    layers["layer_2"] = {"attention_max": 2.0, "q_proj": 2.0, "o_proj": 1.0}  # another layer's keys and values
    assert CORRELATION.attention_change(layers, [0, 1]) == 4.0
    assert CORRELATION.attention_change(layers, [0, 1, 2]) == 3.0
    assert CORRELATION.attention_change({"layer_0": both}, [0]) == 4.0
    with pytest.raises(InputError, match=r"none of the interface layers \[1\] has attention"):
        CORRELATION.attention_change(layers, [1])
    with pytest.raises(KeyError):
        CORRELATION.attention_change({"layer_0": {"q_proj": 1.0}}, [0])


def test_neurons_beside_experts_and_layers_without_any(tmp_path, monkeypatch):
    """Nemotron-H: no neuron in layers 0 and 2; in layer 1 four experts of 24 and 16 beside them; 48 in layer 3."""
    monkeypatch.chdir(tmp_path)
    save_tiny("nemotron_h", "model", seed=1)
    path, ids = write_ids(tmp_path, n=700)
    ACTIVATION.main(
        ["-m", "model", "-n", "t", "--block-size", "32", "--batch-size", "2", "-i", str(path), "-s", "counts"]
    )
    found = results.read_tensors("counts/t.ga.pt")
    assert found["width"].tolist() == [0, 112, 0, 48] and found["routed_width"].tolist() == [0, 96, 0, 0]
    assert found["routed"].sum(1).tolist() == [0, 2 * 672, 0, 0] and found["over_zero"].shape == (4, 112)
    one = counts.read(tmp_path / "counts/t.ga.pt", "ga")
    tokens = one.tokens()
    assert one.n_neurons == 160 and not tokens[[0, 2]].any() and not tokens[3, 48:].any()
    assert tokens[1].tolist() == [n for n in found["routed"][1].tolist() for _ in range(24)] + [672] * 16
    assert (one.over_zero <= tokens).all() and one.over_zero[1, 96:].any()
    # A slow loop over the tokens of the FFN beside the experts.
    model = loading.load_model(refs.model("model"), torch.float32, torch.device("cpu"))
    kept, act = [], dict(model.named_modules())["model.layers.1.mixer.shared_experts.act_fn"]
    act.register_forward_hook(lambda _m, _a, out: kept.append(out.reshape(-1, 16)))
    with torch.no_grad():
        for block in ids[:672].view(-1, 32):
            model(block[None].long())
    assert one.over_zero[1, 96:].tolist() == (torch.cat(kept) > 0).sum(0).tolist()
    # LAPE takes rates over the tokens that a neuron could see, of neurons that there are.
    other = counts.Counts(**{**vars(one), "lang": "en", "over_zero": one.over_zero // 2})
    chosen = IDENTIFY.lape.of_counts([one, other], rate=0.1)
    assert chosen.n_wanted == 16 and all(i < one.width[layer] for layer, i in chosen.selected.tolist())
    control = masks.random_control(chosen.mask, 4, one.width.tolist())
    assert {layer: len(own) for layer, own in control["ga"].items()} == {
        layer: len(own) for layer, own in chosen.mask["ga"].items()
    }
    for key, wrong in (("width", [0, 112, 0, 47]), ("routed_width", [0, 95, 0, 0]), ("routed_width", [0, 120, 0, 0])):
        torch.save(found | {key: torch.tensor(wrong)}, "counts/wrong.ga.pt")
        with pytest.raises(InputError, match="do not fit its counts"):
            counts.read(tmp_path / "counts/wrong.ga.pt", "ga")


def test_layers_of_several_widths_without_experts(tmp_path, monkeypatch):
    """A Gemma 4 with wider layers where keys are another's: `width` alone is written."""
    monkeypatch.chdir(tmp_path)
    save_tiny("gemma4_text", "model", enable_moe_block=False, use_double_wide_mlp=True)
    path, _ = write_ids(tmp_path, n=100)
    ACTIVATION.main(["-m", "model", "-n", "t", "--block-size", "32", "-i", str(path), "-s", "counts"])
    found = results.read_tensors("counts/t.ga.pt")
    assert found["width"].tolist() == [48, 48, 96] and "routed" not in found
    one = counts.read(tmp_path / "counts/t.ga.pt", "ga")
    assert one.tokens().sum(1).tolist() == [48 * 96, 48 * 96, 96 * 96] and one.n_neurons == 192
    assert not one.over_zero[:2, 48:].any() and one.over_zero[2, 48:].any()


def test_gates_of_neurons(tmp_path):
    """Rows of up projections of a Nemotron-H: an expert's, one beside the experts, a dense layer's."""
    save_tiny("nemotron_h", tmp_path / "base")
    save_tiny("nemotron_h", tmp_path / "run" / "checkpoint-5", seed=5)
    mask = {"gle_Latn": {0: [], 1: [30, 100], 2: [], 3: [7]}}
    masks.write(tmp_path / "mask.json", mask, n_layers=4, ffn_width=112)
    flags = {"--base-model": "base", "--target-model": "run", "--mask-file": "mask.json", "--output": "out.json"}
    flags = [part for flag, name in flags.items() for part in (flag, str(tmp_path / name))]
    GATE_LSN.main([*flags, "--lang", "gle_Latn"])
    found = results.read_json(tmp_path / "out.json", "gate_lsn")[0]["checkpoints"]["5"]["layers"]
    base, other = (read_tensors(tmp_path / name) for name in ("base", "run/checkpoint-5"))

    def moved(name: str, row: int) -> float:
        (name,) = [n for n in base if n.endswith(name)]
        return (other[name][row].double() - base[name][row].double()).abs().mean().item()

    first = [
        moved("layers.1.mixer.experts.1.up_proj.weight", 6),
        moved("layers.1.mixer.shared_experts.up_proj.weight", 4),
    ]
    assert found["layer_1"]["gate_proj"] == pytest.approx(np.mean(first), rel=1e-6)
    assert found["layer_3"]["gate_proj"] == pytest.approx(moved("layers.3.mixer.up_proj.weight", 7), rel=1e-6)
    assert list(found) == ["layer_1", "layer_3"]


# --- swaps ---

KINDS = ["linear_attention", "full_attention", "linear_attention", "full_attention", "full_attention"]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A base and a run of a Qwen 3.5 with five layers, attention in 1, 3 and 4; interface layers 0, 1 and 2."""
    root = tmp_path_factory.mktemp("hybrid")
    for seed, name in enumerate(("base", "run/checkpoint-5")):
        save_tiny("qwen3_5_text", root / name, seed=seed, layers=5, layer_types=KINDS)
    (root / "interface.json").write_text(json.dumps({"interface_layers": [0, 1, 2]}))
    draw = random.Random(0)
    for name in ("eng", "qaa"):
        lines = (" ".join(draw.choice(["ba", "do", "ki", "lu"]) for _ in range(4)) for _ in range(8))
        (root / f"{name}.txt").write_text("".join(line + "\n" for line in lines))
    return root


def swap(root, *more):
    models = [
        "--base-model",
        root / "base",
        "--checkpoint-dir",
        root / "run",
        "--layer-selection",
        root / "interface.json",
    ]
    ATTENTION_SWAP.main([str(a) for a in (*models, *more)])


def test_attention_is_swapped_where_there_is_some(hybrid, tmp_path, capsys):
    swap(hybrid, "--output-dir", tmp_path / "out")
    said = capsys.readouterr().out
    assert "layers [0, 2] have no attention (linear_attn in its place): none is swapped there" in said
    base, target = read_tensors(hybrid / "base"), read_tensors(hybrid / "run/checkpoint-5")
    for name, tensor in read_tensors(tmp_path / "out/checkpoint-5").items():
        own = "layers.1.self_attn" in name and name.endswith("_proj.weight")
        assert torch.equal(tensor, (base if own else target)[name]), name
    assert results.read_json(tmp_path / "out/metadata.json")[0]["layers"] == [1]
    (tmp_path / "none.json").write_text(json.dumps({"interface_layers": [0, 2]}))
    with pytest.raises(InputError, match=r"none of the layers \[0, 2\] has attention: there is nothing to swap"):
        swap(hybrid, "--output-dir", tmp_path / "none", "--layer-selection", tmp_path / "none.json")


def test_random_sets_are_of_layers_that_have_attention(hybrid, tmp_path, capsys):
    data = ["--source", "text", "--base-file", hybrid / "eng.txt", "--target-file", hybrid / "qaa.txt"]
    data += ["--base-lang", "eng_Latn", "--target-lang", "qaa_Latn", "--measures", "retrieval", "--device", "cpu"]
    swap(hybrid, "--output-dir", tmp_path / "out", "--controls", "all", *data)
    assert (
        "attention_interface: 1 of 3 layers; of the 2 other sets of that size 2 are measured" in capsys.readouterr().out
    )
    payload, _ = results.read_json(tmp_path / "out/controls.json", "swap-controls")
    rows = {row["name"]: row for row in payload["sets"]}
    assert rows["attention_interface"]["layers"] == [1] and rows["attention_interface"]["asked"] == [0, 1, 2]
    assert [row["layers"] for row in payload["sets"] if row["name"] == "random"] == [[3], [4]]
    assert (payload["n_layers"], payload["n_layers_having"], payload["n_possible_sets"]) == (5, 3, 3)


def test_conditions_and_sets_by_hand():
    having = {"attention": [1, 3, 4], "ffn": [0, 2, 3]}
    lists = {"interface": [0, 1], "lsn_rich": [2]}
    found = COMPONENT_SWAP.crossed("attention_interface", lists, having)
    assert [(c.name, c.layers, c.asked) for c in found[:3]] == [
        ("attention_interface", (1,), (0, 1)),
        ("ffn_interface", (0,), (0, 1)),
        ("ffn_lsn_rich", (2,), ()),
    ]
    assert not [c for c in found if c.name.startswith("attention_lsn_rich")]  # layer 2 has none
    assert controls.layer_sets([1, 3, 4], [3], "all", 0) == ([[1], [4]], 3)
    drawn, possible = controls.layer_sets(list(range(0, 40, 2)), [0, 4, 8, 12, 16], 30, 1)
    assert possible == 15504 and len(drawn) == 30 and all(layer % 2 == 0 for layers in drawn for layer in layers)


def test_silencing_reads_no_layer_without_an_ffn(tmp_path):
    model = loading.load_model(refs.model(save_tiny("nemotron_h", tmp_path)), torch.float32, torch.device("cpu"))
    arch, ids = archs.for_config(model.config), torch.arange(4, 36).view(2, 16)
    with torch.no_grad(), activations.silenced(model, arch, {0: [], 1: [], 2: [], 3: []}):
        whole = model(ids).logits
    assert torch.equal(whole, model(ids).logits)
    found = FOLLOWED.Activations(model, arch, {"empty": {0: [], 2: []}})
    found.add(ids)
    assert found.mean("empty") is None and found.layers == []
