"""Part II of one study over several seeds: tables and figures for studies/across_seeds.py."""

from __future__ import annotations

from pathlib import Path

from cpt_utils.base import figures, results
from cpt_utils.base.lazy import np
from cpt_utils.base.study import Study
from cpt_utils.measures import controls, swap_figure

Rows = tuple[list[str], list[list]]  # a table: its head and its rows, as printed
CONDITIONS = ("attention_interface", "attention_lsn_rich", "ffn_interface", "ffn_lsn_rich")


def read_seed(study: Study) -> dict | None:
    """The Part II results of one seed; None if it has not been run."""
    files = {
        "change": study.result("attn_vs_ffn"),
        "neurons": study.result("lsn_mask").with_name(f"{study.name}.report.json"),
        "rich": study.result("lsn_layers"),
        "deactivation": study.result("deactivation"),
        "correlation": study.result("activation_correlation") / f"{study.name}_correlation_strength.json",
        "attention": study.result("attn_int_swap") / "controls.json",
        "ffn": study.result("ffn_lsn_swap") / "controls.json",
    }
    if not all(path.is_file() for path in files.values()):
        return None
    return {key: results.read_json(path)[0] for key, path in files.items()}


def change_rows(seeds: dict[int, dict]) -> Rows:
    """Attention against FFN at the last checkpoint."""
    rows = []
    for seed, of_seed in seeds.items():
        last = of_seed["change"]["checkpoints"][max(of_seed["change"]["checkpoints"], key=int)]
        above = last["attention_above_ffn"]
        n = sum(layer.get("delta_attn_ffn") is not None for layer in last["layers"].values())
        rows.append([
            seed, f"{last['summary']['attn']:.2e}", f"{last['summary']['ffn']:.2e}",
            f"{last['summary_mean']['attn']:.2e}", f"{last['summary_mean']['ffn']:.2e}",
            *(f"{above[key]} of {n}" for key in above),
        ])  # fmt: skip
    layers = [f"layers with attention ahead, {kind}" for kind in ("max", "mean", "relative max", "relative mean")]
    return ["seed", "attention, max", "FFN, max", "attention, mean", "FFN, mean", *layers], rows


def neuron_rows(seeds: dict[int, dict]) -> Rows:
    """The number of neurons of each language, by layer."""
    rows = []
    for seed, of_seed in seeds.items():
        for lang, row in of_seed["neurons"]["languages"].items():
            counts = " ".join(map(str, row["counts"]))
            rows.append([seed, lang, f"{row['n_tokens']:,}", row["n_neurons"], sum(row["own"]), counts])
    return ["seed", "language", "tokens", "neurons", "only its own", "by layer"], rows


def deactivation_rows(seeds: dict[int, dict]) -> Rows:
    """Changes of NLL per token (thousandths of a nat), and the selectivity, compared with random sets."""
    rows, languages = [], []
    for seed, of_seed in seeds.items():
        languages = of_seed["deactivation"]["languages"]
        for lang, changes in of_seed["deactivation"]["matrix"].items():
            row = of_seed["deactivation"]["selectivity"][lang]
            on_itself = of_seed["deactivation"].get("diagonal", {}).get(lang, {}).get("verdict", "-")
            rows.append([seed, lang, *(f"{1000 * changes[e]:+.1f}" for e in languages), on_itself, *_selectivity(row)])
        rows.append([seed, "all", *("" for _ in languages), "", *_selectivity(of_seed["deactivation"]["overall"])])
    head = ["seed", "deactivated", *(f"on {e}" for e in languages), "own text", "selectivity"]
    return [*head, "random sets, mean (most)", "p", "p, as active"], rows


def _selectivity(row: dict) -> list[str]:
    low, high = 1000 * row["ci_low"], 1000 * row["ci_high"]
    return [
        f"{1000 * row['selectivity']:+.1f} [{low:+.1f}, {high:+.1f}]",
        f"{1000 * row['random_mean']:+.1f} ({1000 * row['random_max']:+.1f})",
        f"{row['p_value']:.2f}",
        "-" if row.get("p_value_active") is None else f"{row['p_value_active']:.2f}",
    ]


def correlation_rows(seeds: dict[int, dict]) -> Rows:
    """Correlations of LSN activation with weight change: of attention in interface layers, and of the neurons."""
    rows = []
    for seed, of_seed in seeds.items():
        result = of_seed["correlation"]
        for kind in ("raw", "first_differences"):
            sides = [result[key] for key in ("interface_attention", "lsn_ffn")]
            sides = sides if kind == "raw" else [side[kind] for side in sides]
            cells = [interval(side["pearson"]) for side in sides]
            cells.append(interval(result["comparison"][kind], "difference"))
            rows.append([seed, kind.replace("_", " "), *cells])
    return ["seed", "curves", "r with interface attention", "r with LSN weights", "difference"], rows


