"""Neurons by average precision and by gradient times activation: what is measured on texts, and the masks, each against
a slow loop."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, killed, load_script, save_tiny
from launch import launch
from test_activation import write_ids
from test_identify import without_header
from test_neurons import MOE, model_of, slow_activations, slow_model

from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.measures import masks
from cpt_utils.models.trace import trace

script = load_script("lsn/text_scores.py")
identify = load_script("lsn/identify.py")
LANGS = ("en", "ga", "eu")
IDS = torch.randint(3, 250, (5, 12), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- what is measured


def probability(model, arch, ids, layer: int, neuron: int, at: int, factor: float) -> float:
    """P of the last token where what the neuron gives at one position is `factor` times as much."""

    def scaled(value):
        value = value.clone()
        value.view(-1, value.shape[-1])[at, neuron] *= factor
        return value

    with torch.no_grad(), trace((arch.down_module(model, layer), "input", scaled)):
        return model(input_ids=ids[None, :-1]).logits[0, -1].double().softmax(-1)[ids[-1]].item()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_means_and_gradients_are_those_of_one_text_at_a_time(model_type):
    """n dP/dn is how fast P changes when what the neuron gives is scaled: a quotient of differences, one position after
    the other."""
    model, arch = model_of(model_type)
    means = script.mean_activations(model, arch, IDS, 2)
    assert means.dtype == torch.float32 and means.shape == (5, 3, 48)
    for text, ids in enumerate(IDS):
        for layer, values in enumerate(slow_activations(model, arch, ids[None])):
            assert torch.allclose(means[text, layer].double(), values.mean(0), rtol=1e-6, atol=1e-9)
    found = script.attributions(model, arch, IDS, 2)
    alone = sum(script.attributions(model, arch, ids[None], 1) for ids in IDS)
    assert torch.allclose(found, alone, rtol=1e-8, atol=1e-15)
    h = 0.02  # norms are in float32 whatever the model is in
    for layer, neuron in ((0, 3), (2, 40)):
        slow = 0.0
        for ids in IDS:
            rates = [
                [probability(model, arch, ids, layer, neuron, at, 1 + sign * h) for sign in (1, -1)]
                for at in range(len(ids) - 1)
            ]
            slow += max((up - down) / (2 * h) for up, down in rates)
        assert found[layer, neuron].item() == pytest.approx(slow, rel=2e-3, abs=2e-7)


def test_gradients_are_those_of_autograd_by_the_gate():
    """With n = act(W_gate x), read behind the nonlinearity, on one text at a time."""
    model, arch = model_of("llama")
    for ids in IDS:
        kept = []

        def keep(value, kept=kept):
            kept.append(value if value.requires_grad else value.detach().requires_grad_())
            return kept[-1]

        with trace(*((arch.in_layer(model, layer, "mlp.act_fn"), "output", keep) for layer in range(3))):
            own = model(input_ids=ids[None, :-1]).logits[0, -1].softmax(-1)[ids[-1]]
        found = script.attributions(model, arch, ids[None], 1)
        for layer, (value, gradient) in enumerate(zip(kept, torch.autograd.grad(own, kept), strict=True)):
            assert torch.allclose(found[layer], (value.detach() * gradient)[0].amax(0), rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("model_type", MOE)
def test_means_of_experts_are_over_their_tokens(model_type):
    model, arch = model_of(model_type)
    means = script.mean_activations(model, arch, IDS, 4).double()
    reference, slow = slow_model(model_type)
    for text, ids in enumerate(IDS):
        for one in slow.values():
            one.seen.clear()
        with torch.no_grad():
            reference(input_ids=ids[None])
        for layer, one in slow.items():
            for expert in range(4):
                rows = [value for e, value in one.seen if e == expert]
                own = means[text, layer, expert * one.width : (expert + 1) * one.width]
                wanted = torch.stack(rows).mean(0) if rows else torch.zeros_like(own)
                assert torch.allclose(own, wanted, rtol=1e-6, atol=1e-9)
    with pytest.raises(InputError, match="gradients of the neurons of experts cannot be read"):
        script.attributions(model, arch, IDS, 1)


# ---------------------------------------------------------------- files


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny("llama", "model", seed=1)
    for seed, lang in enumerate(LANGS):
        write_ids(tmp_path, lang, n=2100 + 16 * seed, seed=seed)
    return tmp_path


def command(out: str, *more: str) -> list[str]:
    ids = [f"oscar.{lang}.train.tiny" for lang in LANGS]
    flags = ["-m", "model", "-n", "tiny", "-s", out, "--text-tokens", "16", "--texts", "130", "--dtype", "float64"]
    return [*flags, "-i", *ids, *more]


def contents(folder: str) -> dict[str, dict]:
    found = {}
    for path in sorted(Path(folder).rglob("*.pt")):
        tensors = results.read_tensors(path)
        head = json.loads(tensors.pop("header"))
        found[str(path.relative_to(folder))] = tensors | {"request": head["request"]}
    return found


def same(one: dict, two: dict) -> bool:
    alike = (
        torch.equal(value, two[name][key]) if isinstance(value, torch.Tensor) else value == two[name][key]
        for name, row in one.items() for key, value in row.items()
    )  # fmt: skip
    return list(one) == list(two) and all(alike)


def test_files_hold_both_halves_and_a_killed_run_goes_on(place, capsys):
    script.main(command("one"))
    found = contents("one")
    assert list(found) == [f"{what}/tiny.{lang}.pt" for what in ("gradients", "means") for lang in sorted(LANGS)]
    assert found["means/tiny.ga.pt"]["means"].shape == (130, 3, 48)
    model, arch = identify_model()
    texts = results.load("oscar.ga.train.tiny")[: 130 * 16].view(130, 16)
    halves = [script.attributions(model, arch, part, 130) for part in (texts[:65], texts[65:])]
    assert torch.allclose(found["gradients/tiny.ga.pt"]["sums"], torch.stack(halves), rtol=1e-9, atol=1e-15)
    assert found["gradients/tiny.ga.pt"]["texts"].tolist() == [65, 65]
    assert not list(place.rglob(".*.pt"))
    killed(lambda: script.main(command("two")), script, "attributions", 5)
    kept = {path: path.stat().st_mtime_ns for path in Path("two").rglob("*.pt")}
    assert any(".partial." in path.name for path in kept)
    script.main(command("two"))
    assert same(found, contents("two")) and not list(place.rglob("*.partial.*"))
    whole = {path: time for path, time in kept.items() if ".partial." not in path.name}
    assert whole and all(path.stat().st_mtime_ns == time for path, time in whole.items())
    capsys.readouterr()
    script.main(command("two"))
    assert capsys.readouterr().out.count("is finished") == 6
    with pytest.raises(InputError, match="another request"):
        script.main(command("two", "--text-tokens", "8"))
    for size in ("1", "513"):
        with pytest.raises(InputError, match=f"--text-tokens {size}: a text has a token to predict .* up to 512"):
            script.main(command("three", "--text-tokens", size))
    with pytest.raises(InputError, match="gives 3 texts of 16 tokens, and four are needed; give more text"):
        script.main(command("three", "--texts", "3"))


def identify_model():
    from cpt_utils.architectures import archs
    from cpt_utils.checkpoints import refs
    from cpt_utils.models import loading

    model = loading.load_model(refs.model("model"), torch.float64, torch.device("cpu"))
    return model, archs.for_config(model.config)


@pytest.mark.slow
def test_two_processes_find_what_one_does(place):
    script.main(command("one", "--device", "cpu"))
    launch("lsn/text_scores.py", *command("two"))
    assert same(contents("one"), contents("two")) and not list(place.rglob("*.partial.*"))


# ---------------------------------------------------------------- masks


def slow_average_precision(means: list[float], own: list[bool]) -> float:
    """The mean over the language's texts of precision among all texts that are at least as high."""
    found = []
    for value, mine in zip(means, own, strict=True):
        if mine:
            above = [other for mean, other in zip(means, own, strict=True) if mean >= value]
            found.append(sum(above) / len(above))
    return sum(found) / len(found)


