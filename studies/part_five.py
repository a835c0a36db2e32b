"""Measures from neighbouring work over several seeds of one study: tables for studies/across_seeds.py.

Neurons: the results of lsn/compare_methods.py, by language and method. Alignment: each measure is one number per model,
the mean over its hidden states. Its rank correlation with loss and task is taken over the checkpoints of a run, for
levels and for changes between checkpoints, and over the arms that were measured (sentence-retrieval/ and
alignment/gradients.py with --arm). Profiles of the measures over the last checkpoint's hidden states are correlated
with each other. The unit is the seed: means, and intervals of Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cpt_utils.base import cli, languages, results
from cpt_utils.base.lazy import np
from cpt_utils.base.study import Study

export, rows = cli.sibling("report/export.py"), cli.sibling("report/rows.py")
part_two = cli.sibling("studies/part_two.py")

# Measure -> (result, name of its numbers in the table of all numbers); for gradients, only those of all weights count.
MEASURES = {
    "published": ("retrieval", "layer_accuracy"),
    "unit, centred": ("retrieval", "unit_centred_accuracy"),
    "MEXA, weighted": ("retrieval", "mexa_weighted"),
    "MEXA, last token": ("retrieval", "mexa_last"),
    "CKA, published": ("alignment", "published/cka"),
    "CKA": ("alignment", "unit_centred/cka"),
    "cosine gap": ("alignment", "unit_centred/cosine_gap"),
    "gradients": ("gradients", "beyond"),
}
AIMS = ("loss", "task")
FEWEST = 5  # the smallest number of pairs for a rank correlation


# ---------------------------------------------------------------- numbers of one seed


class Seed:
    """The numbers of one seed.

    Attributes:
        models: (run, step) -> measure -> value; includes the new language's loss (sign reversed, so higher is better)
            and task accuracy.
        profiles: measure -> hidden state -> value, at the last checkpoint.
        methods: the payload of lsn/compare_methods.py, or None.
    """

    def __init__(self, study: Study):
        numbers = [row for view in export.views(study) for row in rows.rows(view) if row["condition"] is None]
        target = study.get("languages.target")
        self.models: dict[tuple, dict[str, float]] = {}
        self.profiles: dict[str, dict[int, float]] = {}
        for name, (result, measure) in MEASURES.items():
            self._add(name, [row for row in numbers if (row["result"], row["measure"]) == (result, measure)])
        of_target = [row for row in numbers if languages.same(str(row["language"]), str(target))]
        for row in of_target:
            kind = row["result"], row["measure"]
            if kind in {("language_loss", "nll_per_byte"), ("arms", "nll_per_byte")}:
                self._model(row)["loss"] = -row["value"]
            elif kind in {("lm_eval", "acc,none"), ("arms", "task_accuracy")}:
                self._model(row)["task"] = row["value"]
        file = study.result("lsn_methods")
        self.methods = results.read_json(file, "lsn-methods")[0] if file.is_file() else None

    def _model(self, row: dict) -> dict[str, float]:
        return self.models.setdefault((row["run"], row["step"]), {})

    def _add(self, name: str, numbers: list[dict]) -> None:
        by_model: dict[tuple, list[dict]] = {}
        for row in numbers:
            if name == "gradients" and row["component"] != "all":
                continue
            by_model.setdefault((row["run"], row["step"]), []).append(row)
        for model, of_model in by_model.items():
            whole = [row for row in of_model if row["layer"] is None]
            self.models.setdefault(model, {})[name] = float(np.mean([row["value"] for row in whole or of_model]))
        last = _last(by_model, rows.PLAIN)
        if last:
            self.profiles[name] = {
                row["hidden_state"]: row["value"] for row in by_model[last] if row["hidden_state"] is not None
            }

    def over_steps(self) -> list[dict[str, float]]:
        """Base and checkpoints of the plain run, in order."""
        models = sorted((run, step) for run, step in self.models if run == rows.PLAIN and step is not None)
        return [self.models[model] for model in models]

    def over_arms(self) -> list[dict[str, float]]:
        """The last checkpoint of the plain run and of every arm."""
        last = (_last(self.models, run) for run in sorted({run for run, _ in self.models}))
        return [self.models[model] for model in last if model]


def _last(models: Iterable[tuple], run: str) -> tuple | None:
    """The (run, step) of the run's last checkpoint, without the base (step 0); None if there is none."""
    return max((model for model in models if model[0] == run and model[1]), key=lambda model: model[1], default=None)


