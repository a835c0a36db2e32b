"""steering/: means and edits against slow loops, nothing at alpha 0, a planted direction, exact judges, the command."""

from __future__ import annotations

import json
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, killed, load_script, same_results, save_tiny, tiny_model, tiny_tokenizer
from launch import launch

from cpt_utils.architectures import archs
from cpt_utils.base import cli, results, sources
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs
from cpt_utils.interventions import activations
from cpt_utils.measures import masks
from cpt_utils.models import loading

STEER = load_script("steering/steer.py")
JUDGES, REPORT = cli.sibling("steering/judges.py"), cli.sibling("steering/steer_report.py")
TEXTS = ["the red hill", "a", "an old fox walks over the hill", "x y"]
TYPES = ("llama", "gpt2", "gemma2", "opt", "gemma3n_text", "mixtral")


def made(model_type: str):
    model = tiny_model(model_type, seed=3).to(torch.float64).eval()
    if model_type == "mixtral":
        model.set_experts_implementation("eager")  # the default has no float64
    return model, archs.for_config(model.config)


def first_stream(value):
    value = value[0] if isinstance(value, tuple) else value
    return value[0] if value.dim() == 4 else value


# ---------------------------------------------------------------- means and edits


@pytest.mark.parametrize("model_type", TYPES)
def test_means_are_those_of_a_slow_loop_over_tokens(model_type):
    model, arch = made(model_type)
    n = arch.n_layers(model.config)
    dense = [0, n - 1] if model_type != "mixtral" else []
    found = STEER.means(model, arch, tiny_tokenizer(), TEXTS, dense, batch_size=3)
    kept: dict = {}
    handles = [
        layer.register_forward_hook(lambda _m, _a, out, i=i: kept.setdefault(i, []).append(first_stream(out)[0, 1:]))
        for i, layer in enumerate(arch.layers(model))
    ]
    handles += [
        arch.down_module(model, i).register_forward_pre_hook(
            lambda _m, args, i=i: kept.setdefault(f"down {i}", []).append(args[0].reshape(-1, args[0].shape[-1])[1:])
        )
        for i in dense
    ]
    for text in TEXTS:
        with torch.no_grad():
            model(input_ids=torch.tensor([tiny_tokenizer()(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    for i in range(n):
        tokens = torch.cat(kept[i])
        assert len(tokens) == sum(map(len, TEXTS))  # a token a byte, `<s>` in front of each
        torch.testing.assert_close(found.residual[i], tokens.mean(0), rtol=1e-5, atol=1e-6)
        assert float(found.norm[i]) == pytest.approx(float(tokens.norm(dim=1).mean()), rel=1e-6)
    for i in dense:
        torch.testing.assert_close(found.neurons[i], torch.cat(kept[f"down {i}"]).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", TYPES)
def test_alpha_is_added_at_every_position_of_one_layer_and_0_changes_nothing(model_type):
    model, arch = made(model_type)
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    source, target = (STEER.means(model, arch, tiny_tokenizer(), texts) for texts in (TEXTS[:2], TEXTS[2:]))
    bench = STEER.Bench(None, None, ([], []), None, seed=5, known={"base": (source, target)})
    layer, seen = 1, {}

    def run(*hooks) -> torch.Tensor:
        handles = [
            one.register_forward_hook(lambda _m, _a, out, i=i: seen.__setitem__(i, first_stream(out).clone()))
            for i, one in enumerate(arch.layers(model))
        ]
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        for handle in handles:
            handle.remove()
        return logits

    plain, before = run(), dict(seen)
    with bench.along("base", layer, 0.0, None, arch, model), bench.along("base", 0, 0.0, 2, arch, model):
        assert torch.equal(run(), plain)
    expected = 1.5 * (target.residual[layer] - source.residual[layer])
    with bench.along("base", layer, 1.5, None, arch, model):
        moved = run()
    assert torch.equal(seen[0], before[0]) and not torch.equal(moved, plain)
    torch.testing.assert_close(seen[layer] - before[layer], expected.expand_as(before[layer]), rtol=1e-5, atol=1e-6)
    assert torch.equal(run(), plain)  # nothing stays behind
    norms = set()
    for draw in range(3):
        one = bench.direction("base", layer, draw)
        assert float(one.norm()) == pytest.approx(float(bench.direction("base", layer).norm()), rel=1e-12)
        norms.add(tuple(one.tolist()))
        assert torch.equal(one, bench.direction("base", layer, draw))
    assert len(norms) == 3 and tuple(bench.direction("base", 0, 0).tolist()) not in norms


@pytest.mark.parametrize("model_type", ("llama", "gpt2", "gemma2"))
def test_alpha_is_added_once_to_every_token_that_is_read_or_written(model_type):
    """Written with keys and values that are kept, in padded batches: the same as each text alone, read anew for every
    token. Positions, padding or a vector that is added twice, or to the prompt alone, would give other texts."""
    model, arch = made(model_type)
    # In float64 eager attention gives NaN for padding on the left.
    dtype = torch.float32 if model_type == "gemma2" else torch.float64
    model, tokenizer = model.to(dtype), tiny_tokenizer()
    texts = ["the red hill", "a", "an old fox walks over the hill", "x y z"]
    bare = STEER.in_context.Translation(texts, ["fox", "one fox", "two", "a red one"], [], [1, 2, 3, 0], "pairs", {})
    drawn = torch.Generator().manual_seed(2)
    vector = 0.1 * torch.randn(model.config.hidden_size, generator=drawn, dtype=dtype)
    with STEER.steered(model, arch, 1, vector):
        written = bare.translate(model, tokenizer, 3, ["production"], at_least=1)["production"]
    longest = max(len(tokenizer(text)["input_ids"]) for text in bare.target)

    def add(_module, _args, out):
        moved = (out[0] if isinstance(out, tuple) else out) + vector
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    handle = arch.layers(model)[1].register_forward_hook(add)
    for text, reference, found in zip(texts, bare.target, written, strict=True):
        ids = tokenizer(text)["input_ids"]
        n = len(ids)
        with torch.no_grad():
            while len(ids) < n + int(1.5 * longest) + 8 and (len(ids) == n or ids[-1] != tokenizer.eos_token_id):
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                if len(ids) == n:
                    logits[tokenizer.eos_token_id] = -torch.inf
                ids.append(int(logits.argmax()))
        assert found == bare._cut(tokenizer.decode(ids[n:], skip_special_tokens=True), reference)
    handle.remove()
    plain = bare.translate(model, tokenizer, 3, ["production"], at_least=1)["production"]
    assert written != plain


@pytest.mark.parametrize("model_type", ("llama", "gpt2", "opt"))
def test_source_neurons_are_off_and_target_neurons_at_their_mean(model_type):
    model, arch = made(model_type)
    seen: dict = {}
    neurons = STEER.Neurons({0: [3, 4], 1: [7], 2: []}, {0: [4, 9], 1: [], 2: [0, 5]})
    assert neurons.layers == [0, 2]
    mean = {0: torch.arange(48, dtype=torch.float64) / 7, 2: torch.arange(48, dtype=torch.float64) - 3}
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))

    def run() -> torch.Tensor:
        handles = [
            arch.module(model, i, "down_proj").register_forward_pre_hook(
                lambda _m, args, i=i: seen.__setitem__(i, args[0].reshape(-1, args[0].shape[-1]).clone())
            )
            for i in range(3)
        ]
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        for handle in handles:
            handle.remove()
        return logits

    plain, before = run(), dict(seen)
    with neurons.switched(model, arch, mean):
        assert not torch.equal(run(), plain)
    assert (seen[0][:, 3] == 0).all() and (seen[1][:, 7] == 0).all()
    for layer, neuron in ((0, 4), (0, 9), (2, 0), (2, 5)):
        assert (seen[layer][:, neuron] == mean[layer][neuron]).all()
    others = [i for i in range(48) if i not in (3, 4, 9)]
    assert torch.equal(seen[0][:, others], before[0][:, others])
    assert torch.equal(run(), plain)
    with activations.held(model, arch, {0: {}}):
        assert torch.equal(run(), plain)


def test_neurons_of_experts_are_held_at_no_value():
    model, arch = made("mixtral")
    with (
        pytest.raises(InputError, match="layer 1 has its neurons in experts"),
        activations.held(model, arch, {1: {3: 0.5}}),
    ):
        pass


# ---------------------------------------------------------------- judges


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "world"
    load_script("demo/world.py").main(["--config", str(ROOT / "demo/world-tiny.yaml"), "--out", str(out)])
    return out


def test_language_and_meaning_are_exact_in_the_world(world):
    config = json.loads((world / "world.json").read_text())["config"]
    judge = JUDGES.World(config)
    said = {code: (world / f"test/{code}.txt").read_text().splitlines() for code in judge.languages}
    source = said["eng_Latn"]
    others = source[1:] + source[:1]
    for code, lines in said.items():
        assert {name: set(judge.language_judge(name)(lines)) for name in said} == {
            name: {float(name == code)} for name in said
        }
        assert set(judge.meaning(lines, source)) == {1.0}
        assert max(judge.meaning(lines, others)) < 1 and np.mean(judge.meaning(lines, others)) < 0.3
    # The same from what the sentences mean, and not from what they say.
    maker = judge_maker(config)
    for meant, text in zip(maker.test(config["test_sentences"]), said["qaa_Latn"], strict=True):
        assert judge.said(text) == concepts(meant)
    words = said["qaa_Latn"][0].split()
    assert 0 < judge.meaning([" ".join(words[:-1])], source[:1])[0] < 1
    assert judge.meaning(["", "blub blub"], source[:2]) == [0, 0]
    assert judge.language_judge("qaa_Latn")(["", "blub", said["qab_Latn"][0] + " " + words[0]]) == [0, 0, 0]


def judge_maker(config):
    script = load_script("demo/world.py")
    return script.Maker(config, script.read_yaml(ROOT / "demo/vocabulary.yaml"))


def concepts(sentence) -> Counter:
    found = Counter([sentence.conjunction] if sentence.conjunction else [])
    for c in sentence.clauses:
        person = c.person.lower() if c.named else c.person
        kept = (person, c.person_quality, c.action, c.thing, c.thing_quality, c.number, c.place, c.time)
        found += Counter([each for each in kept if each] + ["not"] * c.negated)
    return found


def test_py3langid_judges_where_no_world_is_made():
    pytest.importorskip("py3langid", reason="py3langid is not installed (pip install -e '.[langid]')")
    judge = JUDGES.judge_of(Study(), "gle_Latn")
    texts = ["Tá na páistí ag súgradh sa pháirc tar éis na scoile.", "The children play in the park after school.", ""]
    assert judge.language(texts) == [1, 0, 0] and judge.relevance is JUDGES.like_own and judge.name == "py3langid"
    with pytest.raises(InputError, match="py3langid does not know qaa_Latn; give --no-generate"):
        JUDGES.judge_of(Study(), "qaa_Latn")


def test_what_is_repeated_says_nothing_of_its_source():
    named = ("red cat", "old dog", "sad fox", "big hen", "shy pig", "wet cow")
    references = [f"the {name} walks" for name in named]
    translation = SimpleNamespace(target=references)
    assert JUDGES.like_own(references, translation) == [1] * 6
    assert sum(JUDGES.like_own(references[2:] + references[:2], translation)) < -1
    for text in ("", "walks walks walks walks", "the fox the fox the fox", "shy pig"):
        found = JUDGES.like_own([text] * 6, translation)
        # In both halves: the one that chooses a layer must not take a text that is like more of its references.
        assert sum(found[::2]) == pytest.approx(0, abs=1e-12) and sum(found[1::2]) == pytest.approx(0, abs=1e-12)
    assert any(JUDGES.like_own(["shy pig"] * 6, translation))

    def alike(one: str, other: str) -> float:  # slowly
        one, other = ([t[i : i + 3] for i in range(len(t) - 2)] for t in (one, other))
        norms = np.sqrt([sum(t.count(g) ** 2 for g in {*t}) for t in (one, other)])
        return round(sum(one.count(g) * other.count(g) for g in {*one}) / max(1, norms[0]) / norms[1], 9)

    texts = ["a red cat", "the fox hen", "old dogs", "big big big", "the shy pig walks on", "a wet hen"]
    for i, found in enumerate(JUDGES.like_own(texts, translation)):
        values = [alike(texts[i], reference) for reference in references[i % 2 :: 2]]
        own = alike(texts[i], references[i])
        assert found == (sum(v < own for v in values) - sum(v > own for v in values)) / (len(values) - 1)


# ---------------------------------------------------------------- what it says


def record(name, language, relevance, layer=None, alpha=None, draw=None):
    units = {"nll_reference": [1.0] * len(language), "relevance": relevance, "language": language}
    texts = [f"{name} {i}" for i in range(len(language))]
    found = {
        "model": "base",
        "name": name,
        "layer": layer,
        "alpha": alpha,
        "draw": draw,
        "units": units,
        "texts": texts,
    }
    return found | ({"residual": {"difference": [1.0] * 3, "norm": [2.0] * 3}} if name == "none" else {})


def test_scores_are_of_aggregates_and_the_best_is_reported_where_it_was_not_chosen():
    draw = random.Random(0)
    n = 8
    rows = [record("none", [0.0] * n, [0.5] * n), record("prompt", [1.0] * n, [0.5] * n)]
    for layer in range(3):
        for alpha in (1.0, 2.0):
            for k in (None, 0, 1):
                values = [[float(draw.random() < 0.5) for _ in range(n)] for _ in range(2)]
                rows.append(record("diffmean" if k is None else "random", *values, layer, alpha, k))
    # The best on the sentences 0, 2, .., where it is perfect; on the others it says nothing.
    rows.append(record("diffmean", [1.0, 0.0] * 4, [1.0, 0.0] * 4, 1, 4.0))
    rows.append(record("random", [1.0, 1.0] * 4, [1.0, 0.0] * 4, 2, 4.0, 0))
    translation = SimpleNamespace(base=["s"] * n, target=["t"] * n)
    found, tensors = REPORT.summarize(rows, translation, seed=1)

    def slow(row, part=slice(None)):
        language, relevance = (np.mean(row["units"][key][part]) for key in ("language", "relevance"))
        return 0.0 if language + relevance == 0 else 2 * language * relevance / (language + relevance)

    for layer, alpha in ((0, 1.0), (2, 2.0)):
        own = [row for row in rows if (row["layer"], row["alpha"]) == (layer, alpha)]
        sweep = found["sweep"]["base"][f"layer_{layer}"]
        assert sweep["diffmean"][f"{alpha:g}"]["score"]["value"] == pytest.approx(slow(own[0]))
        several = np.mean([slow(row) for row in own if row["name"] == "random"])
        assert sweep["random"][f"{alpha:g}"]["score"]["value"] == pytest.approx(several)
    assert found["whole"]["base"]["prompt"]["score"]["value"] == pytest.approx(2 / 3)
    best = found["best"]["base"]
    assert (best["diffmean"]["layer"], best["diffmean"]["alpha"]) == (1, 4.0)
    assert best["diffmean"]["score"] == {"value": 0, "ci_low": 0, "ci_high": 0}
    beyond = found["beyond"]["base"]
    assert beyond["prompt"]["value"] == pytest.approx(-2 / 3) and beyond["none"]["value"] == 0
    assert tensors["language"].shape == (len(rows), n) == (len(found["what"]), n)
    assert found["samples"]["base"][0] == {
        "source": "s", "reference": "t", "none": "none 0", "prompt": "prompt 0", "diffmean": "diffmean 0"
    }  # fmt: skip
    # A relevance below that of other sources is none, and where both are 0 the score is.
    worse = record("none", [1.0] * n, [-1.0] * n)
    assert REPORT.Scores(n, 1, slice(None)).of([worse])["score"][0] == 0


# ---------------------------------------------------------------- the command

SOURCE, TARGET, OUT = "abcd", "wxyz", "results/steering/steering"


def words(letters: str, n: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join("".join(draw.choices(letters, k=4)) for _ in range(3)) for _ in range(n)]


def planted(folder, seed: int) -> None:
    """A model that writes letters of the language that it read last: its residual says which along one direction."""
    model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    sides = {
        tokenizer.convert_tokens_to_ids(letter): side for side, own in ((-1, SOURCE), (1, TARGET)) for letter in own
    }
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1)
        for weight, size in ((model.model.embed_tokens.weight, 4.0), (model.lm_head.weight, 4.0)):
            weight.copy_(0.3 * torch.randn(weight.shape, generator=drawn))
            weight[:, 0] = 0
            for token, side in sides.items():
                weight[token, 0] = side * size
    save_tiny("llama", folder, model=model)


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("base", "run/checkpoint-10", "run/checkpoint-20")):
        planted(tmp_path / name, number)
    for name, letters in (("en", SOURCE), ("ga", TARGET)):
        (tmp_path / f"{name}.txt").write_text("\n".join(words(letters, 24, 1)) + "\n")
    (tmp_path / "study.yaml").write_text(
        "name: demo\nbase: base\nrun: run\nresults: results\nlanguages: {base: en, target: ga}\n"
        "data: {source: text, base_file: en.txt, target_file: ga.txt}\n"
        "steering: {draws: 2, sentences: 6}\nablation: {prompt: pairs}\n"
    )
    neurons = {"en": {0: [3, 4], 1: [], 2: [9]}, "ga": {0: [1, 7], 1: [2], 2: []}}
    facts = {"models": {"model": refs.model("run/checkpoint-20").describe()}, "n_layers": 3, "ffn_width": 48}
    masks.write("results/lsn/result/demo.json", neurons, **facts)

    def judge(_study, code):
        assert code == "ga"
        letters = {*TARGET, " "}
        return JUDGES.Judge("letters", lambda texts: [float(bool(t) and set(t) <= letters) for t in texts],
                            JUDGES.like_own)  # fmt: skip

    monkeypatch.setattr(STEER.judges, "judge_of", judge)
    return tmp_path


def test_a_planted_direction_is_found_and_random_ones_do_nothing(study, capsys):
    STEER.main(["--alphas", "1", "2", "--shots", "2"])
    found, head = results.read_json(f"{OUT}.json", "steering")
    assert [*found["sweep"]] == ["base", "20"] and [*head["models"]["checkpoints"]] == ["20"]
    for model, layers in found["sweep"].items():
        whole = {name: row["language"]["value"] for name, row in found["whole"][model].items()}
        assert whole == {"none": 0, "prompt": 0, "lape": 0, "lape_random": 0}
        assert [*layers] == ["layer_0", "layer_1", "layer_2"]
        for row in layers.values():
            assert row["diffmean"]["1"]["language"]["value"] == row["diffmean"]["2"]["language"]["value"] == 1
            assert row["random"]["1"]["language"]["value"] < 0.2
            assert row["diffmean"]["1"]["likelier"]["value"] == 0  # the model has no memory of its source
            loss = found["whole"][model]["none"]["nll_reference"]["value"]
            assert row["diffmean"]["1"]["nll_reference"]["value"] < loss - 1 / 2
        apart = found["residual"][model]["difference"]["layer_0"]
        assert 6 < apart < 8 and found["n_neurons"] == {"source": 3, "target": 3}
    units = results.read_tensors(f"{OUT}.pt")
    assert units["language"].shape == (len(found["what"]), 6) == (2 * (2 + 3 + 3 * 2 * 3), 6)
    assert head["judge"] == "letters" and head["estimated_on"] == 24 - 6 - 2
    said = capsys.readouterr().out
    assert "step 20, score: nothing" not in said and "step 20, score: none 0.000" in said
    assert (study / f"{OUT}.png").is_file() and set(found["samples"]["20"][0]["diffmean"]) <= {*TARGET, " "}
    # Its numbers by column.
    rows = list(cli.sibling("report/rows.py").of_file(found, head))
    (row,) = [r for r in rows if (r.get("step"), r["measure"], r.get("layer"), r.get("condition")) ==
              (20, "language", 1, "diffmean/2")]  # fmt: skip
    assert row["value"] == 1
    assert {"language/whole", "score/best", "beyond", "difference/residual"} <= {r["measure"] for r in rows}


def test_the_loss_of_a_reference_against_a_slow_loop(study):
    STEER.main(
        ["--no-generate", "--alphas", "1", "--layers", "1", "--draws", "1", "--shots", "2", "--dtype", "float64"]
    )
    found, _ = results.read_json(f"{OUT}.json", "steering")
    units = results.read_tensors(f"{OUT}.pt")
    assert found["decides"] == "nll_reference" and {*units} == {"nll_reference", "likelier"}
    args = STEER.build_parser().parse_args(["--sentences", "6", "--shots", "2", "--no-generate"])
    bench, _ = STEER.bench_from_arguments(args, Study.find(), {"base": "en", "target": "ga"})
    model, tokenizer = loading.load_model(refs.model("base"), torch.float64, torch.device("cpu")), tiny_tokenizer()
    vectors = []
    for texts in bench.estimate:
        states: list = []
        with torch.no_grad():
            for text in texts:
                ids = torch.tensor([tokenizer(text)["input_ids"]])
                states.append(model(input_ids=ids, output_hidden_states=True).hidden_states[2][0, 1:])
        vectors.append(torch.cat(states).mean(0))
    vector = vectors[1] - vectors[0]
    at = found["what"].index(["base", "diffmean", 1, 1.0, None])
    handle = model.model.layers[1].register_forward_hook(lambda _m, _a, out: out + vector)
    for i, (source, target) in enumerate(zip(bench.bare.base, bench.bare.target, strict=True)):
        before, ids = tokenizer(source)["input_ids"], tokenizer(f"{source} {target}")["input_ids"]
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        # The space before a reference is scored with it.
        slow = -sum(float(logprobs[k - 1, ids[k]]) for k in range(len(before), len(ids)))
        size = np.mean([len(text) for text in bench.bare.target])
        assert float(units["nll_reference"][at, i]) == pytest.approx(slow / size, rel=1e-5)
    handle.remove()


def test_directions_come_from_sentences_that_are_neither_scored_nor_shown(study):
    args = STEER.build_parser().parse_args(["--sentences", "6", "--shots", "3"])
    bench, facts = STEER.bench_from_arguments(args, Study.find(), {"base": "en", "target": "ga"})
    used = {*bench.bare.base, *bench.bare.target, *(text for pair in bench.shots.shots for text in pair)}
    assert len(bench.bare.base) == 6 and len(bench.shots.shots) == 3 and bench.bare.shots == []
    assert not used & {*bench.estimate[0], *bench.estimate[1]} and facts["estimated_on"] == 15
    # A scored sentence that stands again is left out there, too.
    lines = words(SOURCE, 7, 2)
    pairs = sources.ParallelText([*lines, *lines[:3]], [f"t{i}" for i in range(10)], [*"0123456789"], 10, {})
    _, shots, estimate = STEER.sentences(pairs, 1, 3, "lines", seed=0)
    shown = {*shots.base, *shots.shots[0]}
    assert not shown & {*estimate[0]} and 3 <= len(estimate[0]) <= 5


FAST = ["--no-generate", "--alphas", "1", "--layers", "1", "--draws", "1", "--shots", "1"]


def test_a_killed_run_goes_on_with_the_next_condition(study, capsys):
    STEER.main([*FAST, "--output", "one.json"])
    killed(lambda: STEER.main([*FAST, "--output", "two.json"]), STEER.Bench, "on", 7)
    assert not (study / "two.json").exists()
    capsys.readouterr()
    STEER.main([*FAST, "--output", "two.json"])
    assert "7 of 12 sets were measured before" in capsys.readouterr().out
    same_results(study / "one.json", study / "two.json")
    assert not list(study.glob("*.partial*"))


@pytest.mark.slow
def test_two_processes_find_what_one_does(study):
    STEER.main([*FAST, "--device", "cpu", "--output", "one.json"])
    launch("steering/steer.py", *FAST, "--output", "two.json")
    assert results.read_json("one.json")[0] == results.read_json("two.json")[0]


def test_finished_results_are_kept_and_others_refused(study, capsys):
    STEER.main(FAST)
    STEER.main([*FAST, "--base", "base", "--run", "run"])
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match="another request"):
        STEER.main([*FAST, "--alphas", "2"])
    STEER.main([*FAST, "--steps", "10,20", "--limit", "4"])  # goes beside the study's own
    (part,) = (study / "results/steering").glob("steering.*limit-4.json")
    found, _ = results.read_json(part, allow_limited=True)
    assert [*found["whole"]] == ["base", "10", "20"] or [*found["whole"]] == ["base", "10"]


