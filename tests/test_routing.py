"""moe-routing/: what routers do against slow loops, of every type; planted experts; steering; the commands."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import EVERY_ARCHITECTURE, killed, load_script, same_results, save_tiny, tiny_model, tiny_tokenizer
from launch import launch

from cpt_utils.architectures import archs
from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.models import batching, routers

SCRIPT, STEERING = load_script("moe-routing/routing.py"), load_script("moe-routing/steering.py")
MOE = [name for name in EVERY_ARCHITECTURE if archs.ARCHS[name].experts_at and not archs.ARCHS[name].text_type]
TEXTS = {
    "en": [f"the {a} number {n} walks over the hill" for n, a in enumerate(("red", "old", "sad", "big", "shy", "new"))],
    "ga": [f"SIULANN AN {a} {n} THAR" for n, a in enumerate(("DEARG", "SEAN", "MOR", "BEAG", "NUA", "FUAR"))],
}
OUT = "results/moe-routing"


def model_of(model_type: str, dtype=torch.float64, **more):
    model = tiny_model(model_type, seed=3, **more).to(dtype).eval()
    model.set_experts_implementation("eager")  # the default has no float64
    return model, archs.for_config(model.config)


def inputs_of(gates, model, ids, mask=None) -> list[torch.Tensor]:
    """What goes into these routers, [tokens, hidden] each."""
    seen: list[torch.Tensor] = []
    handles = [gate.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 32))) for gate in gates]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return seen


def random_sides(n=40, layers=2, experts=6, k=2, seed=0) -> list[routers.Routed]:
    """Two languages of sentences whose tokens are routed at random, alike."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(2):
        tokens = rng.integers(4, 12, n)
        share, chosen = np.zeros((n, layers, experts)), np.zeros((n, layers, experts))
        for i, layer in itertools.product(range(n), range(layers)):
            p = rng.dirichlet(np.ones(experts), tokens[i])
            share[i, layer] = p.sum(0)
            chosen[i, layer] = (p >= np.sort(p)[:, -k][:, None]).sum(0)
        found.append(routers.Routed(share, chosen, rng.random((n, layers)), tokens.astype(float)))
    return found


# ---------------------------------------------------------------- reading and replacing logits


@pytest.mark.parametrize("model_type", ["olmoe", "qwen3_moe"])
def test_what_routers_do_is_that_of_a_slow_loop_whatever_the_padding(model_type):
    """Sentence by sentence through the router's weights and the definition; layer 1 of qwen3_moe is dense."""
    model, arch = model_of(model_type)
    layers = routers.layers_with(arch, model.config)
    assert layers == ([0, 2] if model_type == "qwen3_moe" else [0, 1, 2])
    found = SCRIPT.routed(model, arch, tiny_tokenizer(), TEXTS["en"], batch_size=4)
    for i, text in enumerate(TEXTS["en"]):
        ids = tiny_tokenizer()(text)["input_ids"]
        gates = [arch.layers(model)[layer].mlp.gate for layer in layers]
        for at, (gate, inputs) in enumerate(zip(gates, inputs_of(gates, model, torch.tensor([ids])), strict=True)):
            share, chosen, entropy = [0.0] * 4, [0] * 4, 0.0
            weight = gate.weight.detach()
            for token in inputs[1:]:  # without <s>
                logits = [float(row @ token) for row in weight]
                p = [math.exp(z) / sum(map(math.exp, logits)) for z in logits]
                share = [a + b for a, b in zip(share, p, strict=True)]
                entropy -= sum(x * math.log(x) for x in p)
                for expert in sorted(range(4), key=lambda e: -logits[e])[:2]:
                    chosen[expert] += 1
            assert found.share[i, at] == pytest.approx(share, rel=1e-9)
            assert found.chosen[i, at].tolist() == chosen
            assert found.entropy[i, at] == pytest.approx(entropy, rel=1e-9)
        assert found.tokens[i] == len(ids) - 1


