"""How strongly the neurons of a language fire over continued pre-training: mean activation, against a random control (step 9).

The mean over tokens and masked neurons of act(W_gate x), on the first 100,000 tokens of the language cut to whole blocks
(an expert's neuron: over the tokens routed to it). Language mask and control mask are read in the same forward passes.

In:   --model a model or a run (default: the study's run, and its base), --id_path token ids of lsn/load_oscar.py,
      --mask_file and --control-mask of lsn/identify.py, --lang (all default to the study's).
Out:  in --save_folder: for a run <name>/checkpoint-<step>.<lang>.<tokens>.json and with the control mask
      <name>/r.checkpoint-<step>.<lang>.<tokens>.json; for the base <base-tag>/<lang>.<tokens>.json and r.<lang>..;
      for a single model <name>.<lang>.<tokens>.json. Each holds `all_layers` and `layers`. A figure over steps.

Finished files are kept. On several GPUs: accelerate launch lsn/lsn_activation_cpt.py ...; each process reads some blocks.

Full: python lsn/lsn_activation_cpt.py --model runs/eus --id_path oscar_ids/oscar.eu.train.llama --type llama --save_folder lsn_activation --name llama-eus --mask_file result/llama.json --lang eu
Tiny: python lsn/lsn_activation_cpt.py --study demo/tiny.yaml --tokens 2000
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_utils import cli, figures, processes, refs, results
from cpt_utils.errors import InputError
from cpt_utils.masks import Layers, control_beside, read_both
from cpt_utils.study import Study

if TYPE_CHECKING:
    import torch

SCHEMA = "lsn-activation"
TOKENS = 100_000
PREFIX = {"language": "", "control": "r."}


# ---------------------------------------------------------------- the method


def measure(model, arch, blocks, masks: dict[str, Layers], batch_size: int, process: processes.Process):
    """Mean activations of every mask on `blocks` [blocks, size], each process its part: a `neurons.Activations`."""
    from cpt_utils import neurons

    own, found = (neurons.Activations(model, arch, masks) for _ in range(2))
    for part in process.share(blocks.split(batch_size)):
        own.add(part)
    found.include(process.gather([own.state()]))
    return found


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class Place:
    """Where the results of one model go."""

    folder: Path
    stem: str  # what stands in front of <tokens>.json
    is_base: bool = False

    def file(self, mask: str, tokens: int) -> Path:
        return self.folder / f"{PREFIX[mask]}{self.stem}.{tokens}.json"


def place_of(ref: refs.ModelRef, folder: Path, name: str, lang: str, base_tag: str | None, is_run: bool) -> Place:
    if base_tag is not None:
        return Place(folder / base_tag, lang, is_base=True)
    if is_run:
        return Place(folder / name, f"checkpoint-{ref.step}.{lang}")
    return Place(folder, f"{name}.{lang}")


def payload(found, mask: str) -> dict:
    """What a result file holds, beside its header."""
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
        "language": (figures.colour("target"), "o", "-", f"neurons of {lang} (n = {n_neurons})"),
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
        axis.set_title(f"{n_tokens:,} tokens of {lang}")
        axis.legend(loc="best")
        figures.save(fig, path)


# ---------------------------------------------------------------- the command


def build_parser():
    p = cli.parser(__doc__)
    p.add_argument("--model", metavar="M", help="model, or run of checkpoints; default: the study's run, and its base")
    p.add_argument("--base-model", metavar="B", help="base, measured with a run; default: the study's")
    p.add_argument("--run", metavar="RUN", help="run that the mask is of, where only another model is measured")
    p.add_argument("--base-tag", default="base", metavar="TAG", help="folder of the base's results; default base")
    p.add_argument("--id_path", metavar="IDS", help="file of token ids; default: the study's, of --lang")
    p.add_argument(
        "--type", choices=("llama", "qwen"), help="blocks of 4096 (llama) or 2048 tokens; default: from the model"
    )
    p.add_argument("--save_folder", metavar="F", help="where results go; default: the study's lsn/lsn_activation")
    p.add_argument("--name", metavar="NAME", help="of the model or run in the files' names; default: the study's name")
    p.add_argument("--mask_file", metavar="MASK", help="neurons by language (lsn/identify.py); default: the study's")
    p.add_argument(
        "--control-mask", metavar="MASK", help="random control; default: MASK with .control.json, if it is there"
    )
    p.add_argument("--lang", metavar="LANG", help="language; default: the study's languages.target")
    p.add_argument("--tokens", type=cli.positive, default=TOKENS, metavar="N", help=f"tokens; default {TOKENS:,}")
    p.add_argument("--block-size", type=cli.positive, metavar="N", help="tokens a block; default: that of --type")
    cli.add_run_flags(p, drop=True)
    cli.add_forward_flags(p, batch_size=None, device_map=True)
    return p


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    study = Study.find(args.study, args.seed)
    target = study.value(args.model, "--model", "run")
    # A study's run may be a single checkpoint; what --model names as one is one.
    is_run = args.model is None or refs.is_run(target)
    models = refs.run(target, args.steps) if is_run else [refs.model(target)]
    base = args.base_model or (study.get("base") if is_run else None)
    lang = str(study.value(args.lang, "--lang", "languages.target"))
    folder = study.output(args.save_folder, "--save_folder", "lsn_activation")
    name = args.name or (study.name if study else None)
    if name is None:
        raise InputError("nothing says how the results are called: give --name NAME, or run inside a study")
    ids = args.id_path or id_file(study, lang)
    mask_file = study.input(args.mask_file, "--mask_file", "lsn_mask", "lsn/identify.py")
    control_file = Path(args.control_mask) if args.control_mask else control_beside(mask_file)
    if control_file is None:
        cli.warn(f"no random control: there is none beside {mask_file}, and --control-mask is not given")
    if is_run and base is None:
        cli.warn("the base is not measured: give --base-model (activation-correlation.py needs it)")

    todo = [(ref, place_of(ref, folder, name, lang, None, is_run)) for ref in models]
    if base is not None:
        todo.insert(0, (refs.model(base), place_of(refs.model(base), folder, name, lang, args.base_tag, is_run)))
    process = processes.Process(args.device, args.device_map)
    masks = masks_of(todo, lang, mask_file, control_file, study, args)
    todo = jobs(args, study, todo, Path(ids), masks, process.device)
    process.wait()  # no process may see a result that another is about to write
    means = measure_all(todo, masks, process, args.drop_revisions)
    if len(todo) > 1 and process.is_main:
        draw(folder / name, means, lang, sum(map(len, masks.layers["language"].values())), todo[0].blocks.numel())
        cli.say(f"wrote {folder / name}.pdf and .png")


@dataclass(frozen=True)
class Masks:
    """The masks to follow, "language" and perhaps "control": their files and neurons, and the width of each layer."""

    lang: str
    files: dict[str, Path]
    layers: dict[str, Layers]
    widths: list[int]


@dataclass(frozen=True)
class Job:
    """One model on the blocks `blocks` [blocks, size]: what its results answer, and which are `left` to be measured."""

    ref: refs.ModelRef
    place: Place
    blocks: torch.Tensor
    requests: dict[str, dict]  # by mask
    left: list[str]
    ids: Path
    dtype: torch.dtype
    batch_size: int

    @property
    def step(self) -> int:
        """A base may have a step in its own name (stage1-step1907359); in this run it is step 0."""
        return 0 if self.place.is_base else self.ref.step or 0

    def path(self, mask: str) -> Path:
        return self.place.file(mask, self.blocks.numel())


def id_file(study: Study, lang: str) -> Path:
    """The study's token ids of a language."""
    from cpt_utils import languages, tokenids

    folder = Path(study.value(None, "--id_path", "tokens"))
    codes = [str(code) for code in study.get("languages.lsn", [])]
    spelled = languages.find(codes, lang, default=lang)  # the file's name has the study's spelling
    return folder / tokenids.file_name(spelled, study.name)