def spearman(models: list[dict[str, float]], a: str, b: str, differences: bool = False) -> float | None:
    """Rank correlation of two measures over the models that have both, or of their changes between successive models;
    None if there are fewer than FEWEST pairs, or a measure is constant."""
    from scipy import stats

    pairs = np.array([(model[a], model[b]) for model in models if a in model and b in model]).reshape(-1, 2)
    pairs = np.diff(pairs, axis=0) if differences else pairs
    if len(pairs) < FEWEST or (pairs == pairs[0]).all(0).any():
        return None
    return float(stats.spearmanr(*pairs.T).statistic)


# ---------------------------------------------------------------- over seeds


def cell(values: Iterable[float | None], form: str = "{:+.2f}") -> str:
    """Mean over seeds with Student's 95 % interval; for one or two seeds, all values; "-" if a seed has no value."""
    from scipy import stats

    values = list(values)
    if not values or None in values:
        return "-"
    if len(values) < 3:
        return ", ".join(map(form.format, values))
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    mean = np.mean(values)
    return f"{form.format(mean)} [{form.format(mean - half)}, {form.format(mean + half)}]"


def of_neurons(one: dict, method: str, lang: str) -> dict[str, float | None]:
    """The results of one seed's comparison `one` for a language's neurons by a method; None for missing values."""
    shared = one["agreement"][lang].get(f"lape and {method}") or {}
    return {
        "neurons": one["neurons"][method][lang],
        "stability": (one["stability"][method] or {}).get(lang),
        "shared with LAPE, times chance": shared["jaccard"] / shared["chance"] if shared.get("chance") else None,
        "harm to its language": (one["diagonal"][method].get(lang) or {}).get("harm"),
        "of as active neurons": one["controls"][method].get(lang),
        "harm to the others": one["others"][method].get(lang),
        "selectivity": (one["selectivity"][method].get(lang) or {}).get("selectivity"),
    }


def neuron_rows(seeds: dict[int, Seed]) -> part_two.Rows:
    """For every language and method: the neurons' number, stability and overlap with LAPE's, and the effect of
    silencing them."""
    comparisons = [seed.methods for seed in seeds.values()]
    forms = {"neurons": "{:.0f}", "stability": "{:.2f}", "shared with LAPE, times chance": "{:.1f}"}
    head, table = [], []
    for lang in comparisons[0]["languages"]:
        for method in comparisons[0]["methods"]:
            by_seed = [of_neurons(comparison, method, lang) for comparison in comparisons]
            head = ["language", "method", *by_seed[0], "best in"]
            cells = [cell([row[key] for row in by_seed], forms.get(key, "{:+.4f}")) for key in by_seed[0]]
            best = sum(comparison["best"][lang]["method"] == method for comparison in comparisons)
            table.append([lang, method, *cells, f"{best} of {len(comparisons)}"])
    return head, table


def aim_rows(seeds: dict[int, Seed]) -> part_two.Rows:
    """The rank correlation of every measure with loss and task."""
    views: list[tuple[str, Callable[[Seed], list], bool]] = [
        ("over checkpoints", Seed.over_steps, False), ("of changes", Seed.over_steps, True),
        ("over arms", Seed.over_arms, False),
    ]  # fmt: skip
    head = ["measure", *(f"{aim}, {words}" for aim in AIMS for words, *_ in views)]
    return head, [
        [name, *(cell([spearman(models(seed), name, aim, step) for seed in seeds.values()])
                 for aim in AIMS for _, models, step in views)]
        for name in MEASURES
    ]  # fmt: skip


def profile_rows(seeds: dict[int, Seed]) -> part_two.Rows:
    """For every two measures, the rank correlation of their profiles over the last checkpoint's hidden states."""
    names = [name for name in MEASURES if all(seed.profiles.get(name) for seed in seeds.values())]

    def agreement(seed: Seed, a: str, b: str) -> float | None:
        states = seed.profiles[a].keys() & seed.profiles[b].keys()
        return spearman([{a: seed.profiles[a][i], b: seed.profiles[b][i]} for i in sorted(states)], a, b)

    return ["measure", *names[:-1]], [
        [a, *(cell([agreement(seed, a, b) for seed in seeds.values()]) if j < i else ""
              for j, b in enumerate(names[:-1]))]
        for i, a in enumerate(names) if i
    ]  # fmt: skip


def tables(studies: dict[int, Study]) -> dict[str, part_two.Rows]:
    """The tables for which all seeds have results, by title."""
    seeds = {seed: Seed(study) for seed, study in studies.items()}
    made = {}
    if all(seed.methods for seed in seeds.values()):
        made["Language neurons by method"] = neuron_rows(seeds)
    if all("CKA" in seed.profiles for seed in seeds.values()):
        made["Alignment by measure: rank correlation with loss and task"] = aim_rows(seeds)
        made["Alignment by measure: rank correlation of profiles over hidden states"] = profile_rows(seeds)
    return made
