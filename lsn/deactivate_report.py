"""The result of lsn/deactivate.py, as a figure and in words."""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base import cli, figures, stats
from cpt_utils.base.lazy import np

# What silencing a language's neurons does to the language itself; without a harm, selectivity means nothing.
VERDICTS = {
    "harm": ("harm", "a harm"),
    "none": ("no harm", "no harm, so its selectivity means nothing"),
    "reverse": ("harm in reverse", "harm in reverse (better without them), so its selectivity means nothing"),
}


def draw(path: Path, payload: dict) -> None:
    """Heat maps of the changes in NLL per token: the languages' neurons, and the means over both kinds of random sets.

    The label of a row says what silencing does to the language itself. Results of earlier versions have neither this
    verdict nor sets of equal activity.
    """
    names, rows = payload["languages"], list(payload["matrix"])
    shown = [("the language's neurons", {d: [row] for d, row in payload["matrix"].items()})]
    for kind, words in (("random", "random ones"), ("active", "random, as active")):
        if payload.get(kind):
            n = len(next(iter(payload[kind].values())))
            shown.append((f"{words}\n(mean of {n})", payload[kind]))
    maps = [np.array([[np.mean([r[e] for r in sets[d]]) for e in names] for d in rows]) for _, sets in shown]
    bound = max(np.abs(values).max() for values in maps) or 1.0
    stacked = len(names) > 4  # one map below the other
    join, row = (", ", 0.2) if len(names) > 8 else ("\n", 0.36)
    side, height = 0.45 * len(names) + 0.5, row * len(rows) + 1.2
    verdicts = {d: f"{join}to itself: {VERDICTS[one['verdict']][0]}" for d, one in payload.get("diagonal", {}).items()}
    with figures.style() as plt:
        size = (min(figures.PAGE, side + 2.2), height * len(maps)) if stacked else (len(maps) * side + 2.2, height)
        layout = {"nrows": len(maps), "sharex": True} if stacked else {"ncols": len(maps), "sharey": True}
        fig, axes = plt.subplots(**layout, figsize=(min(figures.PAGE, size[0]), size[1]), squeeze=False)
        for axis, values, (title, _) in zip(axes.flat, maps, shown, strict=True):
            image = figures.heat_map(axis, values, rows, names, bound, 35)
            axis.set_title(title)
        for axis in axes[-1]:
            axis.set_xlabel("evaluated on")
        for axis in axes[:, 0]:
            axis.set_ylabel("deactivated")
            axis.set_yticks(range(len(rows)), [figures.language(d) + verdicts.get(d, "") for d in rows])
            verdicts = {}  # they belong to the first map, of the languages' neurons
        fig.colorbar(image, ax=axes, label="change in NLL (nats/token)", shrink=0.9)
        figures.save(fig, path)


def say(payload: dict) -> None:
    """Print the matrix, with selectivities and verdicts."""
    names = payload["languages"]
    cli.say("NLL per token: " + ", ".join(f"{e} {payload['unmasked'][e]:.4f}" for e in names))
    for d, row in payload["matrix"].items():
        changes = ", ".join(f"{e} {row[e]:+.4f}" for e in names)
        cli.say(f"without the {payload['n_neurons'][d]} neurons of {d}: {changes}; {_told(payload['selectivity'][d])}")
        own, rates = payload["diagonal"][d], ""
        if fires := (payload["activity"] or {}).get(d):
            rates = f"; they fire on {fires['own']:.0%} of its tokens, random ones on {fires['random']:.0%}, equally "
            rates += f"active ones on {fires['active']:.0%}"
        cli.say(f"  on {d} {VERDICTS[own['verdict']][1]} [{own['ci_low']:+.4f}, {own['ci_high']:+.4f}]{rates}")
    unhurt = [d for d, own in payload["diagonal"].items() if own["verdict"] != "harm"]
    means = f"; this means nothing, because silencing does not hurt {', '.join(unhurt)}" if unhurt else ""
    cli.say(f"overall {_told(payload['overall'])}{means}")


def _told(row: dict) -> str:
    """A selectivity with its interval, and the means of both kinds of random sets with its p among them."""
    text = f"selectivity {stats.told(row, '+.4f', 'selectivity')}"
    for kind, name, p in (("random", "random", "p_value"), ("active", "equally active", "p_value_active")):
        if row[f"n_{kind}"]:
            text += f", {row[f'n_{kind}']} {name} sets {row[f'{kind}_mean']:+.4f} (p = {row[p]:.3f})"
    return text