def masks_of(todo: list, lang: str, mask_file: Path, control_file: Path | None, study: Study, args) -> Masks:
    """The neurons to follow in the models of `todo`, which must all have them.

    Raises:
        InputError: models of different sizes, or masks that do not belong to them.
    """
    from cpt_utils import archs, neurons

    widths = [neurons.widths(archs.for_config(ref.config()), ref.config()) for ref, _ in todo]
    for (ref, _), theirs in zip(todo, widths, strict=True):
        if theirs != widths[0]:
            raise InputError(f"{ref.spec} has other layers or neurons than {todo[0][0].spec}: the mask fits only one")
    described = refs.relatives([ref for ref, _ in todo], study.get("base"), args.run or study.get("run"))
    own, control = read_both(mask_file, control_file, lang, len(widths[0]), widths[0], described)
    found = {"language": (mask_file, own)} | ({"control": (control_file, control)} if control else {})
    return Masks(
        lang=lang,
        files={mask: file for mask, (file, _) in found.items()},
        layers={mask: layers for mask, (_, layers) in found.items()},
        widths=widths[0],
    )


def jobs(args, study: Study, todo: list, ids: Path, masks: Masks, device: torch.device) -> list[Job]:
    """Everything there is to measure; all is checked before the first model is loaded."""
    from cpt_utils import neurons

    counting = cli.sibling("lsn/activation.py")
    dtype = cli.dtype(study.value(args.dtype, "--dtype", "dtype", None), device)
    run = study.get("run") if isinstance(study.get("run"), str) else None
    size = neurons.block_size(todo[0][0].config(), args.type, args.block_size or study.get("lsn.block_size"))
    batch_size = neurons.batch_size(args.batch_size, size)
    found = []
    for ref, place in todo:
        blocks, facts = counting.read(ids, ref, run, size, args.tokens, args.limit)
        facts = {
            "model": ref.describe(), "ids": facts, "block_size": size, "batch_size": batch_size, "dtype": str(dtype),
            "device": device.type,
        }  # fmt: skip
        requests = {mask: facts | {"mask": layers} for mask, layers in masks.layers.items()}
        job = Job(ref, place, blocks, requests, [], ids, dtype, batch_size)
        for mask, request in job.requests.items():
            if args.overwrite or not results.made_by(job.path(mask), SCHEMA, request, "another --name"):
                job.left.append(mask)
        found.append(job)
    return found


