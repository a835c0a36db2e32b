"""Alignment beside retrieval against the textbook formulas, sentence by sentence; what rotates, scales, dominates."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import load_script, save_run, save_tiny

from cpt_utils.base import cli, figures, results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.models import states

LAYERS, N = 3, 14
TEXTS = {"a": [f"{i} the cat sees {'a dog ' * (i % 4)}" for i in range(12)],
         "b": [f"feiceann an {'cat ' * (i % 3)}{i}" for i in range(12)]}  # fmt: skip


@pytest.fixture(scope="module")
def sr():
    return load_script("sentence-retrieval/sr_experiment.py")


@pytest.fixture(scope="module")
def alignment(sr):
    return sr.alignment


def sentences(n=N, hidden=6, layers=LAYERS, seed=0):
    """Two languages [layers, n, hidden] that share a part of what they say, far from the origin; float64."""
    rng = torch.Generator().manual_seed(seed)
    content, *own = (torch.randn(layers, n, hidden, generator=rng, dtype=torch.float64) for _ in range(3))
    mix = torch.randn(hidden, hidden, generator=rng, dtype=torch.float64)
    return content + 0.5 * own[0] + 3, content @ mix + 0.5 * own[1] - 2


def retrieval(sr, mean, unit=None, first=None):
    """`Retrieval` over pooled vectors [layers, n, hidden] of both languages."""
    unit = mean if unit is None else unit
    pooled = (states.Pooled(x, y, x, x, torch.ones(x.shape[:2])) for x, y in zip(mean, unit, strict=True))
    return sr.scoring.Retrieval(*pooled, first=first)


# ---------------------------------------------------------------- the formulas, slowly


def slow_cka(x, y):
    """Székely and Rizzo's U-centred products (2014), entry by entry; NaN of fewer than four sentences."""
    n = len(x)
    if n < 4:
        return float("nan")

    def centred(v):
        k = [[float(v[i] @ v[j]) if i != j else 0.0 for j in range(n)] for i in range(n)]
        rows, total = [sum(row) for row in k], sum(map(sum, k))
        return [
            [
                0.0 if i == j else k[i][j] - rows[i] / (n - 2) - rows[j] / (n - 2) + total / ((n - 1) * (n - 2))
                for j in range(n)
            ]
            for i in range(n)
        ]

    a, b = centred(x), centred(y)

    def product(one, other):
        return sum(one[i][j] * other[i][j] for i in range(n) for j in range(n)) / (n * (n - 3))

    return product(a, b) / (product(a, a) * product(b, b)) ** 0.5


def slow_participation(x):
    eigenvalues = np.linalg.eigvalsh(np.cov(x, rowvar=False))
    return eigenvalues.sum() ** 2 / (eigenvalues**2).sum()


def slow_gap(x, y):
    own, others = [], []
    for i, j in itertools.product(range(len(x)), repeat=2):
        cosine = float(x[i] @ y[j] / (x[i] @ x[i]) ** 0.5 / (y[j] @ y[j]) ** 0.5)
        if i == j:
            own.append(cosine)
        else:
            others.append(cosine)
    return sum(own) / len(own) - sum(others) / len(others)


def slow_similarity(x, y):
    """Of two hidden states [n, hidden] of one language, by a whole SVD."""
    left = []
    for v in (x, y):
        u, s, vt = np.linalg.svd(v - v.mean(0), full_matrices=False)
        left.append(np.cov((u[:, 1:] * s[1:]) @ vt[1:], rowvar=False))
    return (left[0] * left[1]).sum() / np.linalg.norm(left[0]) / np.linalg.norm(left[1])


def slow(key, x, y, centred):
    if key == "cosine_gap":
        return slow_gap(*((v - v.mean(0) for v in (x, y)) if centred else (x, y)))
    return slow_cka(x, y) if key == "cka" else slow_participation(x if key.endswith("base") else y)