def some_means(seed: int, ties: bool) -> list[np.ndarray]:
    """Of three languages, [texts, 2, 30]: neurons that fire for one of them more or less, or never."""
    draw = np.random.default_rng(seed)
    found = [draw.normal(size=(11 + 3 * g, 2, 30)) for g in range(3)]
    for g in range(3):
        found[g][:, 0, 4 * g : 4 * g + 4] += 1.5
        found[g][:, 1, 4 * g : 4 * g + 4] -= 1.5
        found[g][:, 1, 20] = 0
    return [np.round(one) if ties else one for one in found]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_average_precision_and_its_mask_are_those_of_the_definition(ties, chunk, monkeypatch):
    monkeypatch.setattr(identify.average_precision, "CHUNK", chunk)
    means = some_means(3, ties)
    exists = np.ones((2, 30), dtype=bool)
    exists[1, 25:] = False
    found = identify.average_precision.select(means, list(LANGS), 0.3, exists)
    every, places = np.concatenate(means), [(layer, i) for layer in range(2) for i in range(30) if exists[layer, i]]
    assert found.numbers["k"] == int(0.3 * 55) // 6 == 2 and found.n_candidates == 55
    for g, lang in enumerate(LANGS):
        own = [at == g for at in range(3) for _ in means[at]]
        slow = [(round(slow_average_precision(every[:, i, j].tolist(), own), 12), (i, j)) for i, j in places]
        top = [place for _, place in sorted(slow, key=lambda one: (-one[0], one[1]))[:2]]
        bottom = [place for _, place in sorted(slow)[:2]]
        chosen = [(layer, i) for layer, row in found.mask[lang].items() for i in row]
        assert chosen == sorted({*top, *bottom})
        row = found.numbers["average_precision"][lang]
        assert row["best"] == pytest.approx(max(slow)[0]) and row["top_tied"] >= 1
        assert row["top_cut"] == pytest.approx({place: ap for ap, place in slow}[top[-1]])
    owned = {(layer, i) for mask in found.mask.values() for layer, row in mask.items() for i in row}
    assert [tuple(pair) for pair in found.selected.tolist()] == sorted(owned)
    with pytest.raises(
        InputError, match=r"--rate 0.05 of 55 neurons is less than the 6 that are needed; give --rate 0.11"
    ):
        identify.average_precision.select(means, list(LANGS), 0.05, exists)


