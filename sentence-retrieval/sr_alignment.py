"""Alignment of two languages, from the vectors that sr_experiment.py pools for retrieval.

How similar the geometries of the two languages are (linear CKA), how much nearer a translation is than other sentences,
in how many directions the sentences of a language differ, and which hidden states share these directions.

Out:  the JSON and the tensors of the .pt of each model, which sr_experiment.py writes, and the figure of a run.
"""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base import cli, figures, results, stats
from cpt_utils.base.lazy import np, torch
from cpt_utils.checkpoints import refs
from cpt_utils.measures import curves

scoring = cli.sibling("sentence-retrieval/sr_scores.py")
looking = cli.sibling("sentence-retrieval/sr_figure.py")

SCHEMA = "sentence-alignment"
VECTORS = {"published": ("mean", False), "unit_centred": ("unit", True)}  # field of `Pooled`, centre for cosines
SIDES = ("base", "target")
# Key -> title, and decimals: further digits are float rounding, which varies with the batch.
MEASURES = {
    "cka": ("linear CKA", 4),
    "cosine_gap": ("cosine gap", 4),
    "participation_ratio_base": ("dimensions,", 2),
    "participation_ratio_target": ("dimensions,", 2),
}
HELD = 2**24  # covariance entries held at once


# ---------------------------------------------------------------- one hidden state