@pytest.mark.parametrize("n", [5, N])
def test_all_measures_equal_the_textbook_and_so_do_their_units(sr, alignment, n):
    """What a sentence adds: for CKA and dimensions n times the number minus n - 1 times that without it, but for a
    shift; `found` gives the bootstrap of their mean, so the mean must be the number. Pairs with a sentence that stood
    before are as if they were not there."""
    mean, unit = sentences(n), sentences(n, seed=1)
    copied = [torch.cat([side, side[:, :2]], 1) for side in (*mean, *unit)]
    first = [*range(n), 0, n + 1], [*range(n), n, 1]
    content, maps = alignment.measure(retrieval(sr, copied[:2], copied[2:], first), 42)
    assert list(content) == list(alignment.VECTORS)
    for (name, (_, centred)), both in zip(alignment.VECTORS.items(), (mean, unit), strict=True):
        for state, x, y in zip(range(LAYERS), *(side.numpy() for side in both), strict=True):
            units = alignment.at_state(torch.tensor(x), torch.tensor(y), centred)
            for key, (_, digits) in alignment.MEASURES.items():
                wanted = slow(key, x, y, centred)
                assert content[name][key][state] == [state, round(wanted, digits)]
                low, high = content[name][f"{key}_ci"][state][1]
                assert low < wanted < high
                told = math.log if key.startswith("participation") else float
                assert units[key][0].item() == pytest.approx(told(wanted), abs=1e-9), (name, key)
                assert units[key][1].mean().item() == pytest.approx(told(wanted), abs=1e-9)
                if key != "cosine_gap" and n > 5:
                    keep = [np.arange(n) != i for i in range(n)]
                    gone = np.array([told(slow(key, x[k], y[k], centred)) for k in keep])
                    np.testing.assert_allclose(units[key][1] - told(wanted), (n - 1) * (gone.mean() - gone), atol=1e-8)
        for side, each in zip(alignment.SIDES, both, strict=True):
            wanted = [[slow_similarity(a, b) for b in each.numpy()] for a in each.numpy()]
            np.testing.assert_allclose(maps[f"{name}.{side}"], wanted, atol=1e-6)
            assert [value for _, value in content[name][f"covariance_next_{side}"]] == pytest.approx(
                np.diagonal(wanted, 1).tolist(), abs=1e-4
            )


def test_units_give_the_spread_that_drawing_sentences_anew_gives(alignment):
    """Each draw is of other sentences of two languages, whose covariances are not those of a ball."""
    drawn, spread = ({key: [] for key in alignment.MEASURES} for _ in range(2))
    rng = torch.Generator().manual_seed(0)
    scale, mix = torch.linspace(0.5, 3, 6), torch.randn(6, 6, generator=rng)
    for _ in range(300):
        content, *own = (torch.randn(60, 6, generator=rng) for _ in range(3))
        x, y = scale * content + own[0], scale * content @ mix + 3 * own[1]
        found = alignment.at_state(x.double(), y.double(), True)
        for key, (value, units) in found.items():
            drawn[key].append(value.item())
            spread[key].append(units.std().item() / 60**0.5)
    for key, values in drawn.items():
        assert np.mean(spread[key]) == pytest.approx(np.std(values), rel=0.2), key


def test_cka_knows_no_rotation_scale_or_place_and_has_no_bias(alignment):
    (x,), (y,) = sentences(40, 10, 1)
    turn = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(0)).double())[0]

    def cka(x, y):
        return alignment.at_state(x, y, False)["cka"][0].item()

    found = cka(x, y)
    assert 0.1 < found < 0.95 and cka(y, x) == pytest.approx(found, abs=1e-12)
    assert cka(x, 7 * y @ turn - 5) == pytest.approx(found, abs=1e-12)
    assert cka(x, 7 * x @ turn - 5) == pytest.approx(1, abs=1e-12)
    rng = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 20, 50, generator=rng, dtype=torch.float64) for _ in range(300)]
    apart = np.array([cka(a, b) for a, b in pairs])
    assert abs(apart.mean()) < 4 * apart.std() / 300**0.5 and (apart < 0).any()
    biased = [float((a.T @ b).norm() ** 2 / (a.T @ a).norm() / (b.T @ b).norm()) for a, b in pairs]
    assert np.mean(biased) > 0.5  # the estimator that is not debiased calls languages of noise alike


def test_shuffled_pairs_have_no_gap_and_no_common_geometry(alignment):
    x = sentences(300, 10, 1)[0][0]
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for centred in (False, True):
        found, none = (alignment.at_state(x, one, centred) for one in (x, x[order]))
        assert found["cosine_gap"][0] > 0.1 and abs(none["cosine_gap"][0]) < 0.05
        assert found["cka"][0] == pytest.approx(1) and abs(none["cka"][0]) < 0.05