def measure_all(
    todo: list[Job], masks: Masks, process: processes.Process, drop: bool = False
) -> dict[str, dict[int, float]]:
    """Measure what is left, one model after the other; the means by mask and step, in the first process.

    `drop`: weights of a checkpoint on the hub go from the disk when it is done.
    """
    from cpt_utils import archs, models

    means: dict[str, dict[int, float]] = {mask: {} for mask in masks.layers}
    following = [job.ref for job in todo if job.left]
    for job in todo:
        if job.left:
            model = models.load_model(job.ref, job.dtype, process.device, process.device_map)
            following.pop(0)
            if following and process.is_main and not drop:
                models.prefetch(following[0])  # read while this one computes
            chosen = {mask: masks.layers[mask] for mask in job.left}
            found = measure(model, archs.for_config(job.ref.config()), job.blocks, chosen, job.batch_size, process)
            del model
            if drop and not job.place.is_base:
                job.ref.drop()
            for mask in job.left if process.is_main else []:
                results.write_json(job.path(mask), payload(found, mask), header(job, mask, masks))
        if process.is_main:
            for mask in masks.layers:
                means[mask][job.step] = results.read_json(job.path(mask), SCHEMA, allow_limited=True)[0]["all_layers"]
            shown = ", ".join(f"{mask} {values[job.step]:.4f}" for mask, values in means.items())
            cli.say(f"{job.ref.spec}: mean activation {shown}{'' if job.left else ' (finished before)'}")
    return means


def header(job: Job, mask: str, masks: Masks) -> dict:
    from cpt_utils import languages

    request = job.requests[mask]
    return results.header(
        SCHEMA,
        models={"model": job.ref.describe()},
        step=job.step,
        n_layers=len(masks.widths),
        ffn_width=max(masks.widths),
        language=languages.canonical(masks.lang, any_tag=True),
        control=mask == "control",
        mask=masks.files[mask],
        tokens={"file": job.ids, **request["ids"]},
        block_size=request["block_size"],
        limit=request["ids"]["limit"],
        dtype=request["dtype"].removeprefix("torch."),
        device=request["device"],
        request=request,
    )


if __name__ == "__main__":
    cli.run(main)
