"""Several CPT runs of one base side by side: retrieval, weight change, swaps, neurons, losses and the task in one
figure and one table, with the difference of each run from the first.

In:   a study with other `runs` or arms that have results of their own (every script with --arm NAME), or study files
      with one base and the same texts; the others are compared with the first.
Out:  OUT (default: the study's report/compare.json): values of every run and differences from the first, paired over
      sentences (documents, rows), with --seeds over seeds; tables as .md and .tex, a figure as .pdf and .png.

Full: python report/compare.py --study studies/demo.yaml plain first_half --seeds 0,1,2,3,4 -o build/try/compare.json
Tiny: python report/compare.py --study demo/tiny.yaml plain second
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cpt_utils.base import cli, results, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np
from cpt_utils.base.study import Study, refuse_shared
from cpt_utils.checkpoints import relatives
from cpt_utils.measures import curves, evaluation, gate, verdicts

evidence, interventions = cli.sibling("report/evidence.py"), cli.sibling("report/interventions.py")
export, rows = cli.sibling("report/export.py"), cli.sibling("report/rows.py")
shown = cli.sibling("report/compare_shown.py")

SCHEMA = "comparison"
RESULTS = {"compare": "report/compare.json"}
ASKED = {"compare": "How do several runs of one base differ?"}
CAPTIONS = {
    "compare": """Part I: 7. Several runs
        CPT runs of one base side by side, each at its last checkpoint unless a step is given. Differences are the other
        run minus the first: for one seed with 95 % intervals over the sentences (documents) that both runs were
        measured on, for several with intervals over seeds. One run of each is one sample of what training does.""",
}
SWAPS = {
    ("layer_swap", "semantic_hub"): "hub",
    ("attn_int_swap", "attention_interface"): "attention of the interface",
    ("ffn_lsn_swap", "ffn_lsn_rich"): "FFN of LSN-rich layers",
}
DRAWS = 2000


# ---------------------------------------------------------------- one run


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number of one run; `units` [n] are the values that it is the mean of, if known, and `of` says of what."""

    value: float
    units: np.ndarray | None = None
    of: str = ""

    def number(self, name: str, seed: int) -> dict:
        if self.units is None:
            return verdicts.number(name, self.value)
        return verdicts.over_units(name, self.units, seed, self.of, DRAWS) | {"value": self.value}


class Run:
    """One run: its results, checked to be about it, and all its numbers as rows."""

    def __init__(self, study: Study):
        self.study, self.found = study, evidence.Results(study, DRAWS)
        self.table = rows.of_the_pair(rows.rows(study), study)
        self.texts: dict[str, str] = {}  # language -> hash of its held-out text
        self.lacks: dict[str, list[str]] = {}  # section -> reasons for what it lacks

    def chosen(self, **columns) -> list[dict]:
        return export.chosen(self.table, **columns)

    def at_last(self, what: str, **columns) -> list[dict]:
        """The rows of the last checkpoint; raises Missing if there are none."""
        matches = self.chosen(**columns, step=self.found.last["step"])
        if not matches:
            raise evidence.Missing(f"there is no {what} of {self.found.last['spec']}")
        return matches


def retrieval(run: Run) -> dict[str, Quantity]:
    """Accuracy of the published curve and with lengths and languages removed, at each hidden state and their mean."""
    found, quantities = run.found, {}
    file = found.checked(found.retrieval_path(found.last), "retrieval", "sentence-retrieval")
    for curve in (curves.MEASURES["published"], curves.MEASURES["unit_centred"]):
        hits = found.hits(file, curve.key, curve.hits)
        means = {"mean over h_1 .. h_L": hits[1:].mean(0), "last hidden state": hits[-1]}
        means |= {f"h_{state}": units for state, units in enumerate(hits)}
        quantities |= {
            f"{curve.label}, {name}": Quantity(float(units.mean()), units, "sentences") for name, units in means.items()
        }
    return quantities


