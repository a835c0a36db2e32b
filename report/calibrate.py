"""How often the rules of report/claims.py are right, on simulated studies whose result files it reads like any others.

Each world is drawn many times with twelve seeds, of which the first 5, 8 and 12 are judged. In some worlds no claim is
true or false: all numbers lie at the claims' bounds, with nothing special or only effects of depth, seams or shared
growth. In the others every claim is true, or every claim false, by a number of standard deviations over seeds.

Out:  the table of error rates in report/README.md, between its two marks.

Full: python report/calibrate.py --studies 200
Tiny: python report/calibrate.py --studies 1 --worlds "nothing special"
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from cpt_utils.base import cli, results, stats
from cpt_utils.base.lazy import np, torch
from cpt_utils.checkpoints import refs
from cpt_utils.measures import verdicts

claims = cli.sibling("report/claims.py")
C1 = cli.sibling("report/claims/c1.py")

README = cli.REPOSITORY / "report/README.md"
MARKS = "<!-- made by report/calibrate.py -->", "<!-- until here -->"
SEEDS = (5, 8, 12)
L, SENTENCES, UNITS = 8, 400, 64
STEPS = (10, 30, 80, 180, 360, 600)
LANGS = {"base_lang": "eng_Latn", "target_lang": "gle_Latn"}
ENDS = {"retrieval_readout": (0.2, 0.5), "nll_per_byte": (0.46, 0.36), "task_accuracy": (0.6, 0.8)}  # base, target
ROWS = {"data": {"pairs_sha256": "same"}, "heldout": {"sha256": "same"}, "task": {"sha256": "same"}}


@dataclass(frozen=True)
class World:
    """What is true in a simulated study.

    Attributes:
        effect: by how many standard deviations over seeds every claim is true, or false (below 0); 0: at its bound.
        depth, seams: share of the gain that a swap costs more per layer that it lies earlier, and per seam.
        bow: share of the gain that the first and the last layer each cost more than the middle, others by a parabola.
        growth: everything grows with training, and freezing any part costs the same, wherever it is.
        noise: its distribution over seeds, "normal" or "skewed" (log-normal).
    """

    name: str
    effect: float = 0.0
    depth: float = 0.0
    bow: float = 0.0
    seams: float = 0.0
    growth: bool = False
    noise: str = "normal"
    hub: tuple = (4, 5, 6, 7)
    interface: tuple = (0, 1, 2, 3)
    rich: tuple = (4, 5, 6, 7)


DEMO = {"hub": (2, 4, 5, 6), "interface": (0, 1, 3, 7), "rich": (1, 4, 5, 6)}
WORLDS = [
    World("nothing special"),
    World("nothing special, as on the demo", **DEMO),
    World("nothing special, skewed seeds", noise="skewed"),
    World("depth only", depth=0.02),
    World("depth only, dear at both ends", bow=0.15, hub=(3, 4, 5, 6), interface=(0, 1, 2, 7), rich=(2, 3, 4, 5)),
    World("seams only", seams=0.03),
    World("shared growth only", growth=True),
    *(World(f"every claim {said}, {d:g} sd", sign * d, **DEMO)
      for sign, said in ((1, "true"), (-1, "false")) for d in (1.0, 2.0, 3.0)),
]  # fmt: skip


# ---------------------------------------------------------------- a simulated study


@functools.cache
def write_model(folder: Path, content: float) -> dict:
    """Write what tells models apart, a config and a file of weights, and return its description."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": L}))
    save_file({"w": torch.full((4,), float(content))}, folder / "model.safetensors")
    return refs.model(folder).describe()


