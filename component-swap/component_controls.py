"""Controls of component swaps beyond ranks: attention against FFN over pairs of sets, and the figure."""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base.lazy import np
from cpt_utils.interventions import components
from cpt_utils.measures import controls, matched, swap_figure

KINDS = tuple(components.COMPONENTS)  # attention, ffn
PLACES = ("interface", "lsn_rich")  # where the paper swaps attention and the FFN


def pairs(records: list[dict], own: str, seed: int) -> dict:
    """`pairs` for a result with random sets of attention and of the FFN in the same layers; {} for any other.

    For each measure the extra cost of attention over the FFN, with an interval over units:
    `crossed`: attention in interface layers, the FFN in LSN-rich ones, see `controls.place_in_grid`; None if the
    places differ in size, because more layers cost more.
    `same_layers`: both in the layers of a place, ranked among the same difference in the other sets; None if not both
    are measured there.
    """
    target = next(row for row in records if row["name"] == "target")
    treatment = records[controls.find(records, own)]
    if not all(controls.randoms(records, {"component": kind}) for kind in KINDS):
        return {}
    rows = [row for kind in KINDS for row in matched.sets_of(records, kind, len(treatment["layers"]))]
    at = {(row["component"], tuple(row["layers"])): i for i, row in enumerate(rows)}
    drawn = [tuple(row["layers"]) for row in (treatment, *controls.randoms(records, treatment))]
    drawn = [layers for layers in dict.fromkeys(drawn) if all((kind, layers) in at for kind in KINDS)]

    def layers_of(kind: str, place: str) -> tuple[int, ...]:
        index = controls.find(records, f"{kind}_{place}")
        return () if index is None else tuple(records[index]["layers"])

    places = {place: layers for place in PLACES if (layers := layers_of("attention", place))}
    paper = {kind: layers_of(kind, place) for kind, place in zip(KINDS, PLACES, strict=True)}
    by_measure = {}
    for name in treatment["values"]:
        costs = matched.Costs.of(rows, target, name, seed)
        by_measure[name] = {
            "crossed": _crossed(costs, at, drawn, paper),
            "same_layers": {place: _same_layers(costs, at, drawn, layers) for place, layers in places.items()},
        }
    return {"pairs": by_measure}


def _crossed(costs: matched.Costs, at: dict, drawn: list[tuple], chosen: dict[str, tuple]) -> dict | None:
    if not at.keys() >= chosen.items():
        return None
    (first, *firsts), (second, *seconds) = (
        [float(costs.values[at[kind, layers]]) for layers in dict.fromkeys((treatment, *drawn))]
        for kind, treatment in chosen.items()
    )
    return controls.place_in_grid(first, firsts, second, seconds) | _interval(costs, at, *chosen.values())


def _same_layers(costs: matched.Costs, at: dict, drawn: list[tuple], place: tuple) -> dict | None:
    if not all((kind, place) in at for kind in KINDS):
        return None
    difference, *others = (
        float(np.subtract(*(costs.values[at[kind, layers]] for kind in KINDS)).round(9))
        for layers in dict.fromkeys((place, *drawn))
    )
    if not others:
        return None
    ranked = controls.rank_among_random(difference, others, higher_is_better=True)
    row = {key: ranked[key] for key in ("own", "random_mean", "rank", "n_equal", "n_random", "p_value")}
    return row | {"p_opposite": ranked["p_worse"]} | _interval(costs, at, place, place)


def _interval(costs: matched.Costs, at: dict, attention: tuple, ffn: tuple) -> dict:
    weights = np.zeros(len(costs.values))
    weights[at["attention", attention]], weights[at["ffn", ffn]] = 1, -1
    row = costs.sum(weights)
    return {key: row[key] for key in ("ci_low", "ci_high")}


# --- the figure ---


def draw(path: Path, payload: dict) -> None:
    """Every swap between checkpoint and base, the script's own among random sets; needs only a controls.json."""
    named = [row for row in payload["sets"] if row["name"] not in controls.UNNAMED]
    rows = []
    # Attention, FFN, embeddings; each swap followed by the same with embeddings, whichever was measured first.
    for row in sorted(named, key=lambda row: ("afe".index(row["component"][0]), row["name"])):
        component, _, extra = row["component"].partition("+")
        meaning = "random" if component == components.EMBEDDINGS else component
        compared = row["name"] == payload["own"]
        rows.append(swap_figure.row_of(payload, row, _label(row), meaning, compared, bool(extra)))
    treatment = named[[row["name"] for row in named].index(payload["own"])]
    n_random = len(controls.randoms(payload["sets"], treatment))
    n_layers = payload.get("n_layers_having", payload["n_layers"])
    drawn = f"{n_random} random sets of {len(treatment['layers'])} of {n_layers} layers"
    swap_figure.draw(path, rows, f"components of the base in the checkpoint (share of the parameters); {drawn}")


def _label(row: dict) -> str:
    """ "attention, interface (8 %)": component, place, share of the parameters."""
    names = [name.removesuffix(f"_{components.EMBEDDINGS}") for name in (row["name"], *row.get("also", ()))]
    component, _, place = names[0].partition("_")
    labels = {"interface": "interface", "lsn_rich": "LSN-rich"}
    where = " = ".join(labels[name.partition("_")[2]] for name in names) if place else ""
    shown = {"attention": "attention", "ffn": "FFN", components.EMBEDDINGS: "embeddings, lm_head"}[component]
    more = " + emb." if "+" in row["component"] else ""
    return f"{shown}{', ' + where if where else ''}{more} ({100 * row['share']:.0f} %)"