@pytest.mark.parametrize("model_type", MOE)
def test_routers_of_every_type_are_read_and_steered(model_type):
    model, arch = model_of(model_type, torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith(("e_score_correction_bias", "expert_bias")):  # for balance; by chance it may win
            parameter.data.zero_()
    layers, ids = routers.layers_with(arch, model.config), torch.randint(3, 250, (2, 9))
    n_experts, mask = arch.experts(model.config, layers[0]), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    plain = routers.read(model, arch, ids, mask, mask)
    assert plain.tokens.tolist() == [9, 6] and plain.share.shape == (2, len(layers), n_experts)
    tokens = plain.tokens[:, None].expand(2, len(layers))
    assert torch.allclose(plain.share.sum(-1), tokens, rtol=0, atol=1e-9)  # near-uniform routers need that
    k = plain.chosen.sum(-1) / tokens
    assert torch.equal(k, k[:1, :1].expand_as(k)) and 1 <= k[0, 0] < n_experts
    logits = model(input_ids=ids, attention_mask=mask).logits

    def steered(how, strength=0.0):
        experts = {layer: [1] for layer in layers}
        return STEERING.steered("", "base", arch, experts, how, strength).apply(model)

    with steered("soft"):
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, logits)
    with steered("hard"):
        assert torch.equal(routers.read(model, arch, ids, mask, mask).chosen[:, :, 1], tokens)
        assert not torch.equal(model(input_ids=ids, attention_mask=mask).logits, logits)
    with steered("suppressed"):
        assert not routers.read(model, arch, ids, mask, mask).chosen[:, :, 1].any()
    with steered("soft", 1.0):
        more = routers.read(model, arch, ids, mask, mask)
        assert (more.share[:, 0, 1] > plain.share[:, 0, 1]).all()
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, logits)  # nothing is left behind