class Made:
    """One seed of a simulated study below `folder`: its models, and its results in `folder`/results/<seed>."""

    def __init__(self, folder: Path, world: World, seed: int):
        self.folder, self.world, self.seed = folder, world, seed
        models = folder / f"models/{seed}"
        self.base = write_model(models / "base", seed)
        self.run = [write_model(models / "run" / f"checkpoint-{step}", step + seed / 100) for step in STEPS]
        self.results, self.study = folder / f"results/{seed}", folder / "study.yaml"
        self.study.write_text(
            f"name: made\nbase: {folder}/models/{{seed}}/base\nrun: {folder}/models/{{seed}}/run\n"
            f"results: {folder}/results/{{seed}}\nlanguages: {{base: eng_Latn, target: gle_Latn}}\nseed: {seed}\n"
        )

    def all(self, rng: np.random.Generator) -> Made:
        """Write every result that the claims read; `rng` draws this seed."""
        self.rng = rng
        for make in (self.retrieval, self.layers, self.layer_swap, self.component_swaps, self.weights, self.arms):
            make()
        for make in (self.curves, self.sweep, self.heads, self.rewinding, self.truncation, self.connection):
            make()
        self.spectrum()
        return self

    def write(self, place: str, payload: dict, schema: str, tensors: dict | None = None, **facts) -> Path:
        path, common = self.results / place, {"n_layers": L, "seed": self.seed, "limit": None}
        content = {results.HEADER: {"schema": schema, **common, **facts}, **payload}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, default=lambda value: value.tolist()))
        if tensors:
            results.write_tensors(path.with_suffix(".pt"), tensors)
        return path

    def noise(self, sd: float, *shape: int) -> np.ndarray:
        """Differences between seeds, with mean 0."""
        drawn = self.rng.normal(size=shape)
        if self.world.noise == "skewed":
            drawn = (np.exp(drawn) - np.exp(0.5)) / (np.e * (np.e - 1)) ** 0.5
        return sd * drawn

    def retrieval(self) -> None:
        """Hits of the last checkpoint: with an effect of 1, inner hidden states differ from the ends by 1 sd = .026."""
        hits = {}
        for tensor in ("hits", "hits_unit_centred"):
            chances = 0.3 + 0.026 * self.world.effect * np.array([0, *[1] * (L - 1), 0]) + self.noise(0.015, L + 1)
            z = self.rng.normal(size=SENTENCES)
            latent = 0.6**0.5 * z + 0.4**0.5 * self.rng.normal(size=(L + 1, SENTENCES))
            hits[tensor] = latent < np.quantile(self.rng.normal(size=20000), chances.clip(0.01, 0.99))[:, None]
        self.one_retrieval(self.run[-1]["model_id"], {"model": self.run[-1]}, hits)

    def one_retrieval(self, name: str, models: dict, hits: dict[str, np.ndarray], **facts) -> Path:
        payload: dict = {**LANGS}
        for key, tensor, _ in C1.CURVES:
            ends = zip(*stats.bootstrap_means(hits[tensor], self.seed), strict=True)
            payload[key] = [[state, value] for state, value in enumerate(hits[tensor].mean(1))]
            payload[f"{key}_ci"] = [[state, list(both)] for state, both in enumerate(ends)]
        tensors = {tensor: torch.tensor(each) for tensor, each in hits.items()}
        common = {"models": models, "data": ROWS["data"], "dtype": "float32", "margin_variant": "ratio", "k": 4}
        common |= {"special_tokens": True, **LANGS} | facts
        place = f"sentence-retrieval/eng_Latn-gle_Latn/{name}.json"
        return self.write(place, payload, "sentence-retrieval", tensors, **common)

    def layers(self, **facts) -> None:
        payload = {"interface_layers": self.world.interface, "semantic_layers": self.world.hub}
        models = {"model": self.run[-1]}
        gate = {"passed": True, "model": "m", "difference": 0.3, "ci_low": 0.2, "ci_high": 0.4, "level": 0.99, "n": 9}
        facts = {"models": models, "data": ROWS["data"], "dtype": "float32", "gate": gate, **LANGS} | facts
        self.write("layer-specialize/layers.json", payload, "layer-specialize", **facts)
        self.write("lsn/result/made.layers.json", {"layers": self.world.rich}, "lsn-layers", models=models)

    # --- swaps

    def layer_swap(self) -> None:
        """Each layer costs its share of the gain; with an effect of 1, 1 sd less in the hub and more outside it."""
        world = self.world
        layer_costs = {m: np.zeros(L) for m in ENDS}
        shared = self.noise(0.014, L)
        for measure in layer_costs:
            layer_costs[measure] = shared + self.noise(0.014, L)
            layer_costs[measure] += world.effect * np.where(np.isin(np.arange(L), world.hub), -0.011, 0.008)
        plain = 0.25 - self._nuisance(world.hub)  # without an effect the hub swap loses a quarter of the gain

        def cost(measure: str, layers) -> float:
            return plain * len(layers) / 4 + layer_costs[measure][list(layers)].sum() + self._nuisance(layers)

        sets = [("semantic_hub", None, world.hub)] + [("random", None, one) for one in self.sets() if one != world.hub]
        facts = {"interface_layers": world.interface, "semantic_hub_layers": world.hub}
        self.swap("layer-swap", "semantic_hub", sets, lambda m, _, layers: cost(m, layers), list(ENDS), facts)

    def component_swaps(self) -> None:
        """Attention and FFN of the same layers cost the same; with an effect of 1, attention costs 1 sd more, and more
        so in the interface."""
        world, places = self.world, {"interface": self.world.interface, "lsn_rich": self.world.rich}
        side = np.array([(at in world.interface) - (at in world.rich) for at in range(L)])
        more = world.effect * (0.013 + 0.009 * side)
        layer_costs = {
            (m, kind): 0.03 + self.noise(0.008, L) + (more if kind == "attention" else 0)
            for m in list(ENDS)[:2] for kind in ("attention", "ffn")
        }  # fmt: skip
        crossed = [(f"{kind}_{name}", kind, one) for name, one in places.items() for kind in ("attention", "ffn")]
        named = [(kind, one) for _, kind, one in crossed]
        sets = [("random", kind, one) for kind in ("attention", "ffn") for one in self.sets()
                if (kind, one) not in named]  # fmt: skip
        for folder, first, rows in (
            ("attn_int_swap", "attention_interface", crossed + sets), ("ffn_lsn_swap", "ffn_lsn_rich", crossed)
        ):  # fmt: skip
            self.swap(
                f"component-swap/{folder}", first, rows,
                lambda m, kind, layers: layer_costs[m, kind][list(layers)].sum() + self._nuisance(layers) / 2,
                list(ENDS)[:2], {"own": first, "n_layers": L},
            )  # fmt: skip

    def sets(self) -> list[tuple]:
        """Every second set of as many layers as the hub has."""
        return list(combinations(range(L), len(self.world.hub)))[::2]

    def _nuisance(self, layers) -> float:
        seams = sum((at in layers) != (at + 1 in layers) for at in range(L - 1))
        bow = self.world.bow * sum((2 * at / (L - 1) - 1) ** 2 for at in layers)
        return self.world.depth * sum(L - at for at in layers) / 4 + bow + self.world.seams * seams

    def swap(self, place: str, own: str, sets: list, cost, measures: list[str], facts: dict) -> None:
        """A controls.json: `cost(measure, component, layers)` is the share of the gain that a set loses."""
        rows = [{"name": "base", "layers": [], "values": {}}, {"name": "target", "layers": [], "values": {}}]
        for name, kind, layers in sets:
            rows.append({"name": name, "layers": list(layers), "values": {}} | ({"component": kind} if kind else {}))
        tensors = {}
        for measure in measures:
            base, target = ENDS[measure]
            means = [base, target, *(target - (target - base) * cost(measure, kind, one) for _, kind, one in sets)]
            common = 0.1 * abs(target - base) * self.rng.normal(size=UNITS)
            spread = 0.04 * abs(target - base) * self.rng.normal(size=(len(rows), UNITS))
            tensors[measure] = torch.tensor(np.array(means)[:, None] + common + spread)
            for row, value in zip(rows, tensors[measure].mean(1).tolist(), strict=True):
                row["values"][measure] = value
        models, payload = {"base": self.base, "target": self.run[-1]}, {"sets": rows, **facts}
        payload |= {"matched": {own: {"layers": []}}}
        self.write(
            f"{place}/controls.json", payload, "swap-controls", tensors, models=models, dtype="float32", **ROWS, **LANGS
        )

    # --- weights, arms, curves

    def of_run(self) -> dict:
        return {"base": self.base, "checkpoints": {str(ref["step"]): ref for ref in self.run}}

    def weights(self) -> None:
        d, grown = self.world.effect, 1 - np.exp(-np.array(STEPS) / 200)
        ratio = np.exp(0.08 * d + self.noise(0.08))
        pooled = {
            str(step): {"attention": 0.2 * g * ratio, "ffn": 0.2 * g} for step, g in zip(STEPS, grown, strict=True)
        }
        rows = {step: {name: {"attn": 1e-3, "ffn": 1e-3} for name in ("summary", "summary_mean")} for step in pooled}
        payload = {"checkpoints": rows, "pooled": pooled}
        self.write("weight-diff/attn_vs_ffn.json", payload, "attn_vs_ffn", models=self.of_run())
        ratio = np.exp(0.08 * d + self.noise(0.08))
        change = {
            str(step): {"interface_avg": 0.01 * g * ratio, "semantic_hub_avg": 0.01 * g}
            for step, g in zip(STEPS, grown, strict=True)
        }
        groups = {"interface": {"layers": self.world.interface}, "semantic_hub": {"layers": self.world.hub}}
        self.write(
            "weight-diff/int_and_sem.json", {"checkpoints": change}, "int_and_sem", models=self.of_run(), layers=groups
        )

    def arms(self) -> None:
        """The shares of the gain that arms reach; 1 sd is .1 of a difference, and .01 of the outer quarter's score."""
        d, start = self.world.effect, 0.6 if self.world.growth else 0.85
        what = {
            "hub_frozen": ("freeze", "hub", 0.1), "interface_frozen": ("freeze", "interface", -0.1),
            "interface_attention_frozen": ("freeze", "interface/attention", -0.1),
            "as_interface_frozen": ("freeze", "matched:interface:0", 0.1),
            "lsn_frozen": ("freeze", "lsn", 0.1), "outer": ("train_only", "outer:0.25", 0.0),
        }  # fmt: skip
        models: dict = {"base": {"values": {}}, "plain": {"values": {}}}
        for name, (key, value, _) in what.items():
            models[name] = {"what": {key: value}, "share_of_parameters": 0.5, "values": {}, "share": {}}
        tensors = {}
        for measure, (base, plain) in {**ENDS, "lsn_activation": (0.02, 0.06)}.items():
            means = [base, plain]
            for name, (*_, sign) in what.items():
                share = start + d * sign / 2 + float(self.noise(0.1 / 2**0.5))
                if name == "outer":
                    less = 0.03 - 0.01 * d + float(self.noise(0.01))
                    share = (plain * (1 + (less if plain < base else -less)) - base) / (plain - base)
                means.append(base + share * (plain - base))
                models[name]["share"][measure] = {"value": share, "ci_low": share - 0.05, "ci_high": share + 0.05}
            common = 0.1 * abs(plain - base) * self.rng.normal(size=UNITS)
            tensors[measure] = torch.tensor(np.array(means)[:, None] + common - common.mean())
            for row, value in zip(models.values(), tensors[measure].mean(1).tolist(), strict=True):
                row["values"][measure] = value
        roles = {"base": self.base, "plain": self.run[-1]}
        self.write("arms.json", {"models": models}, "arms", tensors, models=roles, dtype="float32", **ROWS, **LANGS)

    def curves(self) -> None:
        """Correlations over checkpoints, which decide nothing, between unrelated curves that saturate."""
        time = np.array(STEPS) / STEPS[-1]
        one, other, third = (1 - np.exp(-time / tau) for tau in self.rng.uniform(0.15, 0.6, 3))
        series = {"steps": STEPS, "attention": one, "gate": other, "abs_d": third}
        facts = {"models": self.of_run(), "language": "gle_Latn", "interface_layers": self.world.interface}
        place = "activation-correlation/made_correlation_strength.json"
        self.write(place, {"series": series}, "activation_correlation", **facts)
        values = {str(step): {"acc": 0.5 + a, "interface_avg": c} for step, a, c in zip(STEPS, one, other, strict=True)}
        payload = {"task": "sib200_gle_Latn", "metric": "acc", "values": values}
        self.write("downstream-correlation/correlation.json", payload, "downstream_correlation", models=self.of_run())

    def sweep(self) -> None:
        """The area under the gain kept from the input minus that from the output: with an effect of 1, 1 sd (.05) more
        for perception than for production."""
        (value,) = 0.05 * self.world.effect + self.noise(0.05, 1)
        row = {"value": value, "ci_low": value - 0.03, "ci_high": value + 0.03, "why": None}
        payload = {"specialisation": row, "specialisation_saved": row}
        payload["summary"] = {name: {"A": row} for name in ("perception", "production")}
        facts = {"models": {"base": self.base, "target": self.run[-1]}, "component": "all", "io": "cpt"}
        facts |= {"in_context": {"scored": SENTENCES}, "dtype": "float32", **ROWS, **LANGS}
        self.write("layer-ablation/sweep.json", payload, "ablation-sweep", **facts)

    def spectrum(self) -> None:
        """The share of the change in the singular values over a random change's: with an effect of 1, 1 sd (5 %) below
        its bound."""
        ratios = 0.8 * np.exp(-0.05 * self.world.effect + self.noise(0.05, 3))
        nulls = {kind: {"value_share": [0.02], "ratio": ratio} for kind, ratio in
                 zip(("gaussian", "permuted", "signs"), ratios.tolist(), strict=True)}  # fmt: skip
        row = {"value_share": 0.02 * float(ratios.mean()), "nulls": nulls, "effective_rank": 0.6}
        payload = {"matrices": [], "pooled": {str(step): row for step in STEPS}}
        self.write("spectral/spectrum.json", payload, "spectrum", models=self.of_run())

    def heads(self) -> None:
        """The share held by the most changed heads: with an effect of 1, 1 sd (5 %) above 1.2 times chance."""
        (share,) = 0.24 * np.exp(0.05 * self.world.effect + self.noise(0.05, 1))
        row = {"top_share": share, "permuted": {"mean": 0.2, "low": 0.19, "high": 0.21, "p_value": 0.5, "draws": 1000}}
        row |= {"in_proportion": 0.2, "even": 0.15, "gini": 0.1, "gini_permuted": 0.1}
        payload = {"heads": [], "steps": {str(step): {"concentration": row} for step in STEPS}}
        self.write("spectral/heads.json", payload, "heads", models=self.of_run())

    def rewinding(self) -> None:
        """How much more of the update least changed heads can put back than random ones (1 sd is .05), and how much
        better a checkpoint is with them put back (.001)."""
        more, loss, task = np.array([0.05, 1e-3, 1e-3]) * (self.world.effect + self.noise(1, 3))

        def row(value: float) -> dict:
            return {"value": value, "ci_low": value - 1e-3, "ci_high": value + 1e-3, "n": UNITS}

        both = {axis: row(more) | {"kept": row(more)} for axis in ("at", "energy")}
        best = {"nll_per_byte": row(loss), "task_accuracy": row(task)}
        payload = {"points": [{"curve": name} for name in ("importance", "random")], "best": {"importance": best}}
        payload |= {"largest": {"importance": {"nll_per_byte": both}}, "at_equal_energy": {"nll_per_byte": row(0.0)}}
        payload["best"]["random"] = best
        pairs = (("importance", "random"), ("importance:energy", "random:energy"))
        payload["beyond"] = {name: {null: {"nll_per_byte": both}} for name, null in pairs}
        self.write("spectral/rewind.json", payload, "rewind", **self.of_pair())

    def truncation(self) -> None:
        """How much more of the update can be cut off than if it were random: with an effect of 1, 1 sd (.05)."""
        (value,) = 0.05 * self.world.effect + self.noise(0.05, 1)
        row = {"value": value, "ci_low": value - 0.04, "ci_high": value + 0.04}
        of_loss = {"nll_per_byte": {"at": row | {"kept": row}}}
        payload = {"largest": {"svd": of_loss}, "beyond": {"svd": {"as_random": of_loss}}, "parameters": 8e5}
        payload |= {"at_equal_energy": {"nll_per_byte": 0.0}, "by": "matrix", "embeddings": False}
        self.write("spectral/truncate.json", payload, "truncate", **self.of_pair())

    def connection(self) -> None:
        """The barrier between two runs as a share of the gain: with an effect of 1, 1 sd (.02) below its bound."""
        (value,) = 0.1 - 0.02 * self.world.effect + self.noise(0.02, 1)
        row = {"value": value, "ci_low": value - 0.01, "ci_high": value + 0.01}
        measures = {"nll_per_byte": {key: row | {"share": row} for key in ("barrier", "random")} | {"apart": row}}
        payload = {"two_runs": True, "measures": measures, "worst": row | {"measure": "nll_per_byte"}}
        payload["distance"] = {"all": {"distance": 0.1, "cosine": 0.5}}
        self.write("spectral/connect.json", payload, "connect", **self.of_pair())

    def of_pair(self) -> dict:
        return {"models": {"base": self.base, "target": self.run[-1]}, "dtype": "float32", **ROWS, **LANGS}


