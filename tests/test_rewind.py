"""spectral/rewind.py: identities of sets of heads, orders, energies; what is chosen on half of the items."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from helpers import bits, load_script, read_tensors, save_tiny, tiny_model
from launch import launch

from cpt_utils.architectures import archs
from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs
from cpt_utils.interventions import in_memory, surgery
from cpt_utils.interventions.condition import Condition
from cpt_utils.models import loading

REWIND = load_script("spectral/rewind.py")
CURVES, HEADS, ORDERS = REWIND.curves, REWIND.heads, REWIND.made
KINDS = ["llama", "gpt2", "phi3", "olmo2"]  # grouped queries, matrices [in, out], fused, norms over all heads
OUT = "rewind.json"


def rewinding(pair, by_query=False):
    found = HEADS.measured(pair.base_ref, [pair.target_ref])[0][pair.target_ref.step]
    return REWIND.Rewinding(pair, found, by_query)


def pair_of(base, target):
    return surgery.Pair(base, refs.run(target)[-1])


def load(folder):
    return loading.load_model(refs.model(folder), torch.float32, torch.device("cpu"))


def state(model) -> dict:
    return {name: bits(tensor).clone() for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("kind", KINDS)
def test_all_heads_are_the_attention_swap_and_none_the_checkpoint(kind, tmp_path):
    """Bit for bit; with norms over all heads the base's whole module, in a layer whose units are all chosen, too."""
    base = save_tiny(kind, tmp_path / "base", seed=0)
    target = save_tiny(kind, tmp_path / "target", seed=1, dtype="bfloat16")
    model, ours = load(target), state(load(base))
    before = state(model)
    with pair_of(base, target) as pair:
        heads = rewinding(pair)
        units, layer = heads.units, [unit for unit in heads.units if unit[0] == 1]
        states = []
        for recipe in (heads.recipe(units), surgery.parts_from_base(pair, archs.ATTENTION, range(3)),
                       heads.recipe(layer), surgery.parts_from_base(pair, archs.ATTENTION, [1])):  # fmt: skip
            with in_memory.apply(model, recipe, pair):
                states.append(state(model))
        assert state(model).keys() == before.keys() and all(torch.equal(before[k], v) for k, v in state(model).items())
        point = heads.point(ORDERS.Order("importance", tuple(units)), 0, 0.0, "importance")
        assert point.condition == CURVES.TARGET and point.facts == {"heads": 0, "share": 0.0, "energy": 0}
    norms = {name for name in before if "_norm" in name and "self_attn" in name}
    assert bool(norms) == (kind == "olmo2")
    for mine, swap, layers in ((*states[:2], "012"), (*states[2:], "1")):
        for name, values in swap.items():
            of_norm = name in norms and name.split(".")[2] in layers
            expected = bits(torch.empty(0)) if of_norm else values
            if of_norm:
                expected = bits(load(base).state_dict()[name].to(torch.bfloat16).float())
            assert torch.equal(mine[name], expected), name
    assert not all(torch.equal(states[0][name], ours[name]) for name in ours)  # the FFN is the checkpoint's


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_query", [False, True])
def test_a_head_without_its_columns_of_o_loses_exactly_what_it_gives(kind, by_query, tmp_path):
    """By the module's own computation: what its output matrix is fed in these columns, times the matrix."""
    target = save_tiny(kind, tmp_path / "target", seed=1)
    cut = tiny_model(kind, seed=1)
    arch = archs.for_config(cut.config)
    with torch.no_grad():
        for layer in range(3):
            arch.module(cut, layer, "o_proj").weight.zero_()
    base = save_tiny(kind, tmp_path / "base", model=cut)
    model, ids = load(target), torch.arange(3, 21).view(2, 9)
    module = arch.module(model, 1, "o_proj")
    matrix = module.weight.detach().T if kind == "gpt2" else module.weight.detach()
    matrix = matrix.clone()  # [out, in]

    def through() -> tuple:
        seen = {}
        handle = module.register_forward_hook(lambda _, args, out: seen.update(fed=args[0], out=out))
        with torch.no_grad():
            model(input_ids=ids)
        handle.remove()
        return seen["fed"].detach(), seen["out"].detach()

    with pair_of(base, target) as pair:
        heads = rewinding(pair, by_query)
        fed, whole = through()
        n = sum(layer == 1 for layer, _ in heads.units)
        assert n == (4 if by_query or kind == "gpt2" else 2)
        width = matrix.shape[1] // n
        for head in range(n):
            columns = slice(head * width, (head + 1) * width)
            with in_memory.apply(model, heads.recipe([(1, head)]), pair):
                again, left = through()
            assert torch.equal(again, fed)  # q, k and v are the same
            torch.testing.assert_close(whole - left, fed[..., columns] @ matrix[:, columns].T, rtol=1e-4, atol=1e-6)
        assert heads.energy[1, 0] > 0 and sum(heads.energy.values()) == pytest.approx(1)


