"""Neighbouring measures of one study over several seeds: what studies/across_seeds.py adds where all seeds have them.

Neurons: what lsn/compare_methods.py found in each seed, by language and method. Alignment: every measure as one number
of a model, the mean over its hidden states; its rank correlation with loss and task over the checkpoints of a run, in
level and from one checkpoint to the next, and over the arms that were measured (sentence-retrieval/ and
alignment/gradients.py with --arm); and of its profile over the last checkpoint's hidden states with that of each other.
The unit is the seed: means, and intervals of Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cpt_utils.base import cli, languages, results
from cpt_utils.base.lazy import np
from cpt_utils.base.study import Study

export, rows = cli.sibling("report/export.py"), cli.sibling("report/rows.py")
part_two = cli.sibling("studies/part_two.py")

# Measure -> (result, name of its numbers in the table of all numbers); of gradients that of all weights.
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
FEWEST = 5  # models that a rank correlation is of


# ---------------------------------------------------------------- numbers of one seed


class Seed:
    """One seed.

    Attributes:
        models: (run, step) -> measure -> value, among them the loss (with its sign turned: more is better) and the task
            of the new language.
        profiles: measure -> hidden state -> value, of the last checkpoint.
        methods: the payload of lsn/compare_methods.py; None where there is none.
    """

    def __init__(self, study: Study):
        found = [row for view in export.views(study) for row in rows.rows(view) if row["condition"] is None]
        target = study.get("languages.target")
        self.models: dict[tuple, dict[str, float]] = {}
        self.profiles: dict[str, dict[int, float]] = {}
        for name, (result, measure) in MEASURES.items():
            self._add(name, [row for row in found if (row["result"], row["measure"]) == (result, measure)])
        of_target = [row for row in found if languages.same(str(row["language"]), str(target))]
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

    def _add(self, name: str, found: list[dict]) -> None:
        by_model: dict[tuple, list[dict]] = {}
        for row in found:
            if name == "gradients" and row["component"] != "all":
                continue
            by_model.setdefault((row["run"], row["step"]), []).append(row)
        for place, own in by_model.items():
            whole = [row for row in own if row["layer"] is None]
            self.models.setdefault(place, {})[name] = float(np.mean([row["value"] for row in whole or own]))
        last = max(
            (place for place in by_model if place[0] == rows.PLAIN and place[1]), key=lambda p: p[1], default=None
        )
        if last:
            self.profiles[name] = {
                row["hidden_state"]: row["value"] for row in by_model[last] if row["hidden_state"] is not None
            }

    def over_steps(self) -> list[dict[str, float]]:
        """Base and checkpoints of the plain run, in order."""
        places = sorted(place for place in self.models if place[0] == rows.PLAIN and place[1] is not None)
        return [self.models[place] for place in places]

    def over_arms(self) -> list[dict[str, float]]:
        """The last checkpoint of the plain run and of every arm."""
        last = (_last(self.models, run) for run in sorted({run for run, _ in self.models}))
        return [self.models[place] for place in last if place]


def _last(places: Iterable[tuple], run: str) -> tuple | None:
    """The last checkpoint of a run among (run, step)."""
    return max((place for place in places if place[0] == run and place[1]), key=lambda place: place[1], default=None)


def spearman(models: list[dict[str, float]], a: str, b: str, differences: bool = False) -> float | None:
    """Of two numbers of the models that have both, or of their changes from one to the next; None: too few."""
    from scipy import stats

    pairs = np.array([(model[a], model[b]) for model in models if a in model and b in model]).reshape(-1, 2)
    pairs = np.diff(pairs, axis=0) if differences else pairs
    if len(pairs) < FEWEST or (pairs == pairs[0]).all(0).any():
        return None
    return float(stats.spearmanr(*pairs.T).statistic)


# ---------------------------------------------------------------- over seeds


def cell(values: Iterable[float | None], form: str = "{:+.2f}") -> str:
    """Mean over seeds with the 95 % interval of t; of two seeds or fewer all values; "-" where a seed has none."""
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
    """What one seed's comparison says of a language's neurons by a method; None where it has none there."""
    agreed = one["agreement"][lang].get(f"lape and {method}") or {}
    return {
        "neurons": one["neurons"][method][lang],
        "stability": (one["stability"][method] or {}).get(lang),
        "shared with LAPE, times chance": agreed["jaccard"] / agreed["chance"] if agreed.get("chance") else None,
        "harm to its language": (one["diagonal"][method].get(lang) or {}).get("harm"),
        "of as active neurons": one["controls"][method].get(lang),
        "harm to the others": one["others"][method].get(lang),
        "selectivity": (one["selectivity"][method].get(lang) or {}).get("selectivity"),
    }


def neuron_rows(seeds: dict[int, Seed]) -> part_two.Rows:
    """Of every language and method: how many neurons, how stable, how much LAPE's, and what silencing them does."""
    each = [found.methods for found in seeds.values()]
    forms = {"neurons": "{:.0f}", "stability": "{:.2f}", "shared with LAPE, times chance": "{:.1f}"}
    head, found = [], []
    for lang in each[0]["languages"]:
        for method in each[0]["methods"]:
            read = [of_neurons(one, method, lang) for one in each]
            head = ["language", "method", *read[0], "best in"]
            cells = [cell([row[key] for row in read], forms.get(key, "{:+.4f}")) for key in read[0]]
            best = sum(one["best"][lang]["method"] == method for one in each)
            found.append([lang, method, *cells, f"{best} of {len(each)}"])
    return head, found


def aim_rows(seeds: dict[int, Seed]) -> part_two.Rows:
    """Of every measure its rank correlation with loss and task."""
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
    """Of every two measures the rank correlation of their profiles over the last checkpoint's hidden states."""
    names = [name for name in MEASURES if all(found.profiles.get(name) for found in seeds.values())]

    def of(seed: Seed, a: str, b: str) -> float | None:
        states = seed.profiles[a].keys() & seed.profiles[b].keys()
        return spearman([{a: seed.profiles[a][i], b: seed.profiles[b][i]} for i in sorted(states)], a, b)

    return ["measure", *names[:-1]], [
        [a, *(cell([of(seed, a, b) for seed in seeds.values()]) if j < i else "" for j, b in enumerate(names[:-1]))]
        for i, a in enumerate(names) if i
    ]  # fmt: skip


def tables(studies: dict[int, Study]) -> dict[str, part_two.Rows]:
    """What all seeds have."""
    seeds = {seed: Seed(study) for seed, study in studies.items()}
    found = {}
    if all(seed.methods for seed in seeds.values()):
        found["Language neurons by method"] = neuron_rows(seeds)
    if all("CKA" in seed.profiles for seed in seeds.values()):
        found["Alignment by measure: rank correlation with loss and task"] = aim_rows(seeds)
        found["Alignment by measure: rank correlation of profiles over hidden states"] = profile_rows(seeds)
    return found