def interval(found: dict, key: str = "correlation") -> str:
    """`found[key]` with its interval, if there is one; "-" for a missing value."""
    if found.get(key) is None:
        return "-"
    bounds = f" [{found['ci_low']:.2f}, {found['ci_high']:.2f}]" if found.get("ci_low") is not None else ""
    return f"{found[key]:.2f}{bounds}"


def swap_rows(seeds: dict[int, dict]) -> Rows:
    """Component swaps of the last checkpoint: parameters moved, gain lost, and rank among random layers."""
    rows = []
    for seed, of_seed in seeds.items():
        for name in (*CONDITIONS, *(f"{name}_embeddings" for name in CONDITIONS), "embeddings"):
            side = "ffn" if name.startswith("ffn") else "attention"
            sets = of_seed[side]["sets"]
            index = controls.find(sets, name)
            if index is None:
                continue
            row = sets[index]
            ranks = row.get("place") or {}
            cells = []
            for measure in ("retrieval_mean", "nll_per_byte"):
                if measure not in row["values"]:
                    cells += ["-", "-"]
                    continue
                lost = row["gain_lost"].get(measure)
                cells.append(f"{row['values'][measure]:.3f}" + (f" ({lost:.0%})" if lost is not None else ""))
                rank = ranks.get(measure)
                cells.append(f"{rank['rank']} of {rank['n_random'] + 1}" if rank else "-")
            layers = ", ".join(map(str, row["layers"])) or "-"
            rows.append([seed, name, layers, f"{row['share']:.1%}", *cells])
    head = ["seed", "from the base", "layers", "parameters", "retrieval (gain lost)", "rank"]
    return [*head, "NLL per byte (gain lost)", "rank"], rows


def draw_swaps(seeds: dict[int, dict], path: Path) -> None:
    """For each seed, the two component swaps among swaps of the same component in random layers."""
    rows = []
    for seed, of_seed in seeds.items():
        for side, treatment, words in (
            ("attention", "attention_interface", "attention, interface"),
            ("ffn", "ffn_lsn_rich", "FFN, LSN-rich layers"),
        ):
            payload = of_seed[side]
            row = payload["sets"][controls.find(payload["sets"], treatment)]
            rows.append(swap_figure.row_of(payload, row, f"seed {seed}: {words}", side))
    swap_figure.draw(path, rows, "one component of the base in some layers, among random layers")


def panels(plt, n: int, height: float):
    """(figure, axes): `n` panels, four in a row, as wide as the page."""
    columns = min(n, 4)
    rows = -(-n // columns)
    size = (figures.PAGE, 0.3 + height * rows)
    fig, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[n:]:
        axis.remove()
    for axis in axes.flat[max(0, n - columns) : n]:  # the lowest panel of each column has the tick labels
        axis.tick_params(labelbottom=True)
    return fig, list(axes.flat[:n])


def draw_deactivation(seeds: dict[int, dict], path: Path) -> None:
    """A heat map per seed: the change of NLL by language (column) when the neurons of a language (row) are silenced."""
    deactivations = [row["deactivation"] for row in seeds.values()]
    bound = max(abs(value) for result in deactivations for row in result["matrix"].values() for value in row.values())
    with figures.style() as plt:
        fig, axes = panels(plt, len(deactivations), 1.5)
        for axis, seed, result in zip(axes, seeds, deactivations, strict=True):
            names, rows = result["languages"], list(result["matrix"])
            values = np.array([[result["matrix"][d][e] for e in names] for d in rows])
            image = figures.heat_map(axis, values, rows, names, bound, 25)
            axis.set_yticks(range(len(rows)), [figures.language(d, "\n") for d in rows])
            axis.set_title(f"seed {seed}")
        fig.supylabel("deactivated", fontsize=8)
        fig.supxlabel("evaluated on", fontsize=8)
        fig.colorbar(image, ax=axes, label="change in NLL\n(nats/token)", shrink=0.95)
        figures.save(fig, path)


TABLES = {
    "Attention against FFN, mean |dW| at the last checkpoint": change_rows,
    "Language-specific neurons": neuron_rows,
    "Deactivation: change of NLL, thousandths of a nat per token": deactivation_rows,
    "LSN activation against weight change": correlation_rows,
    "Component swaps": swap_rows,
}