def test_logits_are_replaced_as_said():
    z = torch.tensor([[1.0, 2.0, 4.0, -3.0], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    spread = [math.sqrt(sum((x - sum(row) / 4) ** 2 for x in row) / 4) for row in z.tolist()]
    soft, hard, out = (STEERING.edit(how, [0, 3], 0.5)(z) for how in ("soft", "hard", "suppressed"))
    for i, row in enumerate(z.tolist()):
        assert soft[i].tolist() == pytest.approx([row[0] + spread[i] / 2, row[1], row[2], row[3] + spread[i] / 2])
        top, bottom = max(row) + spread[i], min(row) - spread[i]
        assert hard[i].tolist() == pytest.approx([top, row[1], row[2], top])
        assert out[i].tolist() == pytest.approx([bottom, row[1], row[2], bottom])
    assert torch.equal(STEERING.edit("soft", [2], 0.0)(z), z)


def test_a_router_that_is_no_plain_product_is_refused_and_left_as_it_was():
    model, arch = model_of("olmoe")
    gate = arch.layers(model)[1].mlp.gate
    gate.forward = lambda hidden: (None, torch.ones(9, 2).double() / 2, torch.zeros(9, 2, dtype=torch.long))
    own, ids = gate.forward, torch.randint(3, 250, (1, 9))
    with pytest.raises(InputError, match="the router of layer 1 cannot be read: it computes 0 products"):
        routers.read(model, arch, ids, torch.ones_like(ids), torch.ones_like(ids))
    assert gate.forward is own and "forward" not in vars(arch.layers(model)[0].mlp.gate)


# ---------------------------------------------------------------- numbers


def test_divergence_is_zero_of_itself_one_apart_and_defined_for_uniform_routers():
    rng = np.random.default_rng(1)
    a, b = rng.dirichlet(np.ones(8), (2, 5))
    assert SCRIPT.divergence(a, a).tolist() == [0.0] * 5
    uniform = np.full(8, 1 / 8)
    assert SCRIPT.divergence(uniform, uniform) == 0 and 0 < SCRIPT.divergence(uniform, a[0]) < 1
    one, other = np.eye(8)[[0, 3]]
    assert SCRIPT.divergence(one, other) == pytest.approx(math.log(2) / math.log(8))
    halves = np.repeat(np.eye(2), 4, 1) / 4
    assert SCRIPT.divergence(*halves) == pytest.approx(1)
    assert SCRIPT.divergence(np.ones(1), np.ones(1)) == 0  # one expert
    one = routers.Routed(np.full((4, 2, 1), 5.0), np.full((4, 2, 1), 5.0), np.zeros((4, 2)), np.full(4, 5.0))
    with np.errstate(all="raise"):
        found = SCRIPT.summarize([one, one], seed=0)
    assert found["entropy"] == found["token_entropy"] == {"base": [0, 0], "target": [0, 0]}
    for x, y, found in zip(a, b, SCRIPT.divergence(a, b), strict=True):
        m = [(p + q) / 2 for p, q in zip(x, y, strict=True)]
        jsd = sum(p * math.log(p / r) + q * math.log(q / r) for p, q, r in zip(x, y, m, strict=True)) / 2
        most = math.log(8) + sum(p * math.log(p) + q * math.log(q) for p, q in zip(x, y, strict=True)) / 2
        assert found == pytest.approx(jsd / most, rel=1e-9)


def test_means_are_over_tokens_and_swaps_are_of_pairs():
    sides = random_sides(n=7)
    share, use = SCRIPT.over_tokens(sides[0])
    assert share[1, 3] == pytest.approx(sum(sides[0].share[:, 1, 3]) / sum(sides[0].tokens))
    assert share.sum(-1) == pytest.approx(1) and use.sum(-1) == pytest.approx(2)
    swaps = np.array([[0] * 7, [1] * 7, [1, 0, 0, 1, 0, 0, 1]])
    shares, _ = SCRIPT.swapped(sides, swaps)
    assert shares[0][0] == pytest.approx(share) and shares[1][1] == pytest.approx(share)
    mixed = [sides[swap] for swap in swaps[2]]
    total = sum(side.share[i] for i, side in enumerate(mixed)) / sum(side.tokens[i] for i, side in enumerate(mixed))
    assert shares[0][2] == pytest.approx(total)


def test_experts_in_common_are_those_of_all_pairs_of_tokens():
    rng, n_experts, k = np.random.default_rng(2), 5, 2
    sentences = [[[tuple(rng.permutation(n_experts)[:k]) for _ in range(n)] for n in (3, 6, 1)] for _ in range(2)]

    def side(own):
        counts = np.array([[[sum(e in token for token in one) for e in range(n_experts)]] for one in own], dtype=float)
        return routers.Routed(counts, counts, None, np.array([len(one) for one in own], dtype=float))

    a, b = map(side, sentences)
    pairs = [len({*x} & {*y}) / k for one in sentences[0] for x, y in itertools.permutations(one, 2)]
    assert SCRIPT.in_common(a, a)[0] == pytest.approx(sum(pairs) / len(pairs))
    across = [len({*x} & {*y}) / k for one, other in zip(*sentences, strict=True) for x in one for y in other]
    assert SCRIPT.in_common(a, b)[0] == pytest.approx(sum(across) / len(across))
    for here, there, chance in ((0, 1, SCRIPT.in_common(a, b)[1]), (0, 0, SCRIPT.in_common(a, a)[1])):
        unlike = itertools.product(enumerate(sentences[here]), enumerate(sentences[there]))
        every = [len({*x} & {*y}) / k for (i, one), (j, other) in unlike if i != j for x in one for y in other]
        assert chance == pytest.approx(sum(every) / len(every))
    alone = routers.Routed(*(part[:1] for part in (a.share, a.chosen)), None, a.tokens[:1])
    assert np.isnan(SCRIPT.in_common(alone, alone)[1]).all()


def test_a_planted_expert_is_found_and_a_permuted_language_has_none():
    alike = random_sides(seed=5)
    one = SCRIPT.summarize(alike, seed=0)
    permuted = [alike[0], routers.Routed(*(part[::-1] for part in alike[0]))]
    two = SCRIPT.summarize(permuted, seed=0)
    for found in (one, two):
        assert (np.array(found["p"]) > 0.05).all() and min(found["p_value"]) > 0.01
    assert two["divergence"] == pytest.approx([0, 0], abs=1e-12)
    planted = alike[1].chosen.copy()
    planted[:, 1, 4] = alike[1].tokens  # always in use, in the place of others
    planted[:, 1, :4] *= (alike[1].tokens / planted[:, 1, :4].sum(1))[:, None]
    planted[:, 1, 5] = 0
    found = SCRIPT.summarize([alike[0], alike[1]._replace(chosen=planted)], seed=0)
    record = found | {"name": "base"}
    row = SCRIPT.payload_of([record], [3, 8], {"base": "en", "target": "ga"})["base"]
    assert row["layers"]["layer_8"]["experts"]["ga"][0] == 4 and 5 in row["layers"]["layer_8"]["experts"]["en"]
    assert row["layers"]["layer_3"]["experts"] == {"en": [], "ga": []}


def test_an_expert_that_a_router_is_made_to_prefer_in_one_language_is_found():
    model, arch = model_of("olmoe")
    gate, means = arch.layers(model)[1].mlp.gate, []
    for lines in TEXTS.values():
        ids, mask = batching.padded([tiny_tokenizer()(line)["input_ids"] for line in lines], 0)
        means.append(inputs_of([gate], model, ids, mask)[0][mask.reshape(-1).bool()].mean(0))
    gate.weight.data[2] = 20 * (means[1] - means[0])
    sides = [SCRIPT.routed(model, arch, tiny_tokenizer(), lines) for lines in TEXTS.values()]
    record = SCRIPT.summarize(sides, seed=0) | {"name": "base"}
    layers = SCRIPT.payload_of([record], [0, 1, 2], {"base": "en", "target": "ga"})["base"]["layers"]
    assert layers["layer_1"]["experts"]["ga"][0] == 2
    assert layers["layer_1"]["divergence"]["p_value"] < 0.05


# ---------------------------------------------------------------- the commands


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, spec in enumerate(("base", "run/checkpoint-10", "run/checkpoint-20")):
        save_tiny("olmoe", spec, seed=seed, tokenizer=True)
    for lang, lines in TEXTS.items():
        (tmp_path / f"{lang}.txt").write_text("\n".join(lines) + "\n")
        (tmp_path / f"{lang}.held.txt").write_text("\n".join(line[4:] for line in lines) + "\n")
    (tmp_path / "study.yaml").write_text(
        "name: demo\nbase: base\nrun: run\nresults: results\nlanguages: {base: en, target: ga}\n"
        "data: {source: text, base_file: en.txt, target_file: ga.txt, heldout: {en: en.held.txt, ga: ga.held.txt}}\n"
        "routing: {random: 2}\n"
    )
    return tmp_path


def test_both_results_say_what_was_found(study, capsys):
    SCRIPT.main([])
    found, head = results.read_json(f"{OUT}/routing.json", SCRIPT.SCHEMA, base_lang="en", target_lang="ga")
    tensors = results.read_tensors(f"{OUT}/routing.pt")
    assert list(found["checkpoints"]) == ["base", "10", "20"] and head["layers"] == [0, 1, 2] and head["top_k"] == 2
    for name, model in found["checkpoints"].items():
        assert tensors[f"share.{name}"].shape == (2, 3, 4)
        own = SCRIPT.divergence(*tensors[f"share.{name}"].numpy())
        assert [row["divergence"]["value"] for row in model["layers"].values()] == pytest.approx(own.tolist())
        assert ("change" in model) == ("moved" in model["layers"]["layer_0"]) == (name != "base")
        assert model["divergence"]["value"] == pytest.approx(own.mean())
    last, before = (found["checkpoints"][name]["divergence"]["value"] for name in ("20", "base"))
    change = found["checkpoints"]["20"]["change"]
    assert change["value"] == pytest.approx(last - before) and change["ci_low"] <= change["ci_high"]
    STEERING.main(["--strengths", "0", "1", "1.0"])
    steered, _ = results.read_json(f"{OUT}/steering.json", STEERING.SCHEMA)
    assert list(steered["unsteered"]) == ["base", "20"]
    cells = {
        (name, way, lang): row
        for name, rows in steered["steered"].items() for way, of in rows.items() for lang, row in of.items()
    }  # fmt: skip
    assert {way for _, way, _ in cells} == {"soft 0", "soft 1", "hard", "suppressed"}
    for (_, way, _), row in cells.items():
        assert set(row) == {"en", "ga"}
        assert all(len(cell["random"]) == len(cell["shifted"]) == 2 for cell in row.values())
        assert (way == "soft 0") == all(cell["mean"] == cell["random_mean"] == 0 for cell in row.values())
    assert all((study / OUT / f"{name}.png").is_file() for name in ("routing", "steering"))
    assert "experts are used more in ga" in capsys.readouterr().out


@pytest.mark.figures
def test_no_expert_of_a_language_is_a_finding(study, capsys):
    own = (study / "ga.txt").read_text()
    (study / "ga.txt").write_text((study / "en.txt").read_text())  # of the same text no expert is a language's own
    SCRIPT.main([])
    STEERING.main([])
    found, head = results.read_json(f"{OUT}/steering.json", STEERING.SCHEMA)
    assert found["finding"] == "no expert" and found["steered"] == {"base": {}, "20": {}}
    assert set(found["unsteered"]["20"]) == {"en", "ga"} and head["models"]["checkpoints"]["20"]
    assert (study / OUT / "steering.png").stat().st_size > 2000 and STEERING.NO_EXPERT in capsys.readouterr().out
    table = list(load_script("report/rows.py").of_file(found, head))
    answers = load_script("report/answers.py")
    told = answers.answer("router_steering", [None] * 3, table, Study({"languages": {"target": "ga"}}), {}, [])
    assert told.startswith("No expert is used more in one language than in the other")
    (study / "ga.txt").write_text(own)
    content = json.loads((study / OUT / "routing.json").read_text())
    content["checkpoints"]["20"]["layers"]["layer_1"]["experts"]["ga"] = [2]
    (study / "one.json").write_text(json.dumps(content))
    STEERING.main(["--routing", "one.json", "--output", "one-steered.json"])
    found, _ = results.read_json("one-steered.json")
    assert "finding" not in found and found["steered"]["base"] == {}
    assert {(way, lang) for way, rows in found["steered"]["20"].items() for lang in rows} == {
        ("soft 1", "ga"), ("hard", "ga"), ("suppressed", "ga")
    }  # fmt: skip


def test_copies_of_pairs_count_once(study, capsys):
    SCRIPT.main([])
    for lang, lines in TEXTS.items():
        (study / f"{lang}.txt").write_text("\n".join([*lines, *lines[:3]]) + "\n")
    SCRIPT.main(["--output", "again.json"])
    (one, head), (two, again) = (results.read_json(path) for path in (f"{OUT}/routing.json", "again.json"))
    assert one == two and head["n_used"] == again["n_used"] == 6 and again["n_available"] == 9
    assert "3 pairs with a repeated sentence are left out" in capsys.readouterr().out


def test_a_killed_run_goes_on_and_finds_the_same(study, capsys):
    SCRIPT.main([])
    STEERING.main(["--output", "one.json"])
    killed(lambda: SCRIPT.main(["--output", "again.json"]), SCRIPT, "summarize", 2)
    killed(lambda: STEERING.main(["--output", "two.json"]), STEERING.language_loss, "losses", 9)
    capsys.readouterr()
    SCRIPT.main(["--output", "again.json"])
    STEERING.main(["--output", "two.json"])
    said = capsys.readouterr().out
    assert "2 of 3 sets were measured before" in said and "9 of " in said
    same_results(study / "again.json", study / f"{OUT}/routing.json")
    same_results(study / "one.json", study / "two.json")


@pytest.mark.slow
def test_two_processes_find_what_one_does(study):
    SCRIPT.main(["--device", "cpu"])
    STEERING.main(["--device", "cpu"])
    launch("moe-routing/routing.py", "--output", "two.json")
    launch("moe-routing/steering.py", "--output", "steered.json")
    for one, two in (("routing", "two"), ("steering", "steered")):
        assert results.read_json(f"{OUT}/{one}.json")[0] == results.read_json(f"{two}.json")[0]


def test_bad_input_is_one_line(study):
    with pytest.raises(InputError, match=r"routing.json does not exist; run moe-routing/routing.py first"):
        STEERING.main([])
    SCRIPT.main(["--limit", "4"])
    assert (study / OUT / "routing.limit-4.json").is_file()
    SCRIPT.main([])
    with pytest.raises(InputError, match="--strengths: give finite numbers"):
        STEERING.main(["--strengths", "nan"])
    save_tiny("olmoe", "run/checkpoint-20", seed=7, tokenizer=True)
    with pytest.raises(InputError, match=r"routing.json is not of run/checkpoint-20 as it is now; run moe-routing/rou"):
        STEERING.main([])
    content = json.loads((study / OUT / "routing.json").read_text())
    del content["_header"]
    (study / "bare.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"bare.json is not of base as it is now; run moe-routing/routing.py again"):
        STEERING.main(["--routing", "bare.json"])
    save_tiny("llama", "dense", seed=1, tokenizer=True)
    with pytest.raises(InputError, match="dense is a llama without experts: it has no routers to measure"):
        SCRIPT.main(["--base", "dense"])
    save_tiny("olmoe", "more", seed=1, tokenizer=True, num_experts=6)
    with pytest.raises(InputError, match="more has other experts than base: they cannot be compared"):
        SCRIPT.main(["--run", "more"])
    (study / "ga.txt").write_text("\n".join(TEXTS["ga"][:5]) + "\n")
    with pytest.raises(InputError, match=r"en.txt has 6 lines and .*ga.txt has 5"):
        SCRIPT.main(["--output", "other.json"])