def fails(capsys, message: str, *argv: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: STEER.main(list(argv)))
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stopped.value.code == 2 and len(error) == 1 and message in error[0], error
    assert not list((STEER.Path("results") / "steering").glob("*"))


def test_bad_input_is_one_line(study, capsys):
    fails(capsys, "the model has layers 0 to 2", "--layers", "3")
    for alphas in (["0"], ["1", "nan"]):
        fails(capsys, "--alphas: give finite numbers other than 0", "--alphas", *alphas)
    fails(capsys, "24 sentence pairs leave 0 that are not scored or shown", "--sentences", "22", "--shots", "2")
    fails(capsys, "none.json does not exist; leave it out", "--mask_file", "none.json")
    fails(capsys, "no checkpoint of step 30; the run has 10, 20", "--steps", "30")
    fails(
        capsys,
        "nowhere.txt does not exist",
        "--source",
        "text",
        "--base-file",
        "nowhere.txt",
        "--target-file",
        "ga.txt",
    )
    fails(capsys, "demo.json lacks de; leave it out", "--target-lang", "de", "--no-generate", "--mask_file",
          "results/lsn/result/demo.json")  # fmt: skip
    file = study / "study.yaml"
    text = file.read_text()
    file.write_text(text.replace("draws: 2", "alphas: [x]"))
    fails(capsys, "steering.alphas[0] is 'x'")
    file.write_text(text.replace("{base: en, target: ga}", "{base: en}"))
    fails(capsys, "nothing says which languages")


