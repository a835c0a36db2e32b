"""Mean activation of a language's neurons over continued pre-training, against a random control (step 9).

The mean over tokens and masked neurons of act(W_gate x), on the first 100,000 tokens of the language cut to whole blocks
(an expert's neuron: over the tokens routed to it). Language mask and control mask are read in the same forward passes.

In:   --model a model or a run (default: the study's run, and its base), --id_path token ids of lsn/load_oscar.py,
      --mask_file and --control-mask of lsn/identify.py, --lang (all default to the study's).
Out:  in --save_folder: for a run <name>/checkpoint-<step>.<lang>.<tokens>.json and with the control mask
      <name>/checkpoint-<step>-r.<lang>.<tokens>.json; for the base <base-tag>/<lang>.<tokens>.json and r.<lang>..;
      for a single model <name>.<lang>.<tokens>.json and <name>-r... Each holds `all_layers` and `layers`. A figure over
      steps. Called like the published script (controls as --mask_file, --name checkpoint-100-r), it writes the same files.

Finished files are kept. On several GPUs: accelerate launch lsn/lsn_activation_cpt.py ...; each process reads some blocks.

Full: python lsn/lsn_activation_cpt.py --model runs/eus --id_path oscar_ids/oscar.eu.train.llama --type llama --save_folder lsn_activation --name llama-eus --mask_file result/llama.json --lang eu
Tiny: python lsn/lsn_activation_cpt.py --study demo/tiny.yaml --tokens 2000
"""  # noqa: E501

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cpt_utils.architectures import archs
from cpt_utils.architectures.arch_parts import Neurons
from cpt_utils.base import cli, figures, languages, processes, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch
from cpt_utils.base.study import Study, dotted
from cpt_utils.checkpoints import beside, opening, refs, relatives
from cpt_utils.measures import activation_files, masks
from cpt_utils.measures.masks import Layers
from cpt_utils.models import ffn, loading

counting = cli.sibling("lsn/activation.py")
outputs = cli.sibling("lsn/lsn_activation_files.py")

SCHEMA = "lsn-activation"
RESULTS = {"lsn_activation": "lsn/lsn_activation"}
ASKED = {"lsn_activation": "Do the new language's neurons become more active over training?"}
CAPTIONS = {
    "lsn_activation": """Part II: 3. Activation over CPT
        The mean activation of the new language's neurons on its text over training, and that of random neurons of the
        same layers. The correlation below uses the change of their difference from the base.""",
}
IMAGES = {"lsn_activation": "{name}.png"}
TOKENS = 100_000


# ---------------------------------------------------------------- the method


