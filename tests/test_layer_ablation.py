"""layer-ablation/ablation_sweep.py: identities of sets and weights, NLL against a slow loop, retention, refusals."""

from __future__ import annotations

import json
import math
import random
import sys

import numpy as np
import pytest
import torch
from helpers import load_script, same_results, save_tiny, tiny_tokenizer
from launch import launch

from cpt_utils.base import cli, results, sources
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.checkpoints import refs
from cpt_utils.interventions import components, surgery
from cpt_utils.measures import layer_sets
from cpt_utils.models import loading

SWEEP = load_script("layer-ablation/ablation_sweep.py")
SETS, CONTEXT, RETENTION = SWEEP.sets, SWEEP.in_context, SWEEP.retention
N = 4
OUT = "results/layer-ablation/sweep"
WORDS = {"eng": "the a cat dog sees runs old red", "qaa": "ba do ki lu me no pa ri"}


def sentences(name: str, n: int, length: int = 3) -> list[str]:
    draw = random.Random(name)
    return [" ".join(draw.choice(WORDS[name].split()) for _ in range(length)) + f" {i}." for i in range(n)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A base and its checkpoint of 4 layers, 10 sentence pairs, held-out text in both languages, 6 rows of a task."""
    root = tmp_path_factory.mktemp("ablation")
    save_tiny("llama", root / "base", seed=0, layers=N)
    save_tiny("llama", root / "run" / "checkpoint-20", seed=1, layers=N)
    for name in WORDS:
        (root / f"{name}.txt").write_text("".join(line + "\n" for line in sentences(name, 10)))
        (root / f"{name}.held.txt").write_text("".join(line + "\n" for line in sentences(name, 4, 5)))
    (root / "task/qaa_Latn").mkdir(parents=True)
    rows = [f"{i}\t{category}\tba do {i}" for i, category in enumerate(["travel", "sports", "health"] * 2)]
    (root / "task/qaa_Latn/test.tsv").write_text("\n".join(["index_id\tcategory\ttext", *rows]) + "\n")
    return root


@pytest.fixture
def study(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(
        f"name: tiny\nbase: {shared}/base\nrun: {shared}/run\nlanguages: {{base: eng_Latn, target: qaa_Latn}}\n"
        f"data:\n  source: text\n  base_file: {shared}/eng.txt\n  target_file: {shared}/qaa.txt\n"
        f"  heldout: {{eng_Latn: {shared}/eng.held.txt, qaa_Latn: {shared}/qaa.held.txt}}\n"
        f"  task: {{name: sib200_qaa_Latn, dir: {shared}/task}}\nresults: results\nablation: {{shots: 2}}\n"
    )
    return tmp_path


def place(shared) -> layer_sets.Place:
    return layer_sets.Place(refs.model(shared / "base").config())


def translation(n: int = 10, shots: int = 2, form: str = "pairs", scored: int | None = None):
    names = [str(i) for i in range(n)]
    pairs = sources.ParallelText(sentences("eng", n), sentences("qaa", n), names, n)
    return CONTEXT.draw(pairs, shots, scored, form, seed=3)


# ---------------------------------------------------------------- sets and weights


@pytest.mark.parametrize("n", [1, 4, 7, 30])
def test_the_sets_of_both_protocols_are_the_same(n):
    whole = tuple(range(n))
    for k in range(n + 1):
        assert SETS.kept("ablate_in", n, k) == SETS.kept("insert_out", n, n - k) == whole[k:]
        assert SETS.kept("ablate_out", n, k) == SETS.kept("insert_in", n, n - k) == whole[: n - k]
        assert SETS.window(n, 0, k) == whole[k:] and SETS.window(n, n - k, k) == whole[: n - k]
        assert SETS.window(n, k, 0) == whole
    for k in range(n // 2 + 1):
        outer, inner = SETS.kept("outer", n, k), SETS.kept("inner", n, k)
        assert sorted(outer + inner) == list(whole) and len(outer) == 2 * k
    for name in ("ablate_in", "ablate_out"):
        assert SETS.kept(name, n, 0) == whole and SETS.kept(name, n, n) == ()
    for stride in (1, 2, 3, 10):
        ks = SETS.points(n, stride)
        assert {0, n} <= {*ks} and {n - k for k in ks} == {*ks} and (stride > 1 or ks == list(range(n + 1)))


def test_words_that_mean_sets(shared):
    found = SETS.sweeps(
        ["window", "window:2", "random:2:0", "random:2:1", "outer:0.5", "1,3", "inner"], place(shared), 1
    )
    assert list(found) == ["window:1", "window:2", "random:2", "outer:0.5", "1,3", "inner"]
    assert found["window:2"] == [(0, (2, 3)), (1, (0, 3)), (2, (0, 1))] and found["1,3"] == [(0, (1, 3))]
    assert [k for k, _ in found["random:2"]] == [0, 1] and all(len(kept) == 2 for _, kept in found["random:2"])
    assert found["outer:0.5"] == [(0, (0, 3))] and found["inner"] == [(0, (0, 1, 2, 3)), (1, (1, 2)), (2, ())]


@pytest.mark.parametrize("component", ["all", "attention", "ffn"])
@pytest.mark.parametrize("io", ["cpt", "base"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_condition_has_the_weights_it_says_bit_for_bit(tmp_path, kind, io, component):
    """Of both models' own weights, block by block; with no block of C and the base's outside it is B."""
    for seed, name in enumerate(("base", "target")):
        save_tiny(kind, tmp_path / name, seed=seed, layers=3)
    base, target = (
        loading.load_model(refs.model(tmp_path / name), torch.float32, torch.device("cpu"))
        for name in ("base", "target")
    )
    of_base, of_target = ({k: v.clone() for k, v in model.state_dict().items()} for model in (base, target))
    with surgery.Pair(tmp_path / "base", tmp_path / "target") as pair:
        words = ["insert_in", "insert_out", "ablate_in", "ablate_out", "window:0", "window:3", "window:1"]
        sweeps = SETS.sweeps(words, layer_sets.Place(pair.config), 1)
        conditions, numbered = SWEEP.models_of(pair, sweeps, component, io)
        parts = {name: set() for name in components.COMPONENTS}
        for name, projections in components.COMPONENTS.items():
            for edit in surgery.parts_from_base(pair, projections, range(3)).edits:
                parts[name] |= set(pair.arch.locations([edit.tensor], target, pair.target.shape).values())
        inside = {
            location.name for location in set().union(*parts.values() if component == "all" else [parts[component]])
        }
        for condition in conditions[1:]:
            kept = condition.facts["kept"]
            with condition.apply(target):
                for name, found in target.state_dict().items():
                    block = next((int(p) for p in name.split(".") if p.isdecimal()), None)
                    mine = of_target if block is None or block in kept else of_base
                    if block is None:
                        mine = of_base if io == "base" and condition.key else of_target
                    elif component != "all" and name not in inside:
                        mine = of_target
                    assert found.equal(mine[name]), (condition.name, name)
        assert all(value.equal(of_target[name]) for name, value in target.state_dict().items())
        ends = {name: rows[0][1] for name, rows in numbered.items()}
        if io == "cpt":
            assert ends["ablate_in"] == ends["ablate_out"] == ends["window:0"] == 1  # C itself
            assert len({at for at, _ in enumerate(conditions)} - {0}) == 2 * 3 + 1  # of windows only the middle is new
        if (io, component) == ("base", "all"):
            assert ends["insert_in"] == ends["insert_out"] == ends["window:3"] == 0  # B itself


def test_a_sweep_from_both_sides_is_2n_models_each_measured_once(shared, monkeypatch):
    sides = ["insert_in", "insert_out", "ablate_in", "ablate_out"]
    with surgery.Pair(shared / "base", shared / "run/checkpoint-20") as pair:
        conditions, numbered = SWEEP.models_of(pair, SETS.sweeps(sides, place(shared), 1), "all", "cpt")
        swept = {at for rows in numbered.values() for _, at in rows}
        assert len(swept) == 2 * N and len(conditions) == 2 * N + 1  # and B itself
        assert len({condition.id for condition in conditions}) == len(conditions)
        both = SETS.sweeps([*sides, "outer", "inner", "window"], place(shared), 1)
        more, _ = SWEEP.models_of(pair, both, "all", "cpt")
        kept = [tuple(one.facts["kept"]) for one in more[1:]]
        assert len(set(kept)) == len(kept)


def test_of_layers_without_attention_no_model_is_measured_twice(tmp_path):
    """Attention put back where there is none changes nothing: LFM2 has convolutions in its place."""
    for seed, name in enumerate(("base", "target")):
        save_tiny("lfm2", tmp_path / name, seed=seed)
    with surgery.Pair(tmp_path / "base", tmp_path / "target") as pair:
        having = {*components.layers_having(pair.config)["attention"]}
        assert 0 < len(having) < pair.n_layers
        sweeps = SETS.sweeps(["insert_in", "insert_out"], layer_sets.Place(pair.config), 1)
        conditions, numbered = SWEEP.models_of(pair, sweeps, "attention", "cpt")
        reverted = {tuple(sorted(having - {*kept})) for rows in sweeps.values() for _, kept in rows}
        assert len(conditions) == 1 + len(reverted) == 1 + 2 * len(having)  # C among them, and B
        for name, rows in sweeps.items():
            for (k, kept), (at_k, at) in zip(rows, numbered[name], strict=True):
                assert k == at_k and having & {*conditions[at].facts["kept"]} == having & {*kept}


# ---------------------------------------------------------------- translation in context


def slow_nll(model, context: str, text: str) -> float:
    """The NLL of `text` after `context`, its own pass, in float64; a token is a byte, after `<s>`."""
    ids = torch.tensor([tiny_tokenizer()(context + text)["input_ids"]])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
    start = 1 + len(context.encode())
    return -sum(logprobs[at - 1, ids[0, at]].item() for at in range(start, ids.shape[1]))


@pytest.mark.parametrize("form", CONTEXT.FORMS)
def test_nll_per_byte_is_that_of_one_pair_at_a_time(shared, form):
    model = loading.load_model(refs.model(shared / "base"), torch.float64, torch.device("cpu"))
    pairs, (inside, behind) = translation(form=form, scored=5), CONTEXT.FORMS[form]
    found = {}
    for batch_size in (None, 1, 3):
        for side in ("left", "right"):
            tokenizer = tiny_tokenizer()
            tokenizer.padding_side = side
            units = pairs.nlls(model, tokenizer, batch_size)
            found = found or units
            assert all(units[name] == pytest.approx(found[name], rel=1e-9) for name in units)
    for name, (given, scored) in CONTEXT.FUNCTIONS.items():
        shown = "".join(
            f"{b}{inside}{t}{behind}" if given == "base" else f"{t}{inside}{b}{behind}" for b, t in pairs.shots
        )
        given, scored = getattr(pairs, given), getattr(pairs, scored)
        n_bytes = sum(len(text.encode()) for text in scored)
        for suffix, order in (("", range(5)), ("_shuffled", pairs.other)):
            # A byte tokenizer has the space before the text as a token of the text, as the NLL counts it.
            joint = inside.rstrip(" "), " " * inside.endswith(" ")
            nlls = [slow_nll(model, shown + given[at] + joint[0], joint[1] + scored[i]) for i, at in enumerate(order)]
            assert math.fsum(found[name + suffix]) / 5 == pytest.approx(sum(nlls) / n_bytes, rel=1e-9)
            assert found[name + suffix] == pytest.approx([nll / n_bytes * 5 for nll in nlls], rel=1e-9)


def test_shots_are_other_sentences_and_stay_whatever_is_scored():
    few, many = translation(scored=3), translation()
    assert few.shots == many.shots and few.base == many.base[:3] and len(many.base) == 8
    assert not {text for pair in many.shots for text in pair} & {*many.base, *many.target}
    assert sorted(many.other) == list(range(8)) and all(i != other for i, other in enumerate(many.other))
    with pytest.raises(InputError, match="3 sentence pairs are too few for 2 shots and two other pairs"):
        translation(n=3)


def test_another_source_is_of_another_sentence_where_sentences_repeat():
    """Captions and made-up worlds repeat sentences: a copy's source would be the own one, and no floor."""
    base, target = [*"aabcabcdef"], [*"0012233456"]
    pairs = sources.ParallelText(base, target, [str(i) for i in range(10)], 10)
    for seed in range(20):
        drawn = CONTEXT.draw(pairs, 1, None, "pairs", seed)
        for i, other in enumerate(drawn.other):
            assert drawn.base[i] != drawn.base[other] and drawn.target[i] != drawn.target[other]
    same = sources.ParallelText(["x", *"aaaa"], list("56789"), list("01234"), 5)
    seed = next(seed for seed in range(100) if random.Random(f"{seed}/shots").sample(range(5), 1) == [0])
    with pytest.raises(InputError, match="every pair to score has a sentence in common"):
        CONTEXT.draw(same, 1, None, "pairs", seed)


def test_greedy_translations_are_those_of_one_prompt_at_a_time(shared):
    model = loading.load_model(refs.model(shared / "base"), torch.float64, torch.device("cpu"))
    pairs, tokenizer = translation(scored=3, shots=1), tiny_tokenizer()
    prompts = ["ba do", "ba do ki lu me", "x"]
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1)  # as a folder may say; no part of it
    made = CONTEXT._greedy(model, tokenizer, prompts, 6, batch_size=3)
    for prompt, text in zip(prompts, made, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        own = ids[len(tokenizer(prompt)["input_ids"]) :]
        assert text == tokenizer.decode(own, skip_special_tokens=True)
    assert pairs._cut(" one two. three. four", "a b.") == "one two."
    assert pairs._cut("one. two.\nthree", "a. b.") == "one. two." and pairs._cut("one two", "a b.") == "one two"


def test_the_language_of_a_translation_by_the_words_of_its_texts(tmp_path):
    for name, text in (("en", "the old cat sees Lena"), ("qa", "ba do Lena"), ("qb", "zvo kri ba")):
        (tmp_path / name).write_text(text + "\n")
    own = CONTEXT.vocabularies([(name, str(tmp_path / name)) for name in ("en", "qa", "qb")])
    assert own["qa"] == {"do"} and "lena" not in own["en"]
    judge = CONTEXT.by_vocabulary(own, {"base": "en", "target": "qa"})
    assert judge(["the cat sees do", "do Lena", "Lena", "", "do the"], "target") == [0, 1, 0, 0, 0]
    assert judge(["the cat sees do", "do Lena"], "base") == [1, 0]


# ---------------------------------------------------------------- retention


def made_up(perception, production, n: int = 40, noise: float = 0.05, saved: float = 0.5) -> list[dict]:
    """Records of B, C, insert_in(1 .. N-1) and insert_out(1 .. N-1), with none of C's blocks as good as B: `perception`
    and `production` give the share of a gain of 1 that k blocks from the input bring; from the output side the rest."""
    rng = np.random.default_rng(0)
    common, rows = rng.normal(size=n), []
    ks = [("base", 0, None), ("target", N, None)]
    ks += [("in", k, k) for k in range(1, N)] + [("out", k, k) for k in range(1, N)]
    for side, k, _ in ks:
        units = {}
        for name, share in (("perception", perception), ("production", production)):
            r = 1 - share(N - k) if side == "out" else share(k)
            units[name] = 3 - r + common + noise * rng.normal(size=n)
            units[f"{name}_saved"] = saved * r + noise * rng.normal(size=n)
        rows.append({"name": side, "kept": [], "units": {key: list(map(float, v)) for key, v in units.items()}})
    for row in rows:
        row["values"] = {key: float(np.mean(value)) for key, value in row["units"].items()}
    return rows


SIDES = {
    "insert_in": [[0, 0], *([k, 1 + k] for k in range(1, N)), [N, 1]],
    "insert_out": [[0, 0], *([k, N + k] for k in range(1, N)), [N, 1]],
}


def test_areas_depth_and_specialisation_of_known_curves():
    """Perception comes with the first block, production with the last."""
    payload = SWEEP.payload_of(made_up(lambda k: float(k >= 1), lambda k: float(k == N)), SIDES, N, seed=1)
    early, late = payload["summary"]["perception"], payload["summary"]["production"]
    # A step at k = 1 has the area (N - 1/2) / N; from the other side the first block is the last to come.
    assert early["auc_in"] == pytest.approx(1 - 0.5 / N, abs=0.02) and early["auc_out"] == pytest.approx(
        0.5 / N, abs=0.02
    )
    assert (early["depth_at_half_in"], early["depth_at_half_out"]) == (1, N)
    assert (late["depth_at_half_in"], late["depth_at_half_out"]) == (N, 1)
    assert [round(gain, 1) for _, gain in early["marginal_in"]] == [1, 0, 0, 0]
    assert all(abs(damage) < 0.1 for _, damage in early["cuts"])  # blocks add up
    found, expected = payload["specialisation"], 2 * (1 - 1 / N)
    assert found["ci_low"] < found["value"] < found["ci_high"] and found["value"] == pytest.approx(expected, abs=0.05)
    assert found["value"] == pytest.approx(early["A"]["value"] - late["A"]["value"])
    assert found["ci_low"] > 0 and found["ci_high"] - found["ci_low"] < 0.2  # what sentences share is paired away
    same = SWEEP.payload_of(made_up(lambda k: k / N, lambda k: k / N), SIDES, N, seed=1)
    row = same["specialisation"]
    assert row["ci_low"] < 0 < row["ci_high"] and same["summary"]["perception"]["auc_in"] == pytest.approx(
        0.5, abs=0.02
    )
    for points, (k, r) in zip(SIDES["insert_in"], same["retention"]["insert_in"]["perception"], strict=True):
        assert points[0] == k and r == pytest.approx(k / N, abs=0.05)
    assert same["retention"]["insert_in"]["perception"][0] == [0, 0] and len(same["intervals"]["insert_in"]) == 4


@pytest.mark.filterwarnings("error")
def test_few_hits_have_intervals():
    """A resample of which no row is one that the checkpoint gained has no share of the gain; the others have."""
    hits = [[0.0] * 20, [1.0] * 4 + [0.0] * 16, [1.0] * 2 + [0.0] * 18]
    found = RETENTION.Retention(hits, 0, 1, True, seed=0)
    assert found.gain["ci_low"] > 0 and np.isnan(found.drawn).any()
    assert found.intervals([[0, 0], [1, 2], [2, 1]]) == [[0, 0, 0], [1, 0, 1], [2, 1, 1]]
    own = RETENTION.summary(found, ([[0, 0], [1, 2], [2, 1]], [[0, 0], [1, 0], [2, 1]]), 2)["A"]
    assert 0 == own["ci_low"] < own["value"] < own["ci_high"] == 0.5


def test_cuts_show_what_parts_need_each_other_for():
    """A gain that comes only with all blocks: neither part has any of it alone."""
    rows = made_up(lambda k: float(k == N), lambda k: k / N)
    for row in rows[N + 1 :]:
        row["units"]["perception"] = rows[0]["units"]["perception"]
    cuts = SWEEP.payload_of(rows, SIDES, N, seed=1)["summary"]["perception"]["cuts"]
    assert [round(damage) for _, damage in cuts] == [0, -1, -1, -1, 0]


def test_the_figure_shows_what_is_kept_and_what_is_not_known(monkeypatch, tmp_path):
    drawn = {}

    def kept(fig, path):
        axes = [axis for axis in fig.axes if axis.get_xlabel().startswith("blocks")]
        drawn[path.name] = (
            [{line.get_label(): [*line.get_ydata()] for line in axis.lines} for axis in axes],
            [axis.get_title() for axis in axes],
        )

    monkeypatch.setattr(SWEEP.figure.figures, "save", kept)
    rows = made_up(lambda k: k / N, lambda k: k / N)
    for row in rows:
        row["units"]["perception"] = [6 - value for value in row["units"]["perception"]]
    rows[1]["units"]["production"] = [u + (-1) ** i for i, u in enumerate(rows[0]["units"]["production"])]
    payload = SWEEP.payload_of(rows, SIDES, N, seed=1)
    SWEEP.figure.draw(tmp_path / "worse", payload, N)
    panels, titles = drawn["worse"]
    assert len(panels) == 4 and titles[1] == "not clearly changed by CPT: production" and titles[3] == ""
    for panel, sweep in zip(panels, ("insert_in", "insert_out") * 2, strict=True):
        assert len(panel) == 4 - (panel in panels[:2])  # base, checkpoint, and the functions
        name = "perception (made worse by CPT)" if panel in panels[:2] else "perception"
        measure = "perception" if panel in panels[:2] else "perception_saved"
        assert panel[name] == [r for _, r in payload["retention"][sweep][measure]]


def test_the_figure_has_no_empty_panels_where_the_own_source_saves_what_it_saved_before(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(SWEEP.figure.figures, "save", lambda fig, path: drawn.append(fig))
    payload = SWEEP.payload_of(made_up(lambda k: k / N, lambda k: k / N, saved=0.0), SIDES, N, seed=1)
    SWEEP.figure.draw(tmp_path / "same", payload, N)
    assert len([axis for axis in drawn[0].axes if axis.get_xlabel().startswith("blocks")]) == 2
    assert drawn[0].get_supxlabel() == "not clearly changed by CPT: perception and production (saved by the source)"


def test_no_specialisation_where_there_is_nothing_to_place():
    def share(k):
        return k / N

    mute = SWEEP.payload_of(made_up(share, share, saved=0.0), SIDES, N, seed=1)
    assert mute["specialisation"]["value"] is None and "does not translate in context" in mute["specialisation"]["why"]
    rows = made_up(share, share)
    for row in rows:
        row["units"]["perception"] = [6 - value for value in row["units"]["perception"]]
    worse = SWEEP.payload_of(rows, SIDES, N, seed=1)
    assert worse["specialisation"]["why"] == "CPT made perception worse"
    assert worse["retention"]["insert_in"]["perception"][-1] == [N, 1.0]  # of what it lost there is a share
    unclear = made_up(share, share)
    unclear[1]["units"]["perception"] = [u + (-1) ** i for i, u in enumerate(unclear[0]["units"]["perception"])]
    found = SWEEP.payload_of(unclear, SIDES, N, seed=1)
    assert "is not clear" in found["specialisation"]["why"]
    assert all(r is None for _, r in found["retention"]["insert_in"]["perception"])
    assert found["summary"]["perception"]["A"] is None
    one_side = SWEEP.payload_of(made_up(share, share), {"insert_in": SIDES["insert_in"]}, N, seed=1)
    ends = {name: [rows[0], rows[-1]] for name, rows in SIDES.items()}  # a stride as long as the stack: A is 0 always
    ends = SWEEP.payload_of(made_up(share, share), ends, N, seed=1)
    for payload in (one_side, ends):
        assert payload["specialisation"]["why"].startswith("it needs the sweeps insert_in and insert_out, with points")
        assert payload["specialisation"]["value"] is None and payload["summary"]["perception"]["A"] is None
    for payload in (mute, worse, found, one_side, ends):
        SWEEP.say(payload)


# ---------------------------------------------------------------- the command


def test_the_command_from_study_to_claim(study, capsys):
    SWEEP.main(["--sentences", "6"])
    said = capsys.readouterr().out
    found, head = results.read_json(study / f"{OUT}.json", "ablation-sweep")
    units = results.read_tensors(study / f"{OUT}.pt")
    names = [row["name"] for row in found["conditions"]]
    assert names[:2] == ["base", "target"] and len(names) == len(set(names)) == len(units["perception"])
    assert {*found["sweeps"]} == {"insert_in", "insert_out", "ablate_in", "ablate_out", "outer", "inner", "window:1"}
    for name, rows in found["sweeps"].items():
        for k, at in rows:
            width = int(name.partition(":")[2] or 0)
            kept = SETS.window(N, k, width) if width else SETS.kept(name, N, k)
            assert found["conditions"][at]["kept"] == list(kept)
    for key, values in units.items():
        assert values.mean(1).tolist() == pytest.approx([row["values"][key] for row in found["conditions"]], rel=1e-5)
    assert {*units} == {key for key in RETENTION.MEASURES if not key.startswith(("chrf", "language"))}
    assert (
        len(units["perception"][0]) == 6 and head["in_context"]["scored"] == 6 and len(head["in_context"]["shots"]) == 2
    )
    saved = units["perception_shuffled"] - units["perception"]
    assert torch.allclose(saved, units["perception_saved"], atol=1e-5)
    assert f"{len(names)} models to measure" in said and "specialisation: " in said
    assert (study / f"{OUT}.png").is_file()
    # What a model measured alone says of itself.
    own = refs.model(study / Study.find().get("run") / "checkpoint-20")
    model = loading.load_model(own, torch.float32, torch.device("cpu"))
    args = SWEEP.build_parser().parse_args(["--sentences", "6"])
    bench = SWEEP.bench_from_arguments(args, Study.find())
    alone = bench.translation.nlls(model, tiny_tokenizer(), None)
    assert alone["production"] == pytest.approx(units["production"][1].tolist(), abs=1e-6)
    SWEEP.main(["--sentences", "6"])
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match="of another request"):
        SWEEP.main(["--sentences", "6", "--stride", "2"])
    numbers, beside = cli.sibling("report/claims/c8.py").measure(evidence())
    row = found["specialisation"]
    assert numbers[0]["value"] == row["value"] and numbers[0]["says"]["side"] == "above"
    assert numbers[0]["value"] is not None or numbers[0]["note"] == row["why"]
    assert [one["name"] for one in beside][1:] == ["A(perception)", "A(production)"]
    path = study / f"{OUT}.json"
    path.write_text(path.read_text().replace('"io": "cpt"', '"io": "base"'))
    with pytest.raises(InputError, match="reverts a component"):
        cli.sibling("report/claims/c8.py").measure(evidence())


def evidence():
    return cli.sibling("report/evidence.py").Results(Study.find())


def test_what_is_not_the_studys_goes_beside_it(study, capsys):
    flags = ["--measures", "nll", "--sweeps", "1,2", "--limit", "3"]
    SWEEP.main([*flags, "--component", "ffn", "--io", "base"])
    found = json.loads((study / "results/layer-ablation/sweep.limit-3.ffn.io-base.json").read_text())
    assert {*found["conditions"][0]["values"]} == {"nll_target", "nll_base"} and found["_header"]["limit"] == 3
    assert found["specialisation"]["why"] == "translation in context was not measured"


def fails(capsys, message: str, *argv: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: SWEEP.main(list(argv)))
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and error[-1].startswith("error: ") and message in error[-1], error
    assert len([line for line in error if line.startswith("error")]) == 1


def test_bad_input_is_one_line(study, shared, capsys, monkeypatch):
    fails(capsys, "layer 9 does not exist", "--sweeps", "0,9")
    fails(capsys, "a window is 0 to 4 blocks wide", "--sweeps", "window:5")
    fails(capsys, "it needs a share above 0", "--sweeps", "outer:3")
    fails(capsys, "is a part of layers", "--sweeps", "1/ffn")
    fails(capsys, "these words mean no layers", "--sweeps", "upwards")
    fails(capsys, "10 sentence pairs are too few for 9 shots", "--shots", "9")
    fails(capsys, "and the model has 512 positions; give fewer --shots", "--shots", "8", "--prompt", "lines",
          "--base-file", long(study, "eng"), "--target-file", long(study, "qaa"), "--source", "text")  # fmt: skip
    fails(capsys, "--generate needs translation, which", "--generate", "--measures", "nll")
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    study_file = study / "study.yaml"
    text = study_file.read_text()
    study_file.write_text(text + "train: {world: w.yaml}\n")
    fails(capsys, "--generate needs sacrebleu: pip install sacrebleu", "--generate")
    study_file.write_text(text.replace("source: text", "source: tsv").replace("base_file", "split"))
    fails(capsys, "", "--sweeps", "1")
    save_tiny("llama", study / "wide", seed=2, layers=N, vocab_size=288)
    study_file.write_text(text)
    fails(capsys, "different vocabularies (272 and 288 tokens); use --io cpt", "--io", "base", "--run", "wide")
    study_file.write_text(text.split("data:")[0] + "results: results\n")
    fails(capsys, "", "--source", "text")  # a study without pairs
    for name, k in (("outer", 3), ("inner", 3), ("insert_in", 5), ("ablate_out", -1)):
        with pytest.raises(InputError, match="does not exist: with 4 blocks k goes from 0 to"):
            SETS.kept(name, N, k)
    with pytest.raises(InputError, match="a window of 2 blocks from 3 on"):
        SETS.window(N, 3, 2)


def long(folder, name: str) -> str:
    path = folder / f"{name}.long.txt"
    path.write_text("".join(line + "\n" for line in sentences(name, 12, 12)))
    return str(path)


def test_translations_are_scored_where_they_are_asked_for(study, shared, capsys):
    pytest.importorskip("sacrebleu")
    file = study / "study.yaml"
    file.write_text(file.read_text() + "train: {world: w.yaml}\n")
    SWEEP.main(["--generate", "--sentences", "2", "--measures", "translation", "--sweeps", "0,1", "--shots", "1"])
    found, head = results.read_json(study / f"{OUT}.json", "ablation-sweep")
    values = found["conditions"][1]["values"]
    assert 0 <= values["chrf_production"] <= 100 and values["language_production"] in (0, 0.5, 1)
    assert head["in_context"]["generate"] is True
    assert CONTEXT.chrf()("the cat", "the cat") == pytest.approx(100)


def test_outside_a_made_up_world_py3langid_tells_languages_apart(study, monkeypatch):
    pytest.importorskip("py3langid", reason="py3langid is not installed (pip install -e '.[langid]')")
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (pip install -e '.[generate]')")
    english = """The children are playing in the park after school.
It will rain in the west of the country tomorrow.
My sister bought a new bicycle last week.
The old bridge was closed for the whole winter."""
    irish = """Tá na páistí ag súgradh sa pháirc tar éis na scoile.
Beidh sé ag cur báistí in iarthar na tíre amárach.
Cheannaigh mo dheirfiúr rothar nua an tseachtain seo caite.
Bhí an seandroichead dúnta ar feadh an gheimhridh ar fad."""
    (study / "en.txt").write_text(english, "utf-8")
    (study / "ga.txt").write_text(irish, "utf-8")

    def translated(self, *_):
        """The references, but for one: copied from the source, or not there."""
        return {"perception": [*self.base[:2], self.target[2]], "production": [self.target[0], "", self.target[2]]}

    monkeypatch.setattr(CONTEXT.Translation, "translate", translated)
    flags = ["--generate", "--measures", "translation", "--sweeps", "0,1", "--shots", "1", "--base-file", "en.txt"]
    SWEEP.main([*flags, "--target-file", "ga.txt", "--source", "text", "--target-lang", "gle_Latn"])
    units = results.read_tensors(study / f"{OUT}.pt")
    assert units["language_perception"][1].tolist() == [1, 1, 0] and units["language_production"][1].tolist() == [
        1,
        0,
        1,
    ]
    assert units["chrf_production"][1].tolist() == [100, 0, 100] and units["chrf_perception"][1, 2] < 50


@pytest.mark.slow
def test_two_processes_measure_what_one_does(study):
    flags = ["--sentences", "4", "--sweeps", "insert_in", "insert_out", "window:2"]
    SWEEP.main([*flags, "-o", "one/sweep.json"])
    said = launch("layer-ablation/ablation_sweep.py", *flags, "-o", "two/sweep.json").stdout
    found = same_results(study / "one/sweep.json", study / "two/sweep.json")
    assert f"{len(found['conditions'])} models to measure" in said
    assert (study / "one/sweep.pt").read_bytes() == (study / "two/sweep.pt").read_bytes()


@pytest.mark.parametrize("head_dim", [8, 20])
def test_of_gemma_3_with_heads_of_any_size(study, head_dim):
    """4 heads on a width of 32: of 8 features, and of more than a head's share of the width, as Gemma's have."""
    models = {}
    for seed, name in enumerate(("base", "target")):
        save_tiny("gemma3_text", study / name, seed=seed, head_dim=head_dim, sliding_window=16)
        models[name] = loading.load_model(refs.model(study / name), torch.float32, torch.device("cpu"))
    flags = ["--sentences", "4", "--sweeps", "insert_in", "insert_out", "--measures", "translation"]
    SWEEP.main(["base", "target", *flags, "-o", "sweep.json"])
    found, units = json.loads((study / "sweep.json").read_text()), results.read_tensors(study / "sweep.pt")
    bench = SWEEP.bench_from_arguments(SWEEP.build_parser().parse_args(flags), Study.find())
    whole = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}
    for row, values in zip(found["conditions"], units["production"], strict=True):
        own = [f".layers.{block}." for block in range(3) if block not in row["kept"]]
        of_base = {name for name in whole["base"] if row["name"] == "base" or any(part in name for part in own)}
        mixed = {name: whole["base" if name in of_base else "target"][name] for name in whole["base"]}
        models["target"].load_state_dict(mixed)
        alone = bench.translation.nlls(models["target"], tiny_tokenizer(), None)
        assert alone["production"] == pytest.approx(values.tolist(), abs=1e-6), row
