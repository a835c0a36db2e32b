"""All curves of retrieval against a float64 loop, on models where a planted token or dimension outweighs the rest."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import load_script, tiny_model, tiny_tokenizer

from cpt_utils.architectures.archs import for_config
from cpt_utils.base import figures, results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.measures import curves
from cpt_utils.models import states
from cpt_utils.models.batching import encode, padded
from cpt_utils.models.trace import trace

BASE = ["the cat sees a dog, runs", "seven birds, loud", "rivers", "a red house, a dog, a cat", "one", "the sun, today",
        "we eat bread", "rain falls, at night", "rivers"]  # fmt: skip
TARGET = ["feiceann an cat, madra", "seacht n-ean", "aibhneacha, inniu", "teach dearg, madra", "a haon, a do", "inniu",
          "ithimid aran", "titeann baisteach", "aibhneacha, inniu"]  # fmt: skip
CURVES = {name: curve.hits for name, curve in curves.MEASURES.items()}


@pytest.fixture(scope="module")
def sr():
    return load_script("sentence-retrieval/sr_experiment.py")


def planted(where, dtype="float64"):
    """A model in which the first token, a delimiter, or one dimension of every token is 300 from the start."""
    model, tokenizer = tiny_model("llama", dtype=dtype), tiny_tokenizer()
    made = encode(tokenizer, [","])
    first, delimiter = made.ids[0][0], made.ids[0][-1]
    assert made.special[0][0] == 1 and first != delimiter
    rows = {"first token": [first], "delimiter": [delimiter], "dimension": slice(None), "nothing": []}[where]
    with torch.no_grad():
        model.model.embed_tokens.weight[rows, 5] = 300.0
    return model, tokenizer


def slow_vectors(model, side, special_tokens):
    """One sentence at a time: for each a list over hidden states of what `Pooled` has, in plain float64."""
    found = []
    for ids, special in zip(side.ids, side.special, strict=True):
        with torch.inference_mode():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        enters = [i for i, own in enumerate(special) if special_tokens or not own]
        rows = []
        for state in hidden:
            tokens = [state[0, i].double().numpy() for i in enters]
            norms = [math.sqrt((token**2).sum()) for token in tokens]
            places = range(1, len(tokens) + 1)
            rows.append(
                (
                    sum(tokens) / len(tokens),
                    sum(token / norm for token, norm in zip(tokens, norms, strict=True)) / len(tokens),
                    sum(at * token for at, token in zip(places, tokens, strict=True)) / sum(places),
                    tokens[-1],
                    max(norms) / sum(norms),
                )
            )
        found.append(rows)
    return found


def slow_hits(xs, ys, base, target, strict, centred, k=4):
    """Hits [sentences] of one hidden state from vectors, pair by pair; sentences of one text are one."""
    if centred:
        xs, ys = [x - sum(xs) / len(xs) for x in xs], [y - sum(ys) / len(ys) for y in ys]
    n = len(xs)
    a = [[float(x @ y / math.sqrt(x @ x) / math.sqrt(y @ y)) for y in ys] for x in xs]
    hits = []
    for i in range(n):
        if strict:
            row = [a[i][j] for j in range(n) if target[j] != target[i]]
            column = [a[j][i] for j in range(n) if base[j] != base[i]]
            hits.append(a[i][i] > max(row + column) + 1e-15)
            continue
        means = [sum(sorted((a[r][j] for r in range(n)), reverse=True)[:k]) / k for j in range(n)]
        own = sum(sorted(a[i], reverse=True)[:k]) / k
        scores = [a[i][j] / ((own + means[j]) / 2 + 1e-6) for j in range(n)]
        hits.append(target[scores.index(max(scores))] == target[i])
    return hits


WAYS = {  # the curve -> which vectors, strict, centred
    "published": (0, False, False), "unit": (1, False, False), "centred": (0, False, True),
    "unit_centred": (1, False, True), "mexa_weighted": (2, True, False), "mexa_last": (3, True, False),
}  # fmt: skip


@pytest.mark.parametrize("special_tokens", [True, False])
@pytest.mark.parametrize("where", ["first token", "delimiter", "dimension", "nothing"])
def test_all_curves_equal_a_loop_over_sentences(sr, where, special_tokens):
    model, tokenizer = planted(where)
    arch, pad = for_config(model.config), tokenizer.pad_token_id
    sides = [encode(tokenizer, texts) for texts in (BASE, TARGET)]
    slow = [slow_vectors(model, side, special_tokens) for side in sides]
    shares = [sum(sentence[0][4] for sentence in side) / len(side) for side in slow]
    massive = where == "delimiter" or (where == "first token" and special_tokens)
    assert (min(shares) > 0.4) == massive
    wanted = {
        name: [
            slow_hits(*([s[layer][part] for s in side] for side in slow), BASE, TARGET, strict, centred)
            for layer in range(len(slow[0][0]))
        ]
        for name, (part, strict, centred) in WAYS.items()
    }
    for batch_size, padding in ((1, "right"), (4, "left"), (4, "right"), (64, "left"), (None, "right")):
        pooled = [
            sr.sentence_vectors(model, arch, side, pad, batch_size, special_tokens, padding_side=padding)
            for side in sides
        ]
        for side, found in zip(slow, pooled, strict=True):
            for part, each in enumerate(found):
                expected = torch.tensor(np.array([[layer[part] for layer in rows] for rows in side])).transpose(0, 1)
                torch.testing.assert_close(each, expected, rtol=1e-9, atol=1e-11)
        found = sr.scoring.Retrieval(*pooled, first=tuple(side.first for side in sides))
        for name, hits in CURVES.items():
            assert getattr(found, hits).tolist() == wanted[name], (name, batch_size, padding)
    again = sr.measure(model, arch, tokenizer, *sides, special_tokens=special_tokens)
    assert all(getattr(again, hits).tolist() == wanted[name] for name, hits in CURVES.items())
    assert again.readout.tolist() == wanted["unit_centred"][-1]
    assert again.largest_norm_share.mean(1).tolist() == pytest.approx(
        [sum(s[layer][4] for side in slow for s in side) / len(BASE) / 2 for layer in range(len(slow[0][0]))], rel=1e-9
    )


@pytest.mark.parametrize("where", ["first token", "delimiter", "dimension"])
def test_float32_comes_close(sr, where):
    model, tokenizer = planted(where, "float32")
    side = encode(tokenizer, BASE)
    slow = slow_vectors(model, side, True)
    for part, each in enumerate(sr.sentence_vectors(model, for_config(model.config), side, 0, 4)):
        expected = torch.tensor(np.array([[layer[part] for layer in rows] for rows in slow])).transpose(0, 1).float()
        assert float((each - expected).abs().max() / expected.abs().max()) < 1e-5


def as_published(model, arch, ids, mask, keep):
    """The mean over tokens as it was taken before there were other vectors: [L+1, batch, hidden]."""
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    weights, sums = keep.bool()[:, None].to(wide), {}
    layers = arch.layers(model)
    points = [(layers[0], "input", 0), (arch.last(model), "output", len(layers))]
    points += [(layer, "output", i + 1) for i, layer in enumerate(layers[:-1])]

    def at(index):
        return lambda hidden: sums.update({index: torch.bmm(weights, hidden.to(wide))[:, 0]})

    with trace(*((module, side, at(index)) for module, side, index in points)), torch.inference_mode():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        arch.decoder(model)(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)
    return torch.stack([sums[index] for index in sorted(sums)]) / keep.bool().sum(1, keepdim=True).to(wide)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_published_mean_keeps_every_bit(model_type, dtype, side):
    if (model_type, dtype, side) == ("gemma2", "float64", "left"):
        pytest.skip("NaN in rows of padding alone")
    model = tiny_model(model_type, dtype=dtype)
    arch, generator = for_config(model.config), torch.Generator().manual_seed(3)
    for lengths in ([5], [1, 9, 30], list(range(1, 40))):
        ids, mask = padded([torch.randint(3, 259, (n,), generator=generator).tolist() for n in lengths], 0, side)
        keep = mask.clone()
        keep[keep.sum(1) > 1, -1 if side == "left" else 0] = 0
        for enters in (mask, keep):
            old = as_published(model, arch, ids, mask, enters)
            assert torch.equal(states.pooled_states(model, arch, ids, mask, enters).mean, old)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_padding_positions_hold_moves_no_vector(bad):
    model = tiny_model("llama")
    arch = for_config(model.config)
    ids, mask = padded([[5, 9, 17, 40, 3], [7, 8]], pad=0)
    expected = states.pooled_states(model, arch, ids, mask)

    def spoil(_module, _args, output):
        return output.masked_fill(mask[:, :, None] == 0, bad)

    model.model.norm.register_forward_hook(spoil)
    for part, other in zip(states.pooled_states(model, arch, ids, mask), expected, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-6, atol=1e-7)


def test_no_state_outlives_its_layer():
    """All hidden states of all tokens are never in memory together: while one is pooled, those before are gone."""
    import weakref

    model = tiny_model("llama", layers=6)
    seen, alive = [], []

    def watch(_module, _args, output):
        alive.append(sum(other() is not None for other in seen))
        seen.append(weakref.ref(output))

    for layer in model.model.layers:
        layer.register_forward_hook(watch)
    states.pooled_states(model, for_config(model.config), *padded([[5, 9, 17]] * 4, pad=0))
    assert len(seen) == 6 and max(alive) <= 1


def test_equal_vectors_are_no_hits_of_the_strict_score(sr):
    """Every sentence ends in a full stop, whose embedding is the same vector: what is above is rounding."""
    torch.manual_seed(0)
    same, x = torch.randn(300).expand(1, 50, 300), torch.randn(1, 50, 300)
    share = torch.ones(1, 50)
    found = sr.scoring.Retrieval(*(states.Pooled(x, x, x, same, share) for _ in range(2)))
    assert not found.hits_mexa_last.any() and found.hits_mexa_weighted.all()


@pytest.mark.parametrize(("n", "k"), [(1, 4), (2, 4), (3, 4), (4, 4), (5, 4), (60, 60)])
def test_few_sentences_are_found_where_languages_are_centred(sr, n, k):
    """Over all sentences cosines of centred vectors are about 0 in the mean, and a ratio to that has any sign."""
    x = torch.randn(20, n, 16, generator=torch.Generator().manual_seed(0))
    pooled = (states.Pooled(v, v, v, v, torch.ones(20, n)) for v in (x, x + 0.001))
    found = sr.scoring.Retrieval(*pooled, k=k)
    assert found.hits_centred.all() and found.hits_unit_centred.all()


def test_spearman_of_pairs_against_scipy_and_a_bootstrap_of_units():
    from scipy.stats import spearmanr

    rng, n = np.random.default_rng(0), 40
    lengths, counts = rng.integers(5, 40, n), ~np.eye(n, dtype=bool)
    y = -abs(np.log(lengths)[:, None] - np.log(np.maximum(2, lengths + rng.integers(-4, 5, n))))  # with ties
    x = y + 0.4 * rng.normal(size=(n, n)) + 0.3 * rng.normal(size=(n, 1))
    found = stats.pair_spearman(y, counts)(x)
    assert found.mean() == pytest.approx(spearmanr(x[counts], y[counts])[0], abs=1e-12)
    drawn = []
    for _ in range(300):
        units = rng.integers(0, n, n)
        pairs = units[:, None] != units
        drawn.append(spearmanr(x[np.ix_(units, units)][pairs], y[np.ix_(units, units)][pairs])[0])
    assert found.std() / n**0.5 == pytest.approx(np.std(drawn), rel=0.2)
    assert np.isnan(stats.pair_spearman(np.ones((n, n)), counts)(x)).all()
    assert np.isnan(stats.pair_spearman(y, counts)(np.ones((n, n)))).all()


def test_equal_ratios_of_lengths_are_ties(sr):
    """5 tokens to 10 is as 10 to 20: float64 logarithms of both do not always agree."""
    from fractions import Fraction

    from scipy.stats import rankdata, spearmanr

    rng = torch.Generator().manual_seed(0)
    here, there = (torch.randint(3, 40, (40,), generator=rng).tolist() for _ in range(2))
    x, y = (torch.randn(1, 40, 8, generator=rng) for _ in range(2))
    pooled = (states.Pooled(v, v, v, v, torch.ones(1, 40)) for v in (x, y))
    found = sr.scoring.Retrieval(*pooled, lengths=(here, there)).length_spearman.mean(1).item()
    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    ratios = [min(Fraction(here[i], there[j]), Fraction(there[j], here[i])) for i, j in pairs]
    order = {ratio: at for at, ratio in enumerate(sorted(set(ratios)))}
    cosines = torch.nn.functional.cosine_similarity(x[0, :, None], y[0], dim=2)
    wanted = spearmanr([cosines[i, j] for i, j in pairs], rankdata([order[ratio] for ratio in ratios]))[0]
    assert found == pytest.approx(wanted, abs=1e-9)


def by_length(n, massive, seed=0):
    """Sentences found by their content where every token counts alike; with `massive` their mean says their length."""
    torch.manual_seed(seed)
    lengths = torch.randint(5, 40, (n,))
    others = (lengths * (0.85 + 0.3 * torch.rand(n))).round().long()
    content, axes = torch.randn(n, 64), torch.eye(64)
    found = []
    for own, offset in ((lengths, axes[0]), (others, axes[1])):
        vectors = content + 0.3 * torch.randn(n, 64) + offset
        rest = torch.randn(n, 64) if massive else vectors
        mean = 0.02 * rest + massive * axes[2] / own[:, None] + axes[3]
        vectors, mean = vectors[None], mean[None]
        share = torch.full((1, n), massive / (massive + 10))
        found.append(states.Pooled(mean, vectors, vectors, vectors, share))
    return found, (lengths.tolist(), others.tolist())


@pytest.mark.parametrize("massive", [0.0, 30.0])
def test_where_the_published_curve_measures_length_one_sentence_says_so(sr, massive, capsys):
    pooled, lengths = by_length(60, massive)
    found = sr.scoring.Retrieval(*pooled, lengths=lengths)
    content = sr.payload(found, "m", "eng_Latn", "swh_Latn", 42)
    curves.tell(("first", content), ("second", content))
    said = capsys.readouterr().err
    assert said.count("measures the length of sentences") == (massive > 0) and len(said.splitlines()) == (massive > 0)
    assert (curves.measuring_length(content) == [0]) == (massive > 0)
    if massive:
        assert said.startswith("warning: second: at hidden states 0 the") and said.endswith("likewise first\n")
        assert content["length_spearman"][0][1] > 0.8 and content["largest_norm_share"] == [[0, 0.75]]
    old = {key: content[key] for key in ("layer_accuracy", "layer_accuracy_ci", "centred_accuracy")}
    curves.tell(("old", old))
    assert not capsys.readouterr().err


def test_every_curve_has_its_interval_and_its_hits(sr):
    pooled, lengths = by_length(40, 3.0)
    found = sr.scoring.Retrieval(*pooled, lengths=lengths)
    content, tensors = sr.payload(found, "m", "eng_Latn", "swh_Latn", 42), found.tensors()
    for curve in curves.MEASURES.values():
        ((_, value),), ((_, (low, high)),) = content[curve.key], content[f"{curve.key}_ci"]
        assert low <= value <= high
        assert tensors[curve.hits].dtype == torch.uint8 and tensors[curve.hits].double().mean().item() == value
        assert (low, high) == stats.bootstrap_mean(tensors[curve.hits][0].numpy())
    for key in curves.DIAGNOSTICS:
        ((_, value),), ((_, (low, high)),) = content[key], content[f"{key}_ci"]
        assert low <= value <= high and round(value, 4) == value
    # Lengths that are all alike follow nothing; the file says null.
    content = sr.payload(sr.scoring.Retrieval(*pooled, lengths=([7] * 40, [7] * 40)), "m", "en", "sw", 42)
    assert content["length_spearman"] == [[0, None]] and content["length_spearman_ci"] == [[0, [None, None]]]
    assert not curves.measuring_length(content)
    json.dumps(content, allow_nan=False)


@pytest.mark.parametrize("broken", [None, [], [[0, None]], [[0, []]]])
def test_intervals_that_are_none_are_one_line(sr, broken):
    pooled, lengths = by_length(40, 30.0)
    content = sr.payload(sr.scoring.Retrieval(*pooled, lengths=lengths), "runs/m", "eng_Latn", "swh_Latn", 42)
    with pytest.raises(InputError, match=r"\(runs/m\) lacks intervals .*sr_experiment.py again with --overwrite"):
        curves.measuring_length(content | {"unit_centred_accuracy_ci": broken})


@pytest.mark.figures
@pytest.mark.parametrize("n_steps, old", [(1, True), (24, False), (24, True)])
def test_the_figure_stays_legible(sr, tmp_path, monkeypatch, n_steps, old):
    """A panel for each curve that there is; a colour bar and a short legend, however many checkpoints there are."""
    pooled, lengths = by_length(40, 30.0)
    content = sr.payload(sr.scoring.Retrieval(*pooled, lengths=lengths), "m", "eng_Latn", "swh_Latn", 42)
    for key in content.keys() & set(sr.figure.PANELS) | {f"{key}_ci" for key in sr.figure.PANELS}:
        content[key] = [[state, content[key][0][1]] for state in range(5)]
    if old:
        content = {key: content[key] for key in ("layer_accuracy", "layer_accuracy_ci", "centred_accuracy")}
    lines = [(refs.ModelRef("m/base"), content)]
    lines += [(refs.ModelRef(f"m/run/checkpoint-{s}", step=s), dict(content)) for s in range(1, n_steps + 1)]
    drawn, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    sr.figure.draw(tmp_path / "accuracy", lines, content, 40, "eng_Latn to swh_Latn")
    (figure,) = drawn
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == [label for key, label in sr.figure.PANELS.items() if key in content]
    assert len(titles) == (2 if old else 8)
    assert any(axis.get_ylabel() == "training step" for axis in figure.axes) == (n_steps > 1)
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    one = ["step 1"] if n_steps == 1 else []
    assert named == ["base", *one, "untrained", "chance 1/40", *([] if old else ["measures length"])]
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def test_results_of_before_are_kept_and_said(sr, tmp_path, capsys):
    from helpers import save_tiny

    save_tiny("llama", tmp_path / "m")
    for name, texts in (("a", BASE), ("b", TARGET)):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts) + "\n")
    command = ["--model_path", str(tmp_path / "m"), "--base", "eng_Latn", "--target", "gle_Latn", "--source", "text",
               "--base-file", str(tmp_path / "a.txt"), "--target-file", str(tmp_path / "b.txt"), "--no-untrained",
               "--artifact-out", str(tmp_path / "out")]  # fmt: skip
    sr.main(command)
    (path,) = (tmp_path / "out").glob("*/*.json")
    whole = json.loads(path.read_text())
    new = {curve.key for name, curve in curves.MEASURES.items() if name not in ("published", "centred")}
    old = {key: value for key, value in whole.items() if key.removesuffix("_ci") not in new | curves.DIAGNOSTICS.keys()}
    path.write_text(json.dumps(old))
    capsys.readouterr()
    sr.main(command)
    assert "measured before all curves existed: " in capsys.readouterr().out
    assert json.loads(path.read_text()) == old
    sr.main([*command, "--overwrite"])
    again = results.read_json(path, sr.SCHEMA)[0]
    assert all(again[key] == whole[key] for key in whole.keys() - {"_header", "timestamp"})