def test_one_massive_direction_rules_published_and_hides_the_blocks(sr, alignment):
    """Six states in two blocks; in all of them one direction is huge, as where one token is an attention sink."""
    rng = torch.Generator().manual_seed(0)
    spread = torch.linspace(3, 0.3, 32)
    blocks = [torch.linalg.qr(torch.randn(32, 32, generator=rng))[0] for _ in range(2)]
    x = torch.stack([(torch.randn(80, 32, generator=rng) * spread) @ blocks[state // 3] for state in range(6)])
    massive = torch.randn(80, 1, generator=rng) * 300 * torch.eye(32)[5]
    content, maps = alignment.measure(retrieval(sr, (x + massive, x + massive), (x, x)), 42)
    for state in range(6):
        assert content["published"]["participation_ratio_base"][state][1] < 1.1
        assert content["unit_centred"]["participation_ratio_base"][state][1] > 8
    with_it = maps["published.base"]
    within, across = with_it[:3, :3].mean(), with_it[:3, 3:].mean()
    assert within > 0.85 and across < 0.65 and within > across + 0.3
    assert content["published"]["covariance_next_base"][2][1] < 0.65  # the border shows without the map
    whole = [np.cov((each + massive).numpy(), rowvar=False) for each in x]
    alike = [(a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(whole, 2)]
    assert min(alike) > 0.99  # with the direction in, all states are one block


def test_blocks_of_the_covariance_make_no_difference(alignment, monkeypatch):
    x = sentences(20, 17, 4)[0]
    whole = alignment.similarity(x)
    monkeypatch.setattr(alignment, "HELD", 4 * 17 * 5)
    torch.testing.assert_close(alignment.similarity(x), whole)
    assert whole.diagonal().tolist() == pytest.approx([1] * 4)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_few_sentences_leave_what_is_not_defined_open(sr, alignment, n):
    content, _ = alignment.measure(retrieval(sr, sentences(n)), 42)
    json.dumps(content, allow_nan=False)
    own = content["published"]
    assert (own["cka"][0][1] is None) == (n < 4) and own["cka_ci"][0][1] == [None, None]
    assert (own["cosine_gap"][0][1] is None) == (n < 2)
    assert (own["covariance_next_base"][0][1] is None) == (n < 3)
    # Languages in which all sentences are one vector have no geometry.
    same = torch.ones(LAYERS, 9, 6), torch.ones(LAYERS, 9, 6)
    own = alignment.measure(retrieval(sr, same), 42)[0]["published"]
    assert own["cka"][0][1] is own["participation_ratio_base"][0][1] is own["covariance_next_base"][0][1] is None


def test_one_sentence_that_is_all_the_difference_leaves_no_interval(sr, alignment):
    x = torch.ones(LAYERS, 9, 6)
    x[:, 3] += torch.arange(6)
    own = alignment.measure(retrieval(sr, (x, sentences(9)[0])), 42)[0]["published"]
    assert own["participation_ratio_base"][0][1] == 1 and own["participation_ratio_base_ci"][0][1] == [None, None]


def test_copies_of_sentences_are_nothing_in_common(sr, alignment):
    """A copy's product with its sentence is as large as that with itself, which is what the estimator leaves out."""
    rng, found = torch.Generator().manual_seed(0), []
    again = [*range(60), *range(20)]
    for _ in range(20):
        mean = [side[:, again] for side in torch.randn(2, 1, 60, 80, generator=rng, dtype=torch.float64)]
        content, _ = alignment.measure(retrieval(sr, mean, first=(again, again)), 42)
        found.append(content["published"]["cka"][0][1])
    assert abs(np.mean(found)) < 0.02


def test_a_language_with_copies_alone_has_no_other_pairs(sr, alignment):
    content, _ = alignment.measure(retrieval(sr, sentences(6), first=([0] * 6, [0] * 6)), 42)
    assert content["published"]["cosine_gap"] == [[state, None] for state in range(LAYERS)]


# ---------------------------------------------------------------- the command


@pytest.fixture
def project(tmp_path):
    save_tiny("llama", tmp_path / "base", seed=0)
    save_run("llama", tmp_path / "run", (5, 10))
    for name, lines in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "study.yaml").write_text(
        "name: s\nbase: base\nrun: run\nlanguages: {base: eng_Latn, target: gle_Latn}\n"
        "data: {source: text, base_file: a.txt, target_file: b.txt}\nresults: r\n"
    )
    return tmp_path


def test_every_model_has_its_file_and_the_run_its_figure(sr, alignment, project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    sr.main(["--model_path", "run/checkpoint-5", "--no-untrained"])  # as the workflow calls it
    folder, here = (project / f"r/sentence-{name}/eng_Latn-gle_Latn" for name in ("alignment", "retrieval"))
    assert {path.name for path in folder.iterdir()} == {"run__checkpoint-5.json", "run__checkpoint-5.pt"}
    sr.main([])
    ids = [f"{project.name}__base", "run__checkpoint-5", "run__checkpoint-10", "untrained"]
    names = {f"{i}.{end}" for i in ids for end in ("json", "pt")} | {"alignment.pdf", "alignment.png"}
    assert {path.name for path in folder.iterdir()} == names
    payload, header = results.read_json(folder / "run__checkpoint-10.json", alignment.SCHEMA, n_layers=3)
    beside = results.read_json(here / "run__checkpoint-10.json", sr.SCHEMA)[1]
    alike = header.keys() - {"schema", "time"}
    assert {key: header[key] for key in alike} == {key: beside[key] for key in alike}
    assert [state for state, _ in payload["unit_centred"]["cka"]] == [0, 1, 2, 3]
    maps = results.read_tensors(folder / "run__checkpoint-10.pt")
    assert maps["published.target"].shape == (4, 4) and len(maps) == 4
    # Results of before are kept, and what they lack is said.
    for path in folder.iterdir():
        path.unlink()
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    capsys.readouterr()
    sr.main([])
    said = capsys.readouterr().out
    assert said.count("is finished") == 4 and "measured before alignment existed: base, run/checkpoint-5" in said
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before and not list(folder.iterdir())
    sr.main(["--overwrite"])
    assert {path.name for path in folder.iterdir()} == names
    assert results.read_json(folder / "run__checkpoint-10.json")[0]["published"] == payload["published"]


def test_alignment_of_another_request_is_refused(sr, project, monkeypatch):
    monkeypatch.chdir(project)
    command = ["--model_path", "base", "--no-untrained", "--artifact-out", "out"]
    sr.main(command)
    (path,) = (project / "out/alignment/eng_Latn-gle_Latn").glob("*.json")
    content = json.loads(path.read_text())
    content["_header"]["special_tokens"] = False
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"alignment/.*json is of another request \(special_tokens: true asked for"):
        sr.main(command)


@pytest.mark.figures
@pytest.mark.parametrize("n_steps", [0, 24])
def test_the_figure_stays_legible(sr, alignment, tmp_path, monkeypatch, n_steps):
    content, maps = alignment.measure(retrieval(sr, sentences(30, layers=33)), 42)
    lines = [(refs.ModelRef("m/base"), content, maps)]
    lines += [(refs.ModelRef(f"m/run/checkpoint-{s}", step=s), content, maps) for s in range(1, n_steps + 1)]
    drawn, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    named = "Basque (eus_Latn)", "English (eng_Latn)"
    alignment.draw(tmp_path / "alignment", lines, content if n_steps else None, named, 30)
    (figure,) = drawn
    titles = [axis.get_title() for axis in figure.axes if axis.get_title() and axis.get_visible()]
    assert len(titles) == 8 + 2 * (1 + (n_steps > 0)) and titles[2] == "dimensions,\nBasque (eus_Latn)"
    assert (tmp_path / "alignment.png").stat().st_size > 1000


def test_its_numbers_are_rows_with_their_intervals(sr, alignment, project, monkeypatch):
    rows = cli.sibling("report/rows.py")
    monkeypatch.chdir(project)
    sr.main(["--model_path", "run/checkpoint-10"])
    payload, header = results.read_json(project / "r/sentence-alignment/eng_Latn-gle_Latn/run__checkpoint-10.json")
    made = {(row["measure"], row["hidden_state"]): row for row in rows.of_file(payload, header)}
    for name, own in payload.items():
        if name not in alignment.VECTORS:
            continue
        for key in {key.removesuffix("_ci") for key in own}:
            for state, value in own[key]:
                row, ends = made.pop((f"{name}/{key}", state)), dict(own.get(f"{key}_ci", [])).get(state, [None] * 2)
                assert [row["value"], row["ci_low"], row["ci_high"], row["n"]] == [value, *ends, 12]
    assert not made
    study = rows.Study.find(project / "study.yaml")
    table = [row for row in rows.of_the_pair(rows.rows(study), study) if row["result"] == "alignment"]
    assert {(row["step"], row["condition"]) for row in table} == {(0, None), (10, None), (None, "untrained")}