def change(run: Run) -> dict[str, Quantity]:
    """How far the weights moved: relative change of attention and of the FFN, mean |dW| of interface and hub."""
    words = {"attention": "attention", "ffn": "FFN"}
    file = run.found.file("attn_vs_ffn", "attn_vs_ffn")
    run.found.refuse_part_of_run(file, file.payload["checkpoints"])
    relative = {word: file.at("pooled", run.found.last["step"], key) for key, word in words.items()}
    quantities = {f"relative, {word}": Quantity(value) for word, value in relative.items()}
    for row in run.chosen(result="int_and_sem", step=run.found.last["step"], layer=None):
        quantities[f"mean |dW|, {row['component'].replace('semantic_', '')}"] = Quantity(row["value"])
    return quantities


def swaps(run: Run) -> dict[str, Quantity]:
    """The cost of swapping layers, or their attention or FFN, to the base; more is worse."""
    quantities: dict[str, Quantity] = {}
    for (step, treatment), words in SWAPS.items():
        try:
            swap = interventions.swaps(run.found, step, treatment)
        except evidence.Missing as reason:
            run.lacks.setdefault("swaps", []).append(str(reason))
            continue
        for measure in evaluation.DECIDING:
            if swap.lacks(measure):
                continue
            _, units = swap.measured(measure)
            treated, treatment_row = units[swap.own], swap.sets[swap.own]
            random = [
                i for i, row in enumerate(swap.sets)
                if row["name"] == "random" and row.get("component") == treatment_row.get("component")
                and len(row["layers"]) == len(treatment_row["layers"])
            ]  # fmt: skip
            costs = {words: units[swap.target] - treated}
            if random:
                costs[f"{words} minus random swaps"] = units[random].mean(0) - treated
            for name, cost in costs.items():
                quantities[f"{name}, {interventions.words(measure)}"] = Quantity(float(cost.mean()), cost, "units")
    return quantities


def neurons(run: Run) -> dict[str, Quantity]:
    """The number of neurons of each language, and how far the mean activation of the target's moved from the base."""
    quantities = {f"of {row['language']}": Quantity(row["value"]) for row in run.at_last(
        "language-specific neurons", result="lsn_mask", measure="n_neurons") if row["language"]}  # fmt: skip
    means = {
        row["step"]: row["value"]
        for row in run.chosen(result="lsn_activation", condition="lsn", measure="activation/all_layers")
    }
    last = run.found.last["step"]
    if {0, last} <= {*means}:
        quantities["mean activation minus the base's"] = Quantity(means[last] - means[0])
    return quantities


def losses(run: Run) -> dict[str, Quantity]:
    """Nats per byte of held-out text in every language that has some."""
    file = run.found.file("language_loss", "language-loss")
    pt = run.found.there(file.path.with_suffix(".pt"), "language_loss")
    run.found.read.append(str(pt))
    units, quantities, last = results.read_tensors(pt), {}, str(run.found.last["step"])
    for code, of_step in file.payload.items():
        steps = list(of_step)
        if last not in steps:
            raise file.refused("is about only a part of the run or of the data")
        values = units[code][steps.index(last)].double().numpy() if code in units else None
        value = file.at(code, last, "nll_per_byte")
        if values is None or abs(values.mean() - value) > 1e-6:
            raise file.refused(f"and {pt.name} beside it do not belong together ({code})")
        run.texts[code] = ((file.header.get("heldout") or {}).get(code) or {}).get("sha256", "")
        quantities[code] = Quantity(value, values, "documents")
    return quantities


def task(run: Run) -> dict[str, Quantity]:
    """Accuracy of the downstream task; results by row are not kept, so a difference has no interval over rows."""
    row = run.at_last("task accuracy", result="downstream", measure="acc")[0]
    return {"accuracy": Quantity(row["value"])}


SECTIONS = {
    "retrieval": retrieval, "change": change, "swaps": swaps, "neurons": neurons, "losses": losses, "task": task,
}  # fmt: skip


def measured(run: Run) -> tuple[dict[str, Quantity], dict[str, str]]:
    """All quantities of a run by "section: name", and what its sections lack.

    Raises:
        InputError: results are not about this run, or there are none.
    """
    quantities: dict[str, Quantity] = {}
    for section, function in SECTIONS.items():
        try:
            with run.found.reading(section):
                quantities |= {f"{section}: {name}": quantity for name, quantity in function(run).items()}
        except evidence.Missing as reason:
            run.lacks[section] = [str(reason)]
    if not quantities:
        raise InputError(
            f"{run.found.folder} holds no result to compare; run the steps of the README "
            + (
                f"with --arm {run.study.arm}, or make reproduce STUDY={run.study.path} ARM={run.study.arm}"
                if run.study.arm
                else f"on {run.study.path}"
            )
        )
    return quantities, {section: "; ".join(reasons) for section, reasons in run.lacks.items()}