class Activations:
    """Sums of the activations of masked neurons over tokens, for several masks in the same forward passes.

    The mean of a neuron is over all tokens; that of an expert's neuron is over the tokens routed to this expert, and
    zero if there are none. The mean of a mask is the mean of its neurons' means.

    Attributes:
        sums: mask name -> layer -> float64 [its neurons], summed over `tokens` tokens.
        routed: layer -> int64 [experts], the tokens routed to each; layers with experts only.
    """

    def __init__(self, model: torch.nn.Module, arch: archs.Arch, masks: Mapping[str, Layers]):
        self.tokens = 0
        self.index = {
            name: {layer: torch.tensor(list(neurons)) for layer, neurons in mask.items() if len(neurons)}
            for name, mask in masks.items()
        }
        self.sums = {
            name: {layer: torch.zeros(len(index), dtype=torch.float64) for layer, index in mask.items()}
            for name, mask in self.index.items()
        }
        self.layers = sorted({layer for mask in self.index.values() for layer in mask})
        self.reader = ffn.Reader(model, arch, self.layers)
        # All masks' neurons of a layer, one mask after the other; copied to a device once, not in every pass.
        self.all_of = {
            layer: functools.cache(torch.cat([mask[layer] for mask in self.index.values() if layer in mask]).to)
            for layer in self.layers
        }
        self.of_experts = {
            layer: group for layer, groups in self.reader.groups.items() for group in groups if group.experts
        }
        self.routed = {layer: torch.zeros(g.experts, dtype=torch.long) for layer, g in self.of_experts.items()}

    def add(self, ids: torch.Tensor) -> None:
        """Add the blocks `ids` [batch, size].

        Raises:
            InputError: activations that are NaN or infinite.
        """
        added: dict[int, torch.Tensor] = {}
        routed: dict[int, torch.Tensor] = {}

        def read(layer: int, group: Neurons, value: torch.Tensor, experts: torch.Tensor | None) -> None:
            index = self.all_of[layer](value.device)
            flat = value.reshape(-1, value.shape[-1])
            if experts is None:
                masked = flat.index_select(1, (index - group.first).clamp(0, group.width - 1))
            else:
                masked = flat.index_select(1, index % group.width)
                masked = masked.masked_fill_(experts[:, None] != index // group.width, 0)
                numbers = torch.arange(group.experts, device=experts.device)
                routed[layer] = routed.get(layer, 0) + (experts == numbers[:, None]).sum(1)
            masked = masked.sum(0, dtype=torch.float64)
            if len(self.reader.groups[layer]) > 1:  # neurons of the layer's other group are read in another call
                masked = masked.masked_fill((index < group.first) | (index >= group.stop), 0)
            added[layer] = added.get(layer, 0) + masked

        if self.layers:
            self.reader.run(ids, read)
        for layer, sums in added.items():
            sums = sums.cpu()
            if not bool(torch.isfinite(sums).all()):
                raise InputError("activations are not finite; try --dtype float32, or check the weights")
            here = [mask for mask in self.sums.values() if layer in mask]
            for mask, part in zip(here, sums.split([len(mask[layer]) for mask in here]), strict=True):
                mask[layer] += part
        for layer, tokens in routed.items():
            self.routed[layer] += tokens.cpu()
        self.tokens += ids.numel()

    def include(self, others: Iterable[tuple]) -> None:
        """Add the sums of other processes, their `state()`."""
        for sums, routed, tokens in others:
            for name, mask in sums.items():
                for layer, part in mask.items():
                    self.sums[name][layer] += part
            for layer, part in routed.items():
                self.routed[layer] += part
            self.tokens += tokens

    def state(self) -> tuple:
        """Everything that adds up: sums, tokens routed, tokens."""
        return self.sums, self.routed, self.tokens

    def _per_token(self, name: str) -> dict[int, torch.Tensor]:
        """By layer, the neurons' means times `tokens`; for those that see every token, the sums themselves."""
        scaled = {}
        for layer, sums in self.sums[name].items():
            if layer in self.routed:
                group, index = self.of_experts[layer], self.index[name][layer]
                tokens = self.routed[layer][(index // group.width).clamp(max=group.experts - 1)].clamp(min=1)
                sums = torch.where(index < group.stop, sums * self.tokens / tokens, sums)
            scaled[layer] = sums
        return scaled

    def mean(self, name: str) -> float | None:
        """The mean over tokens and neurons of a mask; None for a mask without neurons."""
        sums = self._per_token(name)
        neurons = sum(map(len, sums.values()))
        return float(sum(s.sum() for s in sums.values())) / (neurons * self.tokens) if neurons else None

    def layer_means(self, name: str) -> dict[int, float]:
        """The same by layer, for the layers in which the mask has neurons."""
        return {layer: float(s.mean()) / self.tokens for layer, s in self._per_token(name).items()}


def measure(model, arch, blocks, followed: dict[str, Layers], batch_size: int, process: processes.Process):
    """Mean activations of the masks `followed` on `blocks` [blocks, size]: the same `Activations` in every process."""
    local, total = (Activations(model, arch, followed) for _ in range(2))
    for batch in cli.progress(process.share(blocks.split(batch_size)), "activation", unit="batch"):
        local.add(batch)
    total.include(process.gather([local.state()]))
    return total


# ---------------------------------------------------------------- files


def payload(found, mask: str) -> dict:
    """The content of a result file, without its header."""
    return {
        "all_layers": found.mean(mask),
        "layers": {str(layer): mean for layer, mean in sorted(found.layer_means(mask).items())},
        "n_neurons": sum(len(sums) for sums in found.sums[mask].values()),
        "n_tokens": found.tokens,
    }


def draw(path: Path, means: dict[str, dict[int, float]], lang: str, n_neurons: int, n_tokens: int) -> None:
    """Mean activation over training steps, the base as step 0: the language's neurons, the control, their difference.

    Args:
        means: "language" and, where there is one, "control" -> step -> mean activation.
    """
    steps = sorted(means["language"])
    looks = {
        "language": (figures.colour("target"), "o", "-", f"its own neurons (n = {n_neurons})"),
        "control": (figures.colour("random"), "s", "--", "random control, as many per layer"),
    }
    with figures.style() as plt:
        fig, axis = plt.subplots(figsize=(figures.COLUMN, 2.2))
        for mask, (shade, marker, line, label) in looks.items():
            if mask in means:
                axis.plot(steps, [means[mask][s] for s in steps], line, color=shade, marker=marker, label=label)
        axis.axhline(0, color="#bbbbbb", linewidth=0.6)
        axis.set_xlabel("training step (0 = base)" if 0 in steps else "training step")
        axis.set_ylabel("mean activation")
        axis.set_title(f"{figures.language(lang)}, {n_tokens:,} tokens")
        axis.legend(loc="best")
        figures.save(fig, path)


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("-m", "--model", metavar="M", help="model, or run of checkpoints; default: the study's run, and its base")
    add("--base-model", "--base", metavar="B", help="base, measured with a run; default: the study's")
    add("--run", metavar="RUN", nargs="+", help="run of checkpoints; with --model, the run that the mask is of")
    add("--base-tag", metavar="TAG", help="folder of the base's results; default base")
    add("-i", "--id_path", metavar="IDS", help="file of token ids; default: the study's, of --lang")
    text = "blocks of 4096 (llama) or 2048 tokens; default: from the model"
    add("-t", "--type", choices=("llama", "qwen"), help=text)
    text = "folder for results; default: the study's lsn/lsn_activation"
    add("-s", "--save_folder", "-o", "--output", metavar="F", help=text)
    text = "name of the run's folder or of a single model's files; default: the study's name, or the model's"
    add("-n", "--name", metavar="NAME", help=text)
    text = "neurons by language (lsn/identify.py), or their random control alone; default: the study's"
    add("-f", "--mask_file", metavar="MASK", help=text)
    add("--control-mask", metavar="MASK", help="random control; default: MASK with .control.json, if it exists")
    add("-l", "--lang", metavar="LANG", help="language; default: the study's languages.target")
    add("--tokens", type=cli.positive, default=TOKENS, metavar="N", help=f"tokens; default {TOKENS:,}")
    add("--block-size", type=cli.positive, metavar="N", help="tokens per block; default: that of --type")
    cli.add_run_flags(p, drop=True)
    cli.add_forward_flags(p, batch_size=None, device_map=True)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed, args.arm)
    target = study.value(args.model or args.run, "--model", "run")
    # A study's run may be a single checkpoint; a checkpoint given as --model is a single model.
    is_run = args.model is None or refs.is_run(target)
    models = refs.run(target, args.steps) if is_run else [refs.model(target)]
    opening.look_over(models)
    base = args.base_model or (study.get("base") if is_run else None)
    lang = str(study.value(args.lang, "--lang", "languages.target"))
    folder = study.output(args.save_folder, "--save_folder", "lsn_activation")
    name, base_tag = outputs.names_of(args, study, models, is_run)
    ids = args.id_path or counting.id_file(study, lang)
    files = outputs.mask_files(args, study, not is_run and activation_files.is_control_name(name))
    if is_run and base is None:
        cli.warn("the base, which step 10 needs, is not measured: give --base-model, or the study key base")

    todo = [(ref, outputs.files_of(ref, folder, name, lang, None, is_run)) for ref in models]
    if base is not None:
        todo.insert(0, (refs.model(base), outputs.files_of(refs.model(base), folder, name, lang, base_tag, is_run)))
    process, dtype = processes.from_arguments(args, study)
    chosen = masks_of(todo, lang, files, study, args)
    todo = jobs(args, study, todo, Path(ids), chosen, dtype, process.device)
    process.wait()  # no process may see a result that another is about to write
    means = measure_all(todo, chosen, process, args.drop_revisions)
    if len(todo) > 1 and "language" in means and process.is_main:
        variant = beside.name(study, steps=args.steps, limit=args.limit)  # the study's figure shows the whole run
        figure = folder / dotted(name, variant)
        draw(figure, means, lang, sum(map(len, chosen.layers["language"].values())), todo[0].blocks.numel())
        cli.say(f"wrote {figure}.pdf and .png")


@dataclass(frozen=True)
class Masks:
    """The masks to follow, "language" and perhaps "control": their files and neurons, and the width of each layer."""

    lang: str
    files: dict[str, Path]
    layers: dict[str, Layers]
    widths: list[int]


@dataclass(frozen=True)
class Job:
    """One model on `blocks` [blocks, size]: the request of each mask's result, and the masks `left` to be measured."""

    ref: refs.ModelRef
    files: outputs.Files
    blocks: torch.Tensor
    requests: dict[str, dict]  # by mask
    left: list[str]
    ids: Path
    dtype: torch.dtype
    batch_size: int

    @property
    def step(self) -> int:
        """A base may have a step in its own name (stage1-step1907359); in this run it is step 0."""
        return 0 if self.files.is_base else self.ref.step or 0

    def paths(self, mask: str) -> list[Path]:
        return self.files.of(mask, self.blocks.numel())

    def is_finished(self, mask: str) -> bool:
        """Whether its result exists; InputError if it, or the file of the earlier name, is of another request."""
        paths = self.paths(mask)
        finished = [results.finished(path, SCHEMA, self.requests[mask], "another --name") for path in paths]
        return any(finished)

    def write(self, mask: str, content: dict, header: dict) -> None:
        path, *earlier = self.paths(mask)
        results.write_json(path, content, header)
        for older in earlier:
            older.unlink(missing_ok=True)

    def mean(self, mask: str) -> float:
        path = next(path for path in self.paths(mask) if path.exists())
        return results.read_json(path, SCHEMA, allow_limited=True)[0]["all_layers"]


def masks_of(todo: list, lang: str, files: dict[str, Path], study: Study, args) -> Masks:
    """The neurons to follow in the models of `todo`, which must all have them.

    Raises:
        InputError: the models differ in size, or the masks are not theirs.
    """
    all_widths = [ffn.widths(archs.for_config(ref.config()), ref.config()) for ref, _ in todo]
    widths = all_widths[0]
    for (ref, _), of_model in zip(todo, all_widths, strict=True):
        if of_model != widths:
            raise InputError(f"{ref.spec} has other layers or neurons than {todo[0][0].spec}: the mask fits only one")
    described = relatives.of([ref for ref, _ in todo], study.get("base"), args.run or study.get("run"))
    given = (files.get(mask) for mask in ("language", "control"))
    hint = "give its mask; of a base, name the run that it belongs to with --run (study key run)"
    both = masks.read_both(*given, lang, len(widths), widths, described, hint)
    layers = dict(zip(("language", "control"), both, strict=True))
    return Masks(lang, files, {mask: layers[mask] for mask in files}, widths)


def jobs(args, study: Study, todo: list, ids: Path, chosen: Masks, dtype, device: torch.device) -> list[Job]:
    """A job for each model; everything is checked before the first model is loaded."""
    size = ffn.block_size(todo[0][0].config(), args.type, args.block_size or study.get("lsn.block_size"))
    made = []
    for ref, names in todo:
        blocks, facts = counting.read(ids, ref, study.get("run"), size, args.tokens, args.limit)
        facts = counting.request_of(ref, facts, size, args.batch_size, dtype, device)
        requests = {mask: facts | {"mask": layers} for mask, layers in chosen.layers.items()}
        job = Job(ref, names, blocks, requests, [], ids, dtype, facts["batch_size"])
        job.left.extend(mask for mask in requests if args.overwrite or not job.is_finished(mask))
        made.append(job)
    return made


def measure_all(
    todo: list[Job], chosen: Masks, process: processes.Process, drop: bool = False
) -> dict[str, dict[int, float]]:
    """Measure what is left, one model after the other; returns the means by mask and step, in the first process only.

    `drop`: delete downloaded weights of a checkpoint when it is done.
    """
    means: dict[str, dict[int, float]] = {mask: {} for mask in chosen.layers}
    to_load = [job.ref for job in todo if job.left]
    for job in todo:
        if job.left:
            model = loading.load_model(job.ref, job.dtype, process.device, process.device_map)
            to_load.pop(0)
            if to_load and process.is_main and not drop:
                loading.prefetch(to_load[0])  # read while this one computes
            followed = {mask: chosen.layers[mask] for mask in job.left}
            found = measure(model, archs.for_config(job.ref.config()), job.blocks, followed, job.batch_size, process)
            del model
            if drop and not job.files.is_base:
                job.ref.drop()
            for mask in job.left if process.is_main else []:
                job.write(mask, payload(found, mask), header(job, mask, chosen))
        if process.is_main:
            for mask in chosen.layers:
                means[mask][job.step] = job.mean(mask)
            shown = ", ".join(f"{mask} {values[job.step]:.4f}" for mask, values in means.items())
            cli.say(f"{job.ref.spec}: mean activation {shown}{'' if job.left else ' (finished before)'}")
    return means


def header(job: Job, mask: str, chosen: Masks) -> dict:
    facts = counting.header_facts(job.requests[mask], job.ids)
    facts |= {"n_layers": len(chosen.widths), "ffn_width": max(chosen.widths), "step": job.step}
    facts |= {"language": languages.canonical(chosen.lang, any_tag=True), "control": mask == "control"}
    facts |= {"mask": chosen.files[mask], "block_size": job.requests[mask]["block_size"]}
    return results.header(SCHEMA, models={"model": job.ref.describe()}, **facts)


if __name__ == "__main__":
    cli.run(main)