# ---------------------------------------------------------------- orders and points

UNITS = [(layer, unit) for layer in range(6) for unit in range(4)]


def test_orders_are_permutations_and_random_ones_within_layers_balanced():
    assert ORDERS.ranked(UNITS[:4], [2.0, 1.0, 1.0, 0.0]) == ((0, 3), (0, 1), (0, 2), (0, 0))
    for name in ("random", "random_layer"):
        drawn = ORDERS.random_orders(UNITS, name, 3, 5)
        assert [one.draw for one in drawn] == list(range(5)) and len({one.chain for one in drawn}) == 5
        assert drawn == ORDERS.random_orders(UNITS, name, 3, 5) != ORDERS.random_orders(UNITS, name, 4, 5)
        for one in drawn:
            assert sorted(one.chain) == UNITS
            for k in range(25) if name == "random_layer" else ():
                counts = np.bincount([layer for layer, _ in one.chain[:k]], minlength=6)
                assert counts.max() - counts.min() <= 1
    uneven = [(0, unit) for unit in range(8)] + [(1, 0), (1, 1)]
    chain = ORDERS.within_layers(uneven, random.Random(0))
    assert sorted(chain) == sorted(uneven) and sum(layer == 1 for layer, _ in chain[:5]) == 1


def test_points_are_at_their_shares_of_heads_and_of_energy(tmp_path):
    with pair_of(save_tiny("llama", tmp_path / "b"), save_tiny("llama", tmp_path / "t", seed=1)) as pair:
        heads = rewinding(pair)
        heads.energy = dict(zip(heads.units, [0.5, 0.2, 0.1, 0.1, 0.05, 0.05], strict=True))
        least = ORDERS.Order("importance", tuple(heads.units[::-1]))
        orders = [least, ORDERS.Order("most", tuple(heads.units)), ORDERS.Order("random", tuple(heads.units))]
        points = heads.points(orders, [0, 0.5, 0.8, 1.0])
        found = {}
        for point in points:
            facts = point.facts["heads"], round(point.at, 9), round(point.facts["energy"], 9)
            found.setdefault(point.curve, []).append(facts)
        assert found["importance"] == [(0, 0, 0), (3, 0.5, 0.2), (5, 0.833333333, 0.5), (6, 1, 1)]
        assert found["most"] == [(0, 0, 0), (3, 0.5, 0.8), (5, 0.833333333, 0.95), (6, 1, 1)]
        # The last head holds half of ||dW||^2: of it all, 0.8 is nearer to all heads than to five.
        assert found["importance:energy"] == [(0, 0, 0), (5, 0.5, 0.5), (6, 1, 1)]
        assert found["random:energy"] == [(0, 0, 0), (1, 0.5, 0.5), (6, 1, 1)] and len(found) == 5
        conditions, at = CURVES.numbered(points)
        assert len(conditions) == 6 and at[:4] == [1, 2, 3, 4] and at[4:7] == [1, 3, 4]
        # A file that names fewer heads than the shares ask for: all of them are put back, too.
        points = heads.points([ORDERS.Order("file", tuple(heads.units[:1]))], [0, 0.5, 1.0])
        assert [(point.facts["heads"], point.at) for point in points] == [(0, 0), (1, 1 / 6)]
    with pair_of(tmp_path / "b", tmp_path / "b") as pair, pytest.raises(InputError, match="nothing to rewind"):
        rewinding(pair)