# ---------------------------------------------------------------- several runs


def refuse_strangers(runs: dict[str, Run]) -> None:
    """Refuse runs of different bases, equal runs, and runs measured differently or on other texts."""
    first, *others = runs.items()
    for name, run in others:
        if not relatives.same_model(first[1].found.base, run.found.base):
            raise InputError(
                f"{first[0]} and {name} start from different bases: {run.found.base['spec']}; compare runs of one"
            )
        for other, before in runs.items():
            if other != name and relatives.same_model(before.found.last, run.found.last):
                raise InputError(f"{other} and {name} have the same weights, {run.found.last['spec']}; leave one out")
        for what in evidence.ALIKE:
            one, two = first[1].found.facts.get(what), run.found.facts.get(what)
            if one and two and one[0] != two[0] and what != "a seed":
                raise InputError(
                    f"{one[1]} and {two[1]} were made with different {what.removeprefix('a ')}; measure both alike"
                )
        for code in first[1].texts.keys() & run.texts.keys():
            if first[1].texts[code] != run.texts[code]:
                raise InputError(
                    f"losses of {first[0]} and {name} are on different texts in {code}; measure both alike"
                )


def difference(name: str, first: Quantity, other: Quantity, seed: int) -> dict:
    """The other run minus the first, paired by unit if both have units."""
    if first.units is None or other.units is None:
        return verdicts.number(name, other.value - first.value)
    if first.units.shape != other.units.shape:
        return verdicts.number(name, None, note=f"{len(first.units)} and {len(other.units)} {first.of} are no pairs")
    return Quantity(other.value - first.value, other.units - first.units, first.of).number(name, seed)


def agreement(first: Run, other: Run) -> list[dict]:
    """The overlap (Jaccard) of the hubs and of each language's neurons in two runs, and that expected by chance."""
    pairs = {}
    hubs = [export.chosen(run.table, result="layers", measure="in_hub") for run in (first, other)]
    if all(hubs):
        pairs["layers of the hub"] = [{row["layer"] for row in hub if row["value"]} for hub in hubs], len(hubs[0])
    masks = [run.study.result("lsn_mask") for run in (first, other)]
    if all(path.is_file() for path in masks):
        (one, header), (two, _) = (results.read_json(path, "lsn-mask") for path in masks)
        for code in (code for code in one if code in two):
            neurons_ = [{(layer, i) for layer in mask[code] for i in mask[code][layer]} for mask in (one, two)]
            pairs[f"neurons of {code}"] = neurons_, header["n_layers"] * header["ffn_width"]
    numbers = []
    for name, (sets, n) in pairs.items():
        if any(sets):
            overlap = stats.overlap(*sets, n)
            numbers.append(verdicts.number(f"{name} in both", overlap["jaccard"], p_value=overlap["p_value"]))
            numbers.append(verdicts.number(f"{name} in both, by chance", overlap["expected"]))
    return numbers


def of_seed(studies: dict[str, Study]) -> dict:
    """The comparison for one seed: `values` and `differences` {run: numbers}, `agreement`, `missing`, `gate` (why, for
    runs that fail it), `models`, `curves`."""
    runs = {name: Run(study) for name, study in studies.items()}
    quantities, missing = {}, {}
    for name, run in runs.items():
        quantities[name], missing[name] = measured(run)
    refuse_strangers(runs)
    seed, (first, *others) = next(iter(studies.values())).seed, runs
    agreed, gates = {}, {name: run.found.gate for name, run in runs.items()}
    for name in others:
        with runs[name].found.reading("agreement"):
            agreed[name] = agreement(runs[first], runs[name])
    return {
        "values": {name: [q.number(key, seed) for key, q in own.items()] for name, own in quantities.items()},
        "differences": {
            name: [
                difference(key, quantities[first][key], quantity, seed)
                for key, quantity in quantities[name].items() if key in quantities[first]
            ]
            for name in others
        },
        "agreement": agreed,
        "missing": missing,
        "gate": {name: gate.words(own) for name, own in gates.items() if own and not own["passed"]},
        "models": {"base": runs[first].found.base} | {name: run.found.last for name, run in runs.items()},
        "curves": {name: shown.curves_of(run.table) for name, run in runs.items()},
    }  # fmt: skip