# ---------------------------------------------------------------- the rates


def judged(folder: Path, world: World, number: int, made: dict, counts=SEEDS) -> dict[int, dict[str, verdicts.Verdict]]:
    """The verdicts on study `number` of a world, by the first 5, 8 and 12 of its seeds (`counts`)."""
    for seed in range(max(counts)):
        key = sum(map(ord, world.name)), number, seed
        Made(folder, world, seed).all(np.random.default_rng(key))
    runs = claims.read_seeds(folder / "study.yaml", list(range(max(counts))), made, draws=0)
    return {n: claims.over_seeds(made, dict(list(runs.items())[:n])) for n in counts}


def rates(worlds: list[World], studies: int, counts=SEEDS) -> list[list[str]]:
    """A row for each world and number of seeds: how many studies decide any claim of a letter (which share a Holm
    correction) falsely, and how often each claim is decided.

    In worlds where no claim is true or false, any decision is false.
    """
    made, rows = claims.claims(), []
    letters = sorted({name[0] for name in made})
    # Draw the resamples of a seed once for all studies.
    stats.resample_weights = functools.cache(stats.resample_weights.__wrapped__)
    for world in worlds:
        right = verdicts.YES if world.effect > 0 else verdicts.NO if world.effect < 0 else None
        n_studies = studies if right is None else -(-studies // 2)
        decided, false = {n: Counter() for n in counts}, Counter()
        with tempfile.TemporaryDirectory() as folder:
            for number in range(n_studies):
                for n, said in judged(Path(folder), world, number, made, counts).items():
                    decisions = [name for name, v in said.items() if v.verdict in (verdicts.YES, verdicts.NO)]
                    wrong = [name for name in decisions if said[name].verdict != right]
                    false.update((n, letter) for letter in {name[0] for name in wrong})
                    decided[n].update(decisions)
        for n in counts:
            share = [f"{100 * decided[n][name] / n_studies:.0f}" for name in made]
            wrong = [f"{100 * false[n, letter] / n_studies:.1f}" for letter in letters]
            rows.append([world.name, str(n_studies), str(n), *wrong, *share])
            cli.say(" | ".join(rows[-1]))
    return rows


def table(rows: list[list[str]]) -> str:
    names = list(claims.claims())
    false = [f"false {letter}" for letter in sorted({name[0] for name in names})]
    heads = ["world", "studies", "seeds", *false, *names]
    words = "In %: *false* is the share of studies with any false decision on claims of that letter; below a claim "
    words += "stands how often it is decided."
    return f"{words}\n\n{results.markdown(heads, rows)}"


def build_parser():
    p = cli.parser(__doc__)
    text = "studies of each world, half as many if it has an effect; default 200"
    p.add_argument("--studies", type=cli.positive, default=200, metavar="N", help=text)
    p.add_argument("--worlds", nargs="+", metavar="W", help="only these worlds, and print the table; default: all")
    p.add_argument("--output", metavar="FILE", default=str(README), help="Markdown with the marks; default: the README")
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    worlds = [world for world in WORLDS if not args.worlds or world.name in args.worlds]
    made = table(rates(worlds, args.studies))
    if args.worlds:
        cli.say(made)
        return
    before, after = (re.escape(mark) for mark in MARKS)
    text = Path(args.output).read_text(encoding="utf-8")
    pattern = re.compile(f"(?<={before}\n).*?(?={after})", re.S)
    results.write_text(args.output, pattern.sub(lambda _: f"\n{made}\n", text))
    cli.say(f"wrote the table to {args.output}")


if __name__ == "__main__":
    cli.run(main)