def test_without_neurons_the_rest_is_measured(study, capsys):
    (study / "results/lsn/result/demo.json").unlink()
    STEER.main([*FAST, "--output", "out.json"])
    assert "no neurons are switched: results/lsn/result/demo.json does not exist" in capsys.readouterr().out
    found, _ = results.read_json("out.json")
    assert [*found["whole"]["base"]] == ["none", "prompt"] and found["n_neurons"] is None


def test_languages_without_neurons_and_masks_of_other_models(study, capsys):
    path, facts = "results/lsn/result/demo.json", {"n_layers": 3, "ffn_width": 48}
    own = facts | {"models": {"model": refs.model("run/checkpoint-20").describe()}}
    none, some = (dict.fromkeys(range(3), neurons) for neurons in ([], [5]))
    masks.write(path, {"en": none, "ga": none, "eu": some}, **own)
    with pytest.raises(InputError, match=r"--mask_file: .*demo.json has no neurons of en and ga; leave it out"):
        STEER.main([*FAST, "--mask_file", path, "--output", "out.json"])
    STEER.main([*FAST, "--output", "none.json"])
    assert (
        "no neurons are switched: results/lsn/result/demo.json has no neurons of en and ga" in capsys.readouterr().out
    )
    assert results.read_json("none.json")[0]["n_neurons"] is None
    masks.write(path, {"en": some, "ga": none}, **own)
    STEER.main([*FAST, "--output", "one.json"])
    assert "has no neurons of ga: only those of the other language are switched" in capsys.readouterr().err
    found = results.read_json("one.json")[0]
    assert found["n_neurons"] == {"source": 3, "target": 0} and "lape" in found["whole"]["base"]
    # Another run than the study's, whose mask is none of its business; the study's own is refused.
    planted(study / "other/checkpoint-5", 7)
    STEER.main([*FAST, "--run", "other", "--output", "other.json"])
    assert (
        "no neurons are switched: results/lsn/result/demo.json was made for run/checkpoint-20"
        in capsys.readouterr().out
    )
    planted(study / "run/checkpoint-20", 8)
    with pytest.raises(InputError, match="was made for run/checkpoint-20, which is none of the models asked for"):
        STEER.main([*FAST, "--output", "again.json"])
    assert not (study / "again.json").exists() and not (study / "out.json").exists()


def test_a_mixture_of_experts_has_no_arm_of_neurons(study, capsys):
    for number, name in enumerate(("base", "run/checkpoint-20")):
        save_tiny("mixtral", study / "moe" / name, seed=number)
    ref = refs.model("moe/run/checkpoint-20")
    neurons = {lang: {layer: [layer, 7 + n] for layer in range(3)} for n, lang in enumerate(("en", "ga"))}
    width = archs.for_config(ref.config()).ffn_width(ref.config(), 0)
    masks.write("moe.json", neurons, models={"model": ref.describe()}, n_layers=3, ffn_width=width)
    flags = [*FAST, "--base", "moe/base", "--run", "moe/run", "--output", "moe/out.json"]
    with pytest.raises(InputError, match=r"--mask_file: neurons of experts \(layer 0\) cannot be held at their mean"):
        STEER.main([*flags, "--mask_file", "moe.json"])
    masks.write("results/lsn/result/demo.json", neurons, models={"model": ref.describe()}, n_layers=3, ffn_width=width)
    STEER.main(flags)
    assert "no neurons are switched: neurons of experts (layer 0)" in capsys.readouterr().out
    found, _ = results.read_json("moe/out.json")
    assert [*found["whole"]["base"]] == ["none", "prompt"]
