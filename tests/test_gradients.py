"""alignment/gradients.py: against autograd on one sentence at a time, every weight once, shuffled pairs, memory."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from helpers import load_script, save_tiny, tiny_tokenizer
from launch import launch

from cpt_utils.architectures import archs
from cpt_utils.base import results, sources
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.models import loading

SCRIPT = load_script("alignment/gradients.py")
TEXTS = {
    "en": ["the red fox", "an old house", "the red fox", "seven small ships", "it rains again", "who is there"],
    "ga": ["an sionnach rua", "seanteach", "sionnach", "seacht long bheag", "tá sé ag cur", "cé atá ann"],
}
OUT = "results/alignment/gradients.json"
MODELS = {"base": "base", "10": "run/checkpoint-10", "20": "run/checkpoint-20"}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, spec in enumerate(MODELS.values()):
        save_tiny("llama", spec, seed=seed)
    for lang, lines in TEXTS.items():
        (tmp_path / f"{lang}.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "study.yaml").write_text(
        "name: demo\nbase: base\nrun: run\nresults: results\nlanguages: {base: en, target: ga}\n"
        "data: {source: text, base_file: en.txt, target_file: ga.txt}\nalignment: {gradients: {pairs: 4}}\n"
    )
    return tmp_path


def loaded(spec: str, dtype=torch.float64):
    return loading.load_model(refs.model(spec), dtype, torch.device("cpu"))


def slow_gradients(spec: str, text: str) -> dict[str, np.ndarray]:
    """By layer and projection the gradient of one sentence, each tensor a long vector, by `backward`."""
    model = loaded(spec).requires_grad_(True)
    ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
    with torch.enable_grad():
        torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).backward()
    found = {}
    for name, parameter in model.named_parameters():
        if ".layers." in name and "norm" not in name:
            _, _, layer, _, projection, _ = name.split(".")
            found[f"layer_{layer}.{projection}"] = parameter.grad.double().flatten().numpy()
    return found


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_every_region_and_model_against_autograd_on_one_sentence_at_a_time(study, capsys):
    SCRIPT.main(["--dtype", "float64"])
    found, head = results.read_json(OUT, "gradients")
    pairs = [int(i) for i in head["pairs"]]  # lines from 0 or 1
    first = min(int(i) for i in sources.parallel("text", "en", "ga", base_file="en.txt", target_file="ga.txt").ids)
    pairs = [i - first for i in pairs]
    assert len(pairs) == len({*pairs}) == 4 and 2 not in pairs  # the sentence that stands twice counts once
    assert list(found) == list(MODELS) and head["base_lang"] == "eng_Latn"
    beyond = {}
    for name, spec in MODELS.items():
        own, other = ([slow_gradients(spec, TEXTS[lang][i]) for i in pairs] for lang in TEXTS)
        names = list(own[0])
        kinds = {"attention": names_of(names, archs.ATTENTION), "ffn": names_of(names, archs.FFN), "all": names}
        regions = {region: [region] for region in names} | kinds
        regions |= {f"layer_{n}.{kind}": [one for one in kinds[kind] if one.startswith(f"layer_{n}.")]
                    for n in range(3) for kind in ("attention", "ffn")}  # fmt: skip
        for region, parts in regions.items():
            a, b = ([np.concatenate([one[part] for part in parts]) for one in side] for side in (own, other))
            same = [cosine(a[i], b[i]) for i in range(4)]
            shuffled = [cosine(a[i], b[i - 1]) for i in range(4)]
            layer, _, last = region.rpartition(".")
            row = (found[name]["layers"][layer] if layer else found[name])[last]
            assert row["cosine"] == pytest.approx(np.mean(same), abs=1e-9), region
            assert row["shuffled"] == pytest.approx(np.mean(shuffled), abs=1e-9), region
            assert row["beyond"]["mean"] == pytest.approx(np.mean(same) - np.mean(shuffled), abs=1e-9)
            assert row["beyond"]["ci_low"] < row["beyond"]["mean"] < row["beyond"]["ci_high"]
            beyond[name, region] = row["beyond"]["mean"]
        difference = found[name]["attention_minus_ffn"]["beyond"]["mean"]
        assert difference == pytest.approx(beyond[name, "attention"] - beyond[name, "ffn"], abs=1e-9)
        for region in ("attention", "ffn", "all"):
            assert ("change" in found[name][region]) == (name != "base")
            change = found[name][region].get("change", {"mean": 0.0})["mean"]
            assert change == pytest.approx(beyond[name, region] - beyond["base", region], abs=1e-9)
    assert (study / OUT).with_suffix(".png").is_file() and "step 20: attention" in capsys.readouterr().out


def names_of(names: list[str], projections) -> list[str]:
    return [name for name in names if name.partition(".")[2] in projections]


@pytest.mark.parametrize(
    "model_type", ["qwen3", "gemma2", "phi3", "gpt_neox", "gpt2", "falcon", "mixtral", "olmoe", "qwen2_moe", "gpt_oss"]
)
def test_every_weight_is_in_one_place(model_type, tmp_path):
    """The parts of fused tensors and experts add up to the whole tensors, whatever a type looks like."""
    ref = refs.model(save_tiny(model_type, tmp_path / "model"))
    model = loaded(ref.spec, torch.float32)
    weights = SCRIPT.Weights.of(model, ref, ref)
    ids = [1, *range(20, 40)]
    found = SCRIPT.gradient(model, ids, weights.tensors)
    squares = sum(float(one.double().square().sum()) for one in found if one is not None)
    products = weights.products(found, found)
    assert float(products.sum()) == pytest.approx(squares, rel=1e-5) and bool((products >= 0).all())
    arch, config = archs.for_config(ref.config()), ref.config()
    wanted = {(n, p) for n in range(arch.n_layers(config)) for p in arch.projections(config, n)}
    assert {place for place in weights.places if place[1] != archs.ROUTER} == wanted
    cosines = SCRIPT.cosines(model, weights, [(ids, ids), (ids[:9], ids[:9])])
    assert all(values == pytest.approx([1, 1], abs=1e-5) for region, values in cosines["cosine"].items()), cosines
    assert cosines["shuffled"]["all"][0] == pytest.approx(cosines["shuffled"]["all"][1], abs=1e-5) != 1


def test_there_are_never_more_than_two_gradients(study, monkeypatch):
    model, own, held, most = loaded("base", torch.float32), SCRIPT.gradient, [], []

    def counted(*args):
        gc.collect()
        most.append(sum(one() is not None for one in held))
        found = own(*args)
        held.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(SCRIPT, "gradient", counted)
    ids = [tiny_tokenizer()(text)["input_ids"] for text in TEXTS["en"]]
    ref = refs.model("base")
    SCRIPT.cosines(model, SCRIPT.Weights.of(model, ref, ref), list(zip(ids, ids[::-1], strict=True)))
    assert len(most) == 13 and max(most) == 1  # one, beside the one that is being made


def test_a_gradient_of_zeros_and_one_that_is_not_finite(study):
    model, ref = loaded("base"), refs.model("base")
    weights, down = SCRIPT.Weights.of(model, ref, ref), model.get_parameter("model.layers.1.mlp.down_proj.weight")
    down.data.zero_()
    found = SCRIPT.cosines(model, weights, [([1, 5], [1, 7]), ([1, 8], [1, 9])])
    assert found["cosine"]["layer_1.up_proj"] == [0.0, 0.0] and found["cosine"]["layer_1.down_proj"][0] != 0
    down.data[0, 0] = float("nan")
    found = SCRIPT.cosines(model, weights, [([1, 5], [1, 7]), ([1, 8], [1, 9])])
    assert np.isnan(found["cosine"]["all"]).all()
    with pytest.raises(InputError, match="base is quantised or does not fit into memory"):
        SCRIPT.Weights.of(model.to("meta"), ref, ref)


def test_differences_are_paired():
    """Whatever pairs are like, .1 more than shuffled in each of them is .1 for certain."""
    shuffled = {region: [0.1, 0.8, -0.2, 0.5] for region in ("layer_0.q_proj", "attention", "ffn", "all")}
    more = {region: [value + 0.1 for value in values] for region, values in shuffled.items()}
    rows = SCRIPT.summarize({name: {"cosine": more, "shuffled": shuffled} for name in ("base", "5")}, seed=1)
    for row in (rows["5"]["all"]["beyond"], rows["base"]["layers"]["layer_0"]["q_proj"]["beyond"]):
        assert [row[key] for key in ("mean", "ci_low", "ci_high")] == pytest.approx([0.1] * 3)
    assert rows["5"]["ffn"]["change"] == pytest.approx({"mean": 0, "ci_low": 0, "ci_high": 0}, abs=1e-12)


@pytest.mark.slow
def test_two_processes_find_what_one_does(study):
    SCRIPT.main(["--device", "cpu", "--output", "one.json"])
    launch("alignment/gradients.py", "--output", "two.json")
    assert results.read_json("one.json")[0] == results.read_json("two.json")[0]


def test_finished_results_are_kept_and_bad_input_is_one_line(study, capsys):
    SCRIPT.main(["--steps", "10"])
    (part,) = (study / "results/alignment").glob("gradients.*.json")
    SCRIPT.main(["--steps", "10"])
    assert part.name == "gradients.run__checkpoint-10.json" and "is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match="another request"):
        SCRIPT.main(["--steps", "10", "--pairs", "3"])
    with pytest.raises(InputError, match="gradients need at least two pairs of different sentences, not 1"):
        SCRIPT.main(["--pairs", "1"])
    text = (study / "study.yaml").read_text()
    (study / "study.yaml").write_text(text.replace("languages: {base: en, target: ga}\n", ""))
    with pytest.raises(InputError, match="the languages are not given: give --base-lang and --target-lang"):
        SCRIPT.main([])