def hsic(k: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """The unbiased HSIC of two Gram matrices [n, n] whose diagonals are 0 (Song et al. 2012, equation 5).

    Returns:
        [1 + n]: over all sentences, then without each of them in turn. NaN where fewer than 4 sentences remain.
    """
    n, each, rows, others = len(k), (k * m).sum(1), k.sum(1), m.sum(1)
    of_both, of_one, of_other, crossed = each.sum(), rows.sum(), others.sum(), rows @ others

    def estimate(of_both, of_one, of_other, crossed, n: int) -> torch.Tensor:
        products = of_both + of_one * of_other / ((n - 1) * (n - 2)) - 2 * crossed / (n - 2)
        return products / (n * (n - 3))

    if n < 5:
        whole = estimate(of_both, of_one, of_other, crossed, n) if n == 4 else each.new_tensor(float("nan"))
        return torch.cat([whole[None], torch.full_like(each, float("nan"))])
    left = crossed - rows * others - k @ others - m @ rows + each
    without = estimate(of_both - 2 * each, of_one - 2 * rows, of_other - 2 * others, left, n - 1)
    return torch.cat([estimate(of_both, of_one, of_other, crossed, n)[None], without])


def cka(k: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Debiased linear CKA of two Gram matrices [n, n] (Kornblith et al. 2019, with `hsic`): [1 + n] like `hsic`.

    Its expected value is 0 for languages with nothing in common, so values may be negative; NaN where the sentences of
    a language do not differ.
    """
    k, m = (gram.clone().fill_diagonal_(0) for gram in (k, m))
    across, within_k, within_m = hsic(k, m), hsic(k, k), hsic(m, m)
    return torch.where((within_k > 0) & (within_m > 0), across / (within_k * within_m).sqrt(), float("nan"))


def participation(k: torch.Tensor) -> torch.Tensor:
    """The participation ratio (tr C)² / tr C² of the covariance C of sentences with the centred Gram matrix `k` [n, n]:
    [1 + n], over all sentences, then without each in turn. From 1 (they differ in one direction) to at most n - 1."""
    n, diagonal, squares = len(k), k.diagonal(), (k * k).sum(1)
    more = n / max(1, n - 1)  # removing a sentence moves the mean, too
    trace, square = diagonal.sum(), squares.sum()
    whole, left = trace**2 / square, trace - more * diagonal
    without = left**2 / (square - 2 * more * squares + (more * diagonal) ** 2)
    # If one sentence makes up all the variance, the rest without it is rounding.
    return torch.cat([whole[None], without.masked_fill(left <= 1e-7 * trace, float("nan"))])


def jackknifed(found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A statistic and each sentence's contribution to it [n], from its values `found` [1 + n] over all sentences and
    without each: the contributions average to the statistic, and bootstrapping their mean gives its bootstrap to
    first order."""
    whole, without = found[0], found[1:]
    return whole, whole + (len(without) - 1) * (without.mean() - without)


def cosine_gap(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean cosine of translations (the diagonal of [n, n]) minus that of all other pairs, and each sentence's
    contribution to it [n]."""
    translations, n = a.diagonal(), len(a)
    apart = a - translations.diag()
    mean = apart.sum() / (n * (n - 1))
    gap, moved = translations.mean() - mean, apart.sum(0) + apart.sum(1) - 2 * (n - 1) * mean
    return gap, gap + translations - translations.mean() - moved / (n - 1)


def at_state(x: torch.Tensor, y: torch.Tensor, centred: bool) -> dict[str, tuple]:
    """All MEASURES of two languages' sentences [n, hidden], paired by row, as (value, contribution of each sentence);
    the logarithm of a participation ratio, so that its interval stays above 0."""
    middle = x - x.mean(0), y - y.mean(0)
    grams = [each @ each.T for each in middle]
    measured = {"cka": jackknifed(cka(*grams))}
    measured["cosine_gap"] = cosine_gap(scoring.cosine(*(middle if centred else (x, y))))
    logs = [jackknifed(participation(k).log()) for k in grams]
    return measured | {f"participation_ratio_{side}": log for side, log in zip(SIDES, logs, strict=True)}


# ---------------------------------------------------------------- between hidden states


def first_direction(x: torch.Tensor) -> torch.Tensor:
    """The first right singular vector [hidden] of `x` [n, hidden] in float64; zeros if there is none."""
    from scipy.sparse.linalg import svds

    if min(x.shape) < 2 or not x.any():
        return x.new_zeros(x.shape[1])
    start = np.random.default_rng(0).normal(size=min(x.shape))
    return torch.from_numpy(svds(x.numpy(), k=1, v0=start)[2][0].copy())


def similarity(states: torch.Tensor) -> torch.Tensor:
    """The cosine of the covariances of every two hidden states, tr(C_i C_j) / (|C_i| |C_j|): [L+1, L+1], float64.

    The first singular direction of the centred sentences is dropped from each: a massive activation's direction is the
    same in most of the stack and would make all states alike. NaN where nothing is left.

    Args:
        states: [L+1, sentences, hidden]. The residual stream has one basis, so its covariances can be compared.
    """

    def centred(x: torch.Tensor) -> torch.Tensor:
        x = x.double()
        return x - x.mean(0)

    tops = [first_direction(centred(x)) for x in states]
    sizes = torch.stack([centred(x).square().sum() for x in states])
    products = sizes.new_zeros(len(states), len(states))
    hidden = states.shape[2]
    block = max(1, HELD // (len(states) * hidden))
    for at in range(0, hidden, block):
        rows = []
        for x, top in zip(map(centred, states), tops, strict=True):
            x = x - (x @ top)[:, None] * top
            rows.append((x[:, at : at + block].T @ x).flatten())
        rows = torch.stack(rows)
        products += rows @ rows.T
    norms = products.diagonal().sqrt()
    norms = norms.masked_fill(norms <= 1e-12 * sizes, float("nan"))
    return products / norms / norms[:, None]


# ---------------------------------------------------------------- a model


def measure(found: scoring.Retrieval, seed: int) -> tuple[dict, dict[str, torch.Tensor]]:
    """For each of VECTORS the MEASURES by hidden state with 95 % intervals, and the similarity of neighbouring states;
    for the .pt, the similarity of all states, by vector and side.

    Pairs with a repeated sentence are left out: a copy is not another sentence, and in CKA, which excludes a sentence's
    product with itself, a copy would bring that product back.
    """
    asks, answers = found.copies
    alone = (asks == (position := torch.arange(len(asks)))) & (answers == position)
    content, maps = {}, {}
    for name, (pooled, centred) in VECTORS.items():
        sides = [getattr(each, pooled)[:, alone] for each in (found.base, found.target)]
        rows = [at_state(x.double(), y.double(), centred) for x, y in zip(*sides, strict=True)]
        units = np.stack([[row[key][1].numpy() for row in rows] for key in MEASURES])
        units[~np.isfinite(units)] = np.nan
        intervals = np.stack(stats.bootstrap_means(units, seed), -1)
        content[name] = {}
        for (key, (_, digits)), interval in zip(MEASURES.items(), intervals, strict=True):
            values = np.array([row[key][0].item() for row in rows])
            if key.startswith("participation"):
                values, interval = np.exp(values), np.exp(interval)
            for named, each in ((key, values), (f"{key}_ci", interval)):
                content[name][named] = _by_state(each.round(digits).tolist())
        for side, states in zip(SIDES, sides, strict=True):
            near = similarity(states)
            maps[f"{name}.{side}"] = near.float()
            content[name][f"covariance_next_{side}"] = _by_state([round(x, 4) for x in near.diagonal(1).tolist()])
    return results.plain(content), maps


def _by_state(values: list) -> list:
    return [[state, value] for state, value in enumerate(values)]


# ---------------------------------------------------------------- the figure

Lines = list[tuple[refs.ModelRef, dict, dict]]


def draw_files(
    path: Path, files: list[tuple[refs.ModelRef, Path]], untrained: Path | None, languages: tuple[str, str]
) -> None:
    """`draw` the results that exist; models measured before alignment existed are named in one line instead."""
    before = [ref.spec for ref, file in files if not file.is_file()]
    if before:
        cli.say(f"measured before alignment existed: {', '.join(before)}; --overwrite measures them again")
    read = [(ref, file, *results.read_json(file, SCHEMA, allow_limited=True)) for ref, file in files if file.is_file()]
    lines = [(ref, payload, results.read_tensors(file.with_suffix(".pt"))) for ref, file, payload, _ in read]
    twin = results.read_json(untrained, SCHEMA, allow_limited=True)[0] if untrained and untrained.is_file() else None
    if lines:
        draw(path, lines, twin, languages, read[0][3]["n_used"])


def draw(path: Path, lines: Lines, untrained: dict | None, languages: tuple[str, str], n: int) -> None:
    """A row of panels for each of VECTORS, a panel for each of MEASURES; below, maps of hidden states against hidden
    states for the first and the last model.

    Args:
        lines: for each model its reference, its payload, and the tensors of its .pt; the base first.
        languages: in words, base and target.
    """
    steps = sorted({ref.step for ref, *_ in lines if ref.step is not None})
    looks = looking.looks([(ref, payload) for ref, payload, _ in lines], steps)
    drawn = [(payload, look) for (_, payload, _), look in zip(lines, looks, strict=True)]
    twin = {"linestyle": (0, (3, 1)), "color": figures.colour("random"), "label": "untrained"}
    drawn += [(untrained, twin)] if untrained else []
    with figures.style() as plt:
        figure, axes = plt.subplots(3, 4, figsize=(figures.PAGE, 5.6), squeeze=False)
        for name, row in zip(VECTORS, axes, strict=False):
            for (key, (title, _)), axis in zip(MEASURES.items(), row, strict=True):
                for payload, look in drawn:
                    band = payload in (drawn[0][0], lines[-1][1])
                    looking.plot(axis, key, payload[name], look, band)
                side = languages[key.endswith("target")] if key.startswith("participation") else ""
                axis.set_title(f"{title}\n{side}" if side else title)
                figures.layer_axis(axis, len(payload[name]["cka"]) - 1, hidden_states=True, most=5)
                axis.set_xlabel("")
            row[0].set_ylabel(curves.MEASURES[name].label)
        _maps(figure, axes[2], lines)
        looking.finish(path, figure, axes[:2], f"{' and '.join(languages)}, n = {n} sentences", steps)


def _maps(figure, axes, lines: Lines) -> None:
    """Similarity of hidden states: the base language above the diagonal, the target language below it."""
    shown = [lines[0], lines[-1]][: len(lines)]
    panels = [(name, *line) for name in VECTORS for line in shown]
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for (name, ref, _, maps), axis in zip(panels, axes, strict=False):
        base, target = (maps[f"{name}.{side}"] for side in SIDES)
        values = np.triu(base.numpy()) + np.tril(target.numpy(), -1)
        axis.set_facecolor("0.92")
        image = axis.imshow(values, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        model = f"step {ref.step}" if ref.step is not None else Path(ref.spec).name
        axis.set_title(f"{curves.MEASURES[name].label}:\n{model}")
        figures.layer_axis(axis, len(values) - 1, hidden_states=True, most=5)
        axis.set_yticks(axis.get_xticks())
        axis.set_xlabel("")
    axes[0].set_ylabel("hidden state")
    bar = figure.colorbar(image, ax=axes, aspect=15, pad=0.01)
    bar.set_label("cosine of covariances")
    bar.outline.set_visible(False)