def test_gradient_scores_are_beyond_the_control_language():
    draw = np.random.default_rng(0)
    scores = [draw.normal(size=(2, 30)) for _ in LANGS]
    controls = {"en": "eu", "ga": "en", "eu": "en"}
    found = identify.gradient_score.select(scores, list(LANGS), controls, 0.2)
    of = dict(zip(LANGS, scores, strict=True))
    for lang in LANGS:
        slow = sorted(((of[lang] - of[controls[lang]])[i, j], (i, j)) for i in range(2) for j in range(30))[-4:]
        chosen = [(layer, i) for layer, row in found.mask[lang].items() for i in row]
        assert chosen == sorted(place for _, place in slow) and found.numbers["cuts"][lang] == slow[0][0]


@pytest.fixture
def counted(place):
    counting = load_script("lsn/activation.py")
    ids = [f"oscar.{lang}.train.tiny" for lang in LANGS]
    counting.main(["-m", "model", "-n", "tiny", "-s", "counts", "--block-size", "32", "-i", *ids])
    script.main(command("scores"))
    return place


FLAGS = ["-t", "tiny", "-l", ",".join(LANGS), "-a", "counts", "-o", "out", "--rate", "0.1"]


def test_masks_reports_and_refusals(counted, capsys):
    tensors = {what: {lang: results.read_tensors(f"scores/{what}/tiny.{lang}.pt") for lang in LANGS}
               for what in ("means", "gradients")}  # fmt: skip
    texts = [*FLAGS, "--scores", "scores"]
    identify.main(["--method", "ap", *texts, "--control-mask-out", "out/control.json"])
    means = [tensors["means"][lang]["means"].numpy() for lang in LANGS]
    parts = means, [one[:65] for one in means], [one[65:] for one in means]
    slow = [identify.average_precision.select(part, list(LANGS), 0.1).mask for part in parts]
    for lang in LANGS:
        assert masks.read("out/tiny.ap.json", lang, 3, 48) == slow[0][lang]
        control = masks.read("out/control.json", lang, 3, 48, control=True)
        assert [len(control[i]) for i in range(3)] == [len(slow[0][lang][i]) for i in range(3)]
    report = without_header(Path("out/tiny.ap.report.json"))
    assert report["convergence"]["halves"]["languages"] == identify.reporting.agreement(slow[1], slow[2])["languages"]
    assert report["convergence"]["halves"]["tokens_first"] == dict.fromkeys(LANGS, 65 * 16) and report["k"] == 2
    head = results.read_json("out/tiny.ap.json", "lsn-mask")[1]
    assert head["method"] == "ap" and set(head["scores"]) == set(LANGS) and head["rates"] == {"rate": 0.1}
    capsys.readouterr()
    identify.main(["--method", "ap", *texts, "-l", "en,ga", "-o", "two"])
    assert "both get nearly the same neurons, which silencing cannot tell apart" in capsys.readouterr().err
    identify.main(["--method", "gradient", *texts, "--control-lang", "ga"])
    score = {lang: row["sums"].sum(0).numpy() / 130 for lang, row in tensors["gradients"].items()}
    controls = {"en": "ga", "ga": "en", "eu": "ga"}
    wanted = identify.gradient_score.select(list(score.values()), list(LANGS), controls, 0.1).mask
    assert all(masks.read("out/tiny.gradient.json", lang, 3, 48) == wanted[lang] for lang in LANGS)
    assert results.read_json("out/tiny.gradient.json")[1]["controls"] == controls
    assert Path("out/tiny.gradient.report-convergence.png").is_file()
    assert "highest score" in capsys.readouterr().out
    identify.main(["--method", "gradient", *texts, "--control-lang", "ga"])
    assert "finished" in capsys.readouterr().out

    def fails(message: str, *more: str) -> None:
        with pytest.raises(InputError, match=message):
            identify.main([*texts, "-o", "other", *more])
        assert not Path("other").exists()

    fails("--bar-rate means nothing to --method ap", "--method", "ap", "--bar-rate", "0.5")
    fails("nothing says languages base: give --control-lang", "--method", "gradient")
    fails(r"scores/means has no none.<lang>.pt; run lsn/text_scores.py --what means", "--method", "ap", "-t", "none",
          *rename("none"))  # fmt: skip
    os.remove("scores/means/tiny.eu.pt")
    fails("nothing for eu", "--method", "ap")
    script.main(command("scores", "--limit", "9", "--overwrite"))
    fails("was made with --limit 9", "--method", "ap")
    save_tiny("llama", "model", seed=2)
    script.main(command("scores", "--overwrite"))
    fails(
        r"is of model, but the counts are of model; run lsn/text_scores.py and lsn/act",
        "--method",
        "ap",
    )


def rename(tag: str) -> list[str]:
    """Counts of another tag, of which there are no scores."""
    for lang in LANGS:
        Path(f"counts/{tag}.{lang}.pt").write_bytes(Path(f"counts/tiny.{lang}.pt").read_bytes())
    return []