def over_seeds(seeds: dict[int, dict]) -> dict:
    """The same over seeds: of each number the mean with the interval of Student's t."""
    first = next(iter(seeds.values()))

    def joined(key: str) -> dict:
        return {name: verdicts.over_seeds({seed: one[key][name] for seed, one in seeds.items()}) for name in first[key]}

    missing = {
        name: {
            section: f"seed {seed}: {why}"
            for seed, one in seeds.items()
            for section, why in one["missing"][name].items()
        }
        for name in first["missing"]
    }
    failed = {name: f"seed {seed}: {why}" for seed, one in seeds.items() for name, why in one["gate"].items()}
    curves_of = {name: shown.mean_curves([one["curves"][name] for one in seeds.values()]) for name in first["curves"]}
    numbers = {key: joined(key) for key in ("values", "differences", "agreement")}
    return numbers | {"missing": missing, "gate": failed, "models": first["models"], "curves": curves_of}


# ---------------------------------------------------------------- command line


def chosen_studies(args, seed: int | None) -> dict[str, Study]:
    """The runs to compare by name: study files, or the study's own run (plain), its `runs` and arms."""
    if args.runs and all(Path(name).suffix in (".yaml", ".yml") for name in args.runs):
        studies = [Study.find(file, seed, args.arm) for file in args.runs]
        by_name = {study.name: study for study in studies}
        if len(by_name) < len(studies):
            raise InputError(f"two of {', '.join(args.runs)} have the same name; give each its own (key name)")
        return by_name
    if args.arm is not None:
        raise InputError("name the runs to compare (plain, and arms or runs of the study); leave out --arm")
    study = Study.find(args.study, seed)
    if not study:
        raise InputError("give study files of several runs, or --study FILE with other runs in it (key runs)")
    names = args.runs or [rows.PLAIN, *study.get("runs", {})]
    if len(names) < 2 or len({*names}) < len(names):
        raise InputError(f"{study.path}: comparing takes two runs or more; put others under the key runs, or name arms")
    return {name: study if name == rows.PLAIN else study.of_arm(name) for name in names}


def build_parser():
    p = cli.parser(__doc__)
    text = "study files; or, of --study, plain and names of its runs and arms; default: plain and all runs"
    p.add_argument("runs", nargs="*", metavar="RUN", help=text)
    text = "differences over these seeds; default: one seed, over sentences and documents"
    p.add_argument("--seeds", type=cli.seeds, metavar="S,S,..", help=text)
    p.add_argument("-o", "--output", metavar="OUT", help="JSON to write; default: the study's report/compare.json")
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    several = len(args.seeds or []) > 1
    seeds = [chosen_studies(args, seed) for seed in args.seeds or [args.seed]]
    first = next(iter(seeds[0].values()))
    study = first.plain
    if args.output is None and (several or any(one.plain is not study for one in seeds[0].values())):
        raise InputError("several seeds or study files need --output FILE.json")
    output = study.output(args.output, "--output", "compare")
    if output.suffix != ".json":
        raise InputError(f"--output {output}: give the name of a JSON file")
    refuse_shared([next(iter(one.values())) for one in seeds])
    read = {next(iter(one.values())).seed: of_seed(one) for one in seeds}
    payload = over_seeds(read) if several else next(iter(read.values()))
    models = payload.pop("models")
    payload = results.plain({"study": study.name, "seeds": [*read], "first": next(iter(payload["values"]))} | payload)
    facts = {f"{side}_lang": study.get(f"languages.{side}") for side in ("base", "target")}
    payload["target_lang"] = facts["target_lang"]
    shown.draw(output.with_suffix(""), payload)
    results.write_text(output.with_suffix(".md"), shown.markdown(payload))
    results.write_text(output.with_suffix(".tex"), shown.latex(payload))
    results.write_json(output, payload, results.header(SCHEMA, models=models, **facts))
    for name, missing in payload["missing"].items():
        for section, why in missing.items():
            cli.say(f"{name}, {section}: {why}")
    cli.say(f"wrote {output}, .md, .tex, .pdf and .png")


if __name__ == "__main__":
    cli.run(main)
