"""What a part of the model is needed for: compare arms (the same CPT with that part frozen) with the plain run.

In:   a study with `arms`; its base, its run and the runs of its arms (cpt/train.py --stage cpt, with --arm NAME), each
      measured at its last checkpoint. In a study with Part II also the plain run's mask, its control and token ids.
Out:  OUT (default: the study's arms.json): the values of base, plain run and arms, the share of the plain run's gain
      that each arm reached, and the arm minus the plain run; OUT.pt with the values of every sentence (document, row,
      block of tokens), OUT.md with a table, and a figure.
      With --seeds, from the arms.json of each seed: shares, their mean, spread and number, with table and figure.

Full:  python cpt/compare_arms.py --study demo/demo.yaml
Tiny:  python cpt/compare_arms.py --study demo/tiny.yaml --measures nll --limit 20 --output build/try/arms.json
Seeds: python cpt/compare_arms.py --study studies/demo.yaml --seeds 0,1,2 --output results/demo-seeds/arms.json
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.base import cli, figures, languages, results, sources, stats
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import np, torch
from cpt_utils.base.study import Study, expand
from cpt_utils.checkpoints import refs, relatives
from cpt_utils.interventions.condition import Condition, digest
from cpt_utils.measures import evaluation, layer_sets, masks
from cpt_utils.measures.trial import Trial
from cpt_utils.models import ffn

retrieval = cli.sibling("sentence-retrieval/sr_experiment.py")
counting = cli.sibling("lsn/activation.py")
activation = cli.sibling("lsn/lsn_activation_cpt.py")
runs = cli.sibling("cpt/runs.py")
freezing = cli.sibling("cpt/freezing.py")

SCHEMA = "arms"
RESULTS = {"arms": "arms.json"}
ASKED = {"arms": "How much of the gain from training remains if a part of the model is frozen?"}
CAPTIONS = {
    "arms": """Part I: 6. Arms
        The same continued pre-training with a part of the model frozen: the share of the plain run's gain that each arm
        reached (0: no better than the base, 1: as good as the plain run), with 95 % intervals over sentences
        (documents, rows, blocks of tokens; a narrow interval is hidden by its point). There is no point if it is not
        clear that the plain run gained anything. For LSN activation: the share of its change in either direction.""",
}
LSN = evaluation.Measure("LSN activation, change as in the plain run", True, "lsn")


# ---------------------------------------------------------------- the method


def compare(arm, base, plain, sign: int, seed: int) -> dict:
    """`share` of the plain run's gain that an arm reached (None unless the interval of that gain lies above 0), and
    `minus_plain`, with intervals from the same bootstrap over units.

    Args:
        arm, base, plain: values [units], paired.
        sign: 1 if higher is better, else -1.
    """
    change, gain = arm - plain, sign * (plain - base)
    low, high = stats.bootstrap_mean(change, seed)
    result = {"share": None, "minus_plain": {"value": float(change.mean()), "ci_low": low, "ci_high": high}}
    if stats.bootstrap_mean(gain.round(9), seed)[0] > 0:  # rounded, so that equal hits give no gain in the last bit
        arm_gain, weights = sign * (arm - base), stats.resample_weights(len(gain), seed, 2000)
        drawn = stats.shares(weights @ arm_gain, weights @ gain)
        result["share"] = stats.with_interval(arm_gain.sum() / gain.sum(), drawn)
    return result


def difference(model, arch: archs.Arch, blocks: torch.Tensor, followed: dict[str, masks.Layers]) -> dict:
    """Mean activation in the mask "language" minus that in "control": over all blocks [blocks, size], and per block."""
    total, by_block = activation.Activations(model, arch, followed), []
    for ids in blocks.split(1):
        block = activation.Activations(model, arch, followed)
        block.add(ids)
        total.include([block.state()])
        by_block.append(block.mean("language") - block.mean("control"))
    return {"value": total.mean("language") - total.mean("control"), "blocks": by_block}


def with_activation(records: list[dict]) -> None:
    """Turn activation differences into each model's distance from the base in the plain run's direction: |d| of step 10
    for the plain run, negative for an arm that moves the other way.

    Args:
        records: base, plain run, arms. The mean over blocks is the value (for experts' neurons: approximately).
    """
    by_model = [record.pop("lsn") for record in records]
    base, plain = by_model[:2]
    sign = math.copysign(1, plain["value"] - base["value"])
    for record, lsn in zip(records, by_model, strict=True):
        record["values"]["lsn_activation"] = sign * (lsn["value"] - base["value"]) + 0.0  # turns the base's -0 into 0
        record["units"]["lsn_activation"] = [sign * (a - b) for a, b in zip(lsn["blocks"], base["blocks"], strict=True)]


def payload_of(records: list[dict], asked: dict[str, dict], trained: dict[str, dict], seed: int) -> tuple[dict, dict]:
    """The contents of arms.json, and the units of each measure, float64 [models, units], in the order of `models`.

    Args:
        records: "base", "plain" and every arm: `name`, `values`, `units`.
        asked: arm -> its keys in the study.
        trained: arm -> `trained` in the header of its train.json; {} if unknown.
    """
    measures = {name: LSN if name == "lsn_activation" else evaluation.named(name) for name in records[0]["units"]}
    units = {name: np.asarray([record["units"][name] for record in records], dtype=np.float64) for name in measures}
    models = {}
    for i, record in enumerate(records):
        name = record["name"]
        models[name] = {"values": {measure: record["values"][measure] for measure in measures}}
        if name not in asked:
            continue
        facts = {key: trained[name].get(key) for key in ("trainable_parameters", "share_of_parameters")}
        facts["layers"] = trained[name].get(freezing.mode_of(asked[name]), {}).get("layers")
        models[name] |= {"what": asked[name], **facts, "share": {}, "minus_plain": {}}
        for measure, kind in measures.items():
            sign = 1 if kind.higher_is_better else -1
            result = compare(units[measure][i], units[measure][0], units[measure][1], sign, seed)
            for key, value in result.items():
                models[name][key][measure] = value
    labels = {name: {"label": m.label, "higher_is_better": m.higher_is_better} for name, m in measures.items()}
    return {"measures": labels, "models": models}, {name: torch.from_numpy(values) for name, values in units.items()}


# ---------------------------------------------------------------- measuring the models


def arms_of(study: Study, base: refs.ModelRef, plain: refs.ModelRef) -> tuple[dict, dict]:
    """The arms' last checkpoints, and the trained part of each.

    Raises:
        InputError: the study has no arms; one is not trained, or was trained with other data, order, steps, seed or
            part than the study now asks for (a part in words, hub or lsn, is compared by its layers and neurons).
    """
    plain_run, checkpoints, trained = Path(study.get("run")), {}, {}
    wanted = runs.settings_of_plain(plain_run)
    known = relatives.of([base], study.get("base"), study.get("run"))
    for name, asked in study.get("arms", {}).items():
        run = Path(study.of_arm(name).get("run"))
        how = f"run cpt/train.py --stage cpt --arm {name}"
        settings, trained[name] = runs.settings_of(run)
        if settings is None:
            raise InputError(f"{run} holds no finished training; {how} first")
        if other := runs.other_training(settings, wanted):
            raise InputError(f"{run} is not an arm of {plain_run} ({other}); {how}")
        runs.refuse_other_start(run, settings, base, f"{how} --overwrite")
        mode = freezing.mode_of(asked)
        keys = (layer_sets.words_of(asked[mode]), mode in trained[name], asked.get("io", trained[name].get("io")))
        if keys != (trained[name].get("words"), True, trained[name].get("io")):
            raise InputError(f"{run} was trained as another arm than {name} is in the study now; {how} --overwrite")
        # The same words may now mean other layers or neurons, if step 2 was rerun or the mask was made again.
        part = freezing.read(asked, layer_sets.Place(base.config(), study, known)).facts()[mode]
        if not results.same(part, trained[name][mode]):
            difference = results.diff_request(trained[name][mode], part)
            raise InputError(f"{run}: {mode} {keys[0]} means something else now ({difference}); {how} --overwrite")
        checkpoints[name] = refs.run(str(run))[-1]
        if checkpoints[name].step != plain.step:
            raise InputError(f"{run} ends at step {checkpoints[name].step}, the plain run at {plain.step}; {how}")
    if not checkpoints:
        raise InputError(f"{study.path or 'the study'} has no arms; name some under the key arms (cpt/README.md)")
    return checkpoints, trained


@dataclass(frozen=True)
class Neurons:
    """The target language's neurons in the plain run's mask, their control, and the blocks of target-language text."""

    followed: dict[str, masks.Layers]
    blocks: torch.Tensor
    facts: dict

    @classmethod
    def find(cls, study: Study, plain: refs.ModelRef, limit: int | None) -> Neurons | None:
        """Read them from a study with Part II; None for any other study."""
        target, codes = study.get("languages.target"), [str(code) for code in study.get("languages.lsn", [])]
        if not study.get("tokens") or languages.find(codes, str(target), default=None) is None:
            return None
        config = plain.config()
        widths = ffn.widths(archs.for_config(config), config)
        known = relatives.of([plain], study.get("base"), study.get("run"))
        files = [study.input(None, "--mask_file", step) for step in ("lsn_mask", "lsn_control")]
        language, control = masks.read_both(*files, str(target), len(widths), widths, known)
        size = ffn.block_size(config, None, study.get("lsn.block_size"))
        ids = counting.id_file(study, str(target))
        blocks, facts = counting.read(ids, plain, study.get("run"), size, activation.TOKENS, limit)
        facts = {"ids": facts, "block_size": size, "mask": digest([language, control])}
        return cls({"language": language, "control": control}, blocks, facts)


@dataclass(frozen=True)
class Bench:
    """What is measured on every model: an `evaluation.Test`, and the activation of the neurons, `lsn`."""

    test: evaluation.Test
    neurons: Neurons | None

    @property
    def facts(self) -> dict:
        return self.test.facts

    def on(self, model, arch: archs.Arch, tokenizer, name: str) -> dict:
        record = self.test.on(model, arch, tokenizer, name)
        if self.neurons:
            record["lsn"] = difference(model, arch, self.neurons.blocks, self.neurons.followed)
        return record


def measure_arms(study: Study, output: Path, args) -> None:
    """Measure a study's base, plain run and arms, and write `output` with its figure and table."""
    base, plain = refs.model(study.value(None, "--base", "base")), refs.run(study.value(None, "--run", "run"))[-1]
    arms, trained = arms_of(study, base, plain)
    neurons = None if args.measures else Neurons.find(study, plain, args.limit)
    models = {"base": base, "plain": plain, **arms}
    measure(models, study.get("arms"), trained, study.get("run"), study, output, args, neurons)


def measure(
    found: dict[str, refs.ModelRef], asked: dict[str, dict], trained: dict[str, dict], run: str, study: Study,
    output: Path, args, neurons: Neurons | None = None,
) -> bool:  # fmt: skip
    """Measure the models in `found`, "base" and "plain" first, and write `output` with its figure and table.

    Args:
        asked, trained: of all other models, see `payload_of`. run: provides the tokenizer of models without one.

    Returns:
        whether this is the process that writes.
    """
    test = evaluation.test_from_arguments(args, study, {}, retrieval.of_pairs, study.get("data.heldout"))
    trial = Trial.from_arguments(args, study, found, Bench(test, neurons), run)

    def payload(records: list[dict]) -> tuple[dict, dict]:
        if neurons:
            with_activation(records)
        return payload_of(records, asked, trained, study.seed)

    def show(path: Path, payload: dict) -> None:
        draw(path, payload)
        results.write_text(output.with_suffix(".md"), table(payload))

    conditions = [Condition(role, {}, of=role) for role in found]
    facts = {"measures": test.measures(), "neurons": neurons and neurons.facts}
    trial.measure(output, conditions, SCHEMA, facts, payload, show=show, say=lambda payload: cli.say(table(payload)))
    return trial.process.is_main


# ---------------------------------------------------------------- tables and figures


def told(what: dict) -> str:
    """The keys of an arm in words: "freeze hub", "train_only outer:0.25, io trained"."""
    return ", ".join(f"{key} {layer_sets.words_of(value)}" for key, value in what.items())


def table(payload: dict) -> str:
    """Markdown table with a row per model: what was trained, and the value and share of the gain of each measure."""
    rows = []
    for name, model in payload["models"].items():
        is_arm = "what" in model
        trained = f"{model['share_of_parameters']:.1%}" if model.get("share_of_parameters") else ""
        row = [name, told(model["what"]) if is_arm else "", trained]
        for measure, value in model["values"].items():
            share = model["share"][measure] if is_arm else None
            interval = f" ({stats.told(share, '.2f')})" if share else ""
            row.append(f"{value:.4f}" + (interval or " (no clear gain)" if is_arm else ""))
        rows.append(row)
    return results.markdown(["model", "arm", "trained", *(f"{m['label']}" for m in payload["measures"].values())], rows)


def panels(
    path: Path, measures: dict, names: list[str], points, axis_label: str = "share of the gain",
    lines=(("-", 1, "plain run"), (":", 0, "base")), bands: tuple[float, ...] = (),
) -> None:  # fmt: skip
    """A panel per measure with a row per arm and the share of the gain on the axis; the line at 1 is the plain run.

    Args:
        points: (measure, arm) -> values to draw as points, their mean, and an interval or None.
        axis_label, lines, bands: for numbers other than that share; lines are (style, value, name), bands are shaded
            from minus to plus their value.
    """
    with figures.style() as plt:
        size, named = (figures.PAGE, 1.1 + 0.24 * len(names)), {}
        fig, axes = plt.subplots(1, len(measures), figsize=size, sharey=True, squeeze=False)
        for axis, (measure, what) in zip(axes[0], measures.items(), strict=True):
            for end in bands:
                label = "±" + " and ".join(f"{end:g}" for end in bands) + " %" if end == bands[0] else None
                axis.axvspan(-end, end, color=figures.colour("random"), alpha=0.15, linewidth=0, label=label)
            for line, at, label in lines:
                axis.axvline(at, color=figures.colour("random"), linewidth=0.8, linestyle=line, label=label)
            rows = [points(measure, name) for name in names]
            for row, (values, mean, interval) in enumerate(rows):
                seeds = axis.plot(values, [row] * len(values), "|", color=figures.colour("random"))
                whisker = axis.plot(interval or [], [row, row] if interval else [], "-", color=figures.colour("hub"))
                if mean is not None:
                    axis.plot([mean], [row], "o", color=figures.colour("hub"))
                if values:
                    named.setdefault("a seed", seeds[0])
                if interval:
                    named.setdefault("95 % interval", whisker[0])
            if all(mean is None for _, mean, _ in rows):
                how = {"transform": axis.transAxes, "ha": "center", "va": "center", "fontsize": 6.5}
                axis.text(0.5, 0.5, "no clear gain\nof the plain run", **how)
            axis.set_title(figures.measure(measure, what["label"], 18))
            axis.set_xlabel(axis_label.replace("the gain", "change") if measure == "lsn_activation" else axis_label)
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                named.setdefault(label, handle)
        axes[0, 0].set_yticks(range(len(names)), names)
        axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
        fig.legend(named.values(), named, loc="outside lower center", ncols=len(named))
        figures.save(fig, path)


def target_alone(measures: dict) -> dict:
    """The measures without the losses in other languages, where most runs gain nothing."""
    return {name: what for name, what in measures.items() if ":" not in name}


def draw(path: Path, payload: dict) -> None:
    models = {name: model for name, model in payload["models"].items() if "share" in model}

    def points(measure: str, name: str):
        share = models[name]["share"][measure]
        return ([], share["value"], (share["ci_low"], share["ci_high"])) if share else ([], None, None)

    panels(path, target_alone(payload["measures"]), list(models), points)


# ---------------------------------------------------------------- comparison of seeds


def drawn(what: dict, seed: int) -> dict:
    """The keys of an arm with the run's seed replaced by {seed}, as in a study: at the end of words, also after other
    digits (1{seed}), and anywhere in paths."""
    in_words, in_paths = rf"(?<=:)(\d*?){seed}(?=$|/)", rf"(?<!\d)(?<!\d\.)(){seed}(?!\.?\d)"
    return expand(what, lambda text: re.sub(in_paths if ".json" in text else in_words, r"\1{seed}", text))


def over_seeds(found: dict[int, dict]) -> dict:
    """{"seeds", "measures", "arms": {arm: {"what", measure: {"shares": [by seed], "mean", "sd", "n"}}}}.

    `n` counts the seeds whose plain run gained; `sd` is that of the sample, None for a single seed.

    Raises:
        InputError: seeds with different arms or measures.
    """
    first = next(iter(found.values()))
    asked = {seed: {name: m["what"] for name, m in payload["models"].items() if "what" in m}
             for seed, payload in found.items()}  # fmt: skip
    arms = next(iter(asked.values()))
    # A part drawn with the seed of its run differs between seeds: "random:2:{seed}".
    arms = {name: what if all(each.get(name) == what for each in asked.values()) else drawn(what, next(iter(found)))
            for name, what in arms.items()}  # fmt: skip
    for seed, theirs in asked.items():
        same = theirs.keys() == arms.keys() and all(w in (theirs[n], drawn(theirs[n], seed)) for n, w in arms.items())
        if not same or found[seed]["measures"] != first["measures"]:
            raise InputError(f"seed {seed} has other arms or measures than seed {next(iter(found))}; measure it again")
    by_arm = {}
    for name, what in arms.items():
        by_arm[name] = {"what": what}
        for measure in first["measures"]:
            shares = [payload["models"][name]["share"][measure] for payload in found.values()]
            values = [share["value"] if share else None for share in shares]
            clear = np.asarray([value for value in values if value is not None])
            by_arm[name][measure] = {
                "shares": values, "mean": float(clear.mean()) if len(clear) else None,
                "sd": float(clear.std(ddof=1)) if len(clear) > 1 else None, "n": len(clear),
            }  # fmt: skip
    return {"seeds": list(found), "measures": first["measures"], "arms": by_arm}


def gain_told(own: dict) -> str:
    """The share of the gain over seeds, like "0.65 ± 0.21 (n 2)"."""
    spread = f" ± {own['sd']:.2f}" if own["sd"] is not None else ""
    return f"{own['mean']:.2f}{spread} (n {own['n']})" if own["n"] else "no clear gain"


def compare_seeds(args, output: Path) -> None:
    """Write the table of several seeds, from the arms.json of each."""
    by_seed, seed_of = {}, {}
    for seed in args.seeds:
        path = Study.find(args.study, seed).input(None, "--study", "arms", f" --seed {seed}")
        by_seed[seed], head = results.read_json(path, SCHEMA)
        plain = head["models"]["plain"].get("weights_sample")
        if plain in seed_of:
            raise InputError(f"{path} comes from the same run as seed {seed_of[plain]}: each seed needs its own run")
        seed_of[plain] = seed
    payload = over_seeds(by_seed)
    rows = []
    for name, arm in payload["arms"].items():
        rows.append([name, told(arm["what"]), *(gain_told(arm[measure]) for measure in payload["measures"])])
    text = results.markdown(["arm", "", *(m["label"] for m in payload["measures"].values())], rows)

    def points(measure: str, name: str):
        gain = payload["arms"][name][measure]
        return [share for share in gain["shares"] if share is not None], gain["mean"], None

    panels(output.with_suffix(""), target_alone(payload["measures"]), list(payload["arms"]), points)
    results.write_text(output.with_suffix(".md"), text)
    results.write_json(output, payload, results.header(f"{SCHEMA}-over-seeds", seeds=args.seeds))
    cli.say(f"{text}wrote {output}, mean ± standard deviation over {len(args.seeds)} seeds")


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("--seeds", type=cli.seeds, metavar="S,S,..", help="compare the results of these seeds")
    text = "JSON to write; default: the study's arms.json; needed with --seeds"
    p.add_argument("-o", "--output", metavar="OUT", help=text)
    evaluation.add_flags(p)
    sources.add_flags(p)
    cli.add_forward_flags(p, batch_size=None, device_map=True)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    if args.arm is not None:
        raise InputError("all arms of the study are compared; leave out --arm")
    if args.seeds:
        if args.output is None:
            raise InputError("--seeds needs --output FILE.json, outside the results of a single seed")
        compare_seeds(args, Path(args.output))
        return
    study = Study.find(args.study, args.seed)
    suffix = f"limit-{args.limit}" if args.limit else "-".join(args.measures or ())
    measure_arms(study, study.output(args.output, "--output", "arms", suffix), args)


if __name__ == "__main__":
    cli.run(main)