def test_an_order_of_a_file(tmp_path):
    path = tmp_path / "order.json"

    def read(content, kind="relative", by_query=False):
        path.write_text(json.dumps(content))
        units = [(layer, unit) for layer in range(2) for unit in range(4 if by_query else 2)]
        return ORDERS.read_order(str(path), kind, units, by_query, 2).chain

    assert read([[1, 0], [0, 1]]) == ((1, 0), (0, 1))
    rows = [
        {"layer": layer, "unit": unit, "importance": {"relative": value},
         "query_heads": [{"head": 2 * unit + i, "importance": {"relative": value + i}} for i in range(2)]}
        for (layer, unit), value in zip([(0, 0), (0, 1), (1, 0), (1, 1)], [4.0, 3.0, 2.0, 1.0], strict=True)
    ]  # fmt: skip
    result = {"_header": {"schema": "heads", "version": 1, "n_layers": 2}, "heads": rows}
    assert read(result) == ((1, 1), (1, 0), (0, 1), (0, 0))
    assert read(result, by_query=True)[:3] == ((1, 2), (1, 0), (1, 3))
    for content, message in (
        ([[0, 2]], r"unit \[0, 2\] does not exist: there are 4 units in 2 layers"),
        ([[0, 1], [0, 1]], r"unit \[0, 1\] comes twice"),
        ([3], "unit 3 does not exist"),
        ([[[0], 1]], r"unit \[\[0\], 1\] does not exist"),
        ([{"layer": 0}], "unit {'layer': 0} does not exist"),
        ([[True, 0]], r"unit \[True, 0\] does not exist"),
        (3, "neither a result of heads.py nor a list"),
        (result | {"heads": [{"layer": 0}]}, "neither a result of heads.py nor a list"),
        (result | {"heads": [rows[0] | {"importance": {"relative": None}}]},
         r"unit \[0, 0\] has no finite importance relative, as its base is zero; give --importance rms"),
        ([], "names no heads"),
        (result | {"_header": {"schema": "heads", "version": 1, "n_layers": 3}}, "n_layers 3, but 2 is needed"),
        (result | {"_header": {"schema": "arms", "version": 1}}, "'heads' is needed"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            read(content)
    with pytest.raises(InputError, match="has no importance contrast; it has relative"):
        read(result, "contrast")
    with pytest.raises(InputError, match="does not exist"):
        ORDERS.read_order(str(tmp_path / "no.json"), "relative", [], False, 2)


# ---------------------------------------------------------------- what is said


def point(curve, at, name, draw=0):
    done = CURVES.TARGET if name is None else Condition(name, {"name": name})
    return CURVES.Point(curve, at, done, draw, {"heads": 0, "share": at, "energy": at})


def record(name, values):
    values = np.asarray(values, dtype=float)
    return {"name": name, "units": {"task_accuracy": values.tolist()}, "values": {"task_accuracy": values.mean()}}


def test_what_is_chosen_on_one_half_is_told_of_the_other():
    """a is best on the items 0, 2, .. and worse than the checkpoint on the others, b a little better on all."""
    n, target = 40, np.full(40, 0.5)
    a, b = target.copy(), target + 0.1
    a[::2] += 0.4
    a[1::2] -= 0.2
    points = [point("importance", 0, None), point("importance", 0.5, "a"), point("importance", 1, "b")]
    records = [record("base", np.zeros(n)), record("target", target), record("a", a), record("b", b)]
    row = REWIND.best(points, records, 0)["task_accuracy"]
    assert row["at"] == 0.5 and row["chosen_on"] == pytest.approx(0.4) and row["n"] == 20
    assert row["value"] == pytest.approx(-0.2) == pytest.approx(row["ci_high"])
    # The checkpoint is no candidate: where all is worse, the least bad is told.
    worse = [*records[:2], record("a", target - 0.3), record("b", target - 0.1)]
    assert REWIND.best(points, worse, 0)["task_accuracy"]["value"] == pytest.approx(-0.1)


def test_the_greedy_curve_is_told_of_the_items_that_it_was_not_chosen_on():
    n, target = 40, np.full(40, 0.5)
    a = target.copy()
    a[::2] += 0.4
    a[1::2] -= 0.2
    points = [point("random", 0.5, "a"), point("random", 0.5, "b", 1), point("greedy", 0.5, "a")]
    points += [point("importance:energy", at, "b") for at in (0, 0.5, 1)] + [point("random:energy", 0.5, "a")]
    records = [record("base", np.zeros(n)), record("target", target), record("a", a), record("b", target + 0.1)]
    found = REWIND.summarise(points, 0, records)
    rows = {(row["curve"], row["draw"]): row for row in found["points"]}
    assert rows["random", 0]["better"]["task_accuracy"]["mean"] == pytest.approx(0.1)
    greedy = rows["greedy", 0]
    assert greedy["better"]["task_accuracy"]["mean"] == pytest.approx(-0.2) and greedy["items"] == "every second"
    assert greedy["set"] == rows["random", 0]["set"] == 2 and "items" not in rows["random", 0]
    assert found["largest"]["greedy"]["task_accuracy"]["at"]["value"] == 0
    assert found["largest"]["random"]["task_accuracy"]["at"]["draws"] == [0.5, 0.5]
    assert found["beyond"]["greedy"]["random"]["task_accuracy"]["at"]["value"] == pytest.approx(-0.25)
    assert set(found["best"]) == {"random", "greedy"}
    apart = found["at_equal_energy"]["task_accuracy"]
    assert apart["value"] == pytest.approx(0.0) and apart["ci_low"] < 0 < apart["ci_high"]
    alone = REWIND.effects(points[:2], [(0, 0), (0, 1)], records)["single"]
    assert alone[0]["better"]["task_accuracy"] == pytest.approx({"mean": 0.1, "chosen_on": 0.4})


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("rewind")
    base = save_tiny("olmo2", root / "base", seed=0)
    model = tiny_model("olmo2", seed=0)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    save_tiny("olmo2", root / "run/checkpoint-20", model=model)
    draw = random.Random(0)
    lines = [" ".join(draw.choice(["ba", "do", "ki", "lu"]) for _ in range(5)) for _ in range(8)]
    (root / "held.txt").write_text("\n".join(lines) + "\n")
    assert base.is_dir()
    return root


@pytest.fixture
def command(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return ["--base", f"{made}/base", "--run", f"{made}/run", "--measures", "nll", "--heldout", f"{made}/held.txt",
            "--stride", "50", "--draws", "2", "--output", OUT]  # fmt: skip


@pytest.mark.figures
def test_the_command_measures_tells_and_goes_on(command, tmp_path, capsys):
    REWIND.main(command)
    said = capsys.readouterr()
    assert "along with the heads: their parts of self_attn.k_norm.weight, self_attn.q_norm.weight; a norm" in said.out
    payload, _ = results.read_json(OUT)
    there = {row["curve"] for row in payload["points"]}
    assert there == {"importance", "importance:energy", "most", "random", "random:energy", "random_layer", "greedy"}
    assert payload["of"] == "units" and payload["n_heads"] == 6
    ends = [row for row in payload["points"] if row["at"] == 1]
    assert len({row["set"] for row in ends}) == 1 and {row["heads"] for row in ends} == {6}
    assert {row["energy"] for row in ends} == {1.0}
    chains = {(one["name"], one["draw"]): one["chain"] for one in payload["orders"]}
    assert chains["most", 0] == chains["importance", 0][::-1] and len(chains) == 7
    singles = results.read_json("rewind.singles.json")[0]["single"]
    cost = {(row["layer"], row["unit"]): -row["better"]["nll_per_byte"]["chosen_on"] for row in singles}
    assert [tuple(unit) for unit in chains["greedy", 0]] == sorted(cost, key=cost.get)
    assert "nll_per_byte" in payload["at_equal_energy"] and payload["best"]["importance"]["nll_per_byte"]["n"] == 4
    for name in ("rewind.png", "rewind.energy.png", "rewind.pt"):
        assert (tmp_path / name).stat().st_size > 1000
    before = (tmp_path / OUT).stat().st_mtime_ns
    REWIND.main(command)
    assert (tmp_path / OUT).stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("is finished, from the same request: kept") == 2
    with pytest.raises(InputError, match="of another request"):
        REWIND.main([*command, "--draws", "3"])


def test_two_processes_say_what_one_says(command, tmp_path):
    command = [*command[:-1], "two.json", "--orders", "greedy", "random"]
    launch("spectral/rewind.py", *command)
    REWIND.main([*command, "--output", OUT])
    (one, _), (two, _) = results.read_json(OUT), results.read_json("two.json")
    assert one == two and (tmp_path / "two.singles.json").is_file()


def test_a_folder_is_the_model_that_is_measured(made, command, tmp_path):
    REWIND.main([*command[:4], "--orders", "importance", "--shares", "50", "--write", "half"])
    with pair_of(made / "base", made / "run") as pair:
        heads = rewinding(pair)
        values = HEADS.importance(heads.found)["relative"]
        model = load(made / "run/checkpoint-20")
        with in_memory.apply(model, heads.recipe(ORDERS.ranked(heads.units, values)[:3]), pair):
            own = state(model)
    assert all(torch.equal(bits(tensor), own[name]) for name, tensor in read_tensors(tmp_path / "half").items())
    assert not (tmp_path / OUT).exists()
    (tmp_path / "order.json").write_text("[[0, 1]]")
    REWIND.main([*command[:4], "--order-from", "order.json", "--shares", "20", "--write", "one", "--qo-only"])
    changed = [n for n, t in read_tensors(tmp_path / "one").items()
               if not torch.equal(t, read_tensors(made / "run/checkpoint-20")[n])]  # fmt: skip
    ends = ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "self_attn.q_norm.weight")
    assert sorted(changed) == sorted(f"model.layers.0.{end}" for end in ends)


def test_what_is_refused(made, command, tmp_path):
    for more, message in (
        (["--orders", "contrast"], "give --reference RUN"),
        (["--shares", "120"], "between 0 and 100 percent"),
        (["--importance", "contrast"], "choose from relative, rms, per_layer"),
        (["--by", "task_accuracy"], "task_accuracy is not measured; the measures are nll_per_byte"),
        (["--write", "out"], "one order and one share"),
        (["--write", "out", "--orders", "importance", "--shares", "1"], "1% of 6 heads is no head"),
        (["--base", f"{made}/run/checkpoint-20"], "there is nothing to rewind|CPT changed nothing"),
    ):
        with pytest.raises(InputError, match=message):
            REWIND.main([*command, *more])
    assert not any(path.suffix == ".json" for path in tmp_path.iterdir())


def test_contrast_puts_back_what_the_other_run_changed_as_much(made, command, tmp_path):
    other = save_tiny("olmo2", tmp_path / "other", seed=9)
    REWIND.main([*command, "--orders", "contrast", "--reference", str(other)])
    ours, theirs = (
        HEADS.importance(next(iter(HEADS.measured(refs.model(made / "base"), refs.run(run))[0].values())))["relative"]
        for run in (made / "run", other)
    )
    chain = results.read_json(OUT)[0]["orders"][0]["chain"]
    units = [(layer, unit) for layer in range(3) for unit in range(2)]
    assert [tuple(unit) for unit in chain] == sorted(
        units, key=dict(zip(units, ours / ours.mean() - theirs / theirs.mean(), strict=True)).get
    )


# ---------------------------------------------------------------- the claims


def test_the_claims_read_equal_energy_and_held_out_items(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(
        f"base: {made}/base\nrun: {made}/run\nresults: results\nlanguages: {{base: eng_Latn, target: qaa_Latn}}\n"
        f"data: {{heldout: {{qaa_Latn: {made}/held.txt, eng_Latn: {made}/held.txt}}}}\n"
        "spectral: {rewind: {stride: 50, draws: 2, orders: [importance, random]}}\n"
    )
    evidence = cli.sibling("report/evidence.py")

    def measure(claim):
        return cli.sibling(f"report/claims/{claim}.py").measure(evidence.Results(Study.find()))

    with pytest.raises(evidence.Missing, match=r"spectral/rewind.json is not there"):
        measure("d3")
    REWIND.main(["--measures", "nll"])
    path = tmp_path / "results/spectral/rewind.json"
    payload = json.loads(path.read_text())
    (one,), beside = measure("d3")
    row = payload["beyond"]["importance:energy"]["random:energy"]["nll_per_byte"]["energy"]["kept"]
    assert one["value"] == (row and row["value"]) and one["says"]["side"] == "above"
    assert "share of the update" in one["name"] and (row or "is not clear" in one["note"])
    words = [each["name"] for each in beside]
    assert any("by share of heads" in name and "loss eng_Latn" in name for name in words)
    assert any("at equal shares of the update" in name for name in words)
    numbers, beside = measure("d4")
    best = payload["best"]["importance"]["nll_per_byte"]
    assert numbers[0]["value"] == best["value"] and numbers[0]["n"] == 4
    assert numbers[1]["value"] is None and "has no such number for task " in numbers[1]["note"]
    assert any(each["name"].endswith("random heads, loss") for each in beside)
    del payload["beyond"]["importance:energy"]["random:energy"]["nll_per_byte"]
    path.write_text(json.dumps(payload))
    assert "has no such number for loss (made by" in measure("d3")[0][0]["note"]
    payload["points"] = [row for row in payload["points"] if row["curve"] != "random"]
    path.write_text(json.dumps(payload))
    with pytest.raises(evidence.Missing, match="or the random one"):
        measure("d4")
    payload["best"]["importance"]["nll_per_byte"]["value"] = math.nan
    path.write_text(json.dumps(payload))
    with pytest.raises(InputError, match="not finite"):
        measure("d4")
