"""How strongly the neurons of a language fire over continued pre-training: mean activation, against a random control (step 9).

The mean over tokens and masked neurons of act(W_gate x), on the first 100,000 tokens of the language cut to whole blocks
(an expert's neuron: over the tokens routed to it). Language mask and control mask are read in the same forward passes.

In:   --model a model or a run (default: the study's run, and its base), --id_path token ids of lsn/load_oscar.py,
      --mask_file and --control-mask of lsn/identify.py, --lang (all default to the study's).
Out:  in --save_folder: for a run <name>/checkpoint-<step>.<lang>.<tokens>.json and with the control mask
      <name>/checkpoint-<step>-r.<lang>.<tokens>.json; for the base <base-tag>/<lang>.<tokens>.json and r.<lang>..;
      for a single model <name>.<lang>.<tokens>.json and <name>-r... Each holds `all_layers` and `layers`. A figure over
      steps. As the published script was called, a checkpoint at a time and once more with the random mask as --mask_file
      and --name checkpoint-100-r, it writes the same files.

Finished files are kept. On several GPUs: accelerate launch lsn/lsn_activation_cpt.py ...; each process reads some blocks.

Full: python lsn/lsn_activation_cpt.py --model runs/eus --id_path oscar_ids/oscar.eu.train.llama --type llama --save_folder lsn_activation --name llama-eus --mask_file result/llama.json --lang eu
Tiny: python lsn/lsn_activation_cpt.py --study demo/tiny.yaml --tokens 2000
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_utils.base import cli, figures, processes, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study, dotted
from cpt_utils.checkpoints import beside, opening, refs
from cpt_utils.measures import activation_files, masks
from cpt_utils.measures.masks import Layers

if TYPE_CHECKING:
    import torch

SCHEMA = "lsn-activation"
TOKENS = 100_000


# ---------------------------------------------------------------- the method


def measure(model, arch, blocks, followed: dict[str, Layers], batch_size: int, process: processes.Process):
    """Mean activations of the masks `followed` on `blocks` [blocks, size]: `neurons.Activations`, in every process."""
    from cpt_utils.measures import neurons

    own, found = (neurons.Activations(model, arch, followed) for _ in range(2))
    for part in process.share(blocks.split(batch_size)):
        own.add(part)
    found.include(process.gather([own.state()]))
    return found


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class Place:
    """Where the results of one model go: see `activation_files`."""

    folder: Path
    stem: str
    lang: str
    is_base: bool = False

    def file(self, mask: str, tokens: int) -> Path:
        return activation_files.path_of(self.folder, self.stem, self.lang, tokens, mask == "control")

    def earlier_file(self, mask: str, tokens: int) -> Path:
        """What an earlier version called it; mostly the same."""
        return activation_files.earlier_path_of(self.folder, self.stem, self.lang, tokens, mask == "control")


def place_of(ref: refs.ModelRef, folder: Path, name: str, lang: str, base_tag: str | None, is_run: bool) -> Place:
    if base_tag is not None:
        return Place(folder / base_tag, "", lang, is_base=True)
    if is_run:
        return Place(folder / name, f"checkpoint-{ref.step}", lang)
    # A control's published name (r, checkpoint-100-r) marks it, as `Place.file` does.
    stem = name.removesuffix("r").removesuffix("-") if activation_files.is_control_name(name) else name
    return Place(folder, stem, lang)


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
    add = p.add_argument
    add("-m", "--model", metavar="M", help="model, or run of checkpoints; default: the study's run, and its base")
    add("--base-model", metavar="B", help="base, measured with a run; default: the study's")
    add("--run", metavar="RUN", help="run that the mask is of, where only another model is measured")
    add("--base-tag", metavar="TAG", help="folder of the base's results; default base")
    add("-i", "--id_path", metavar="IDS", help="file of token ids; default: the study's, of --lang")
    types = ("llama", "qwen")
    add("-t", "--type", choices=types, help="blocks of 4096 (llama) or 2048 tokens; default: from the model")
    add("-s", "--save_folder", metavar="F", help="where results go; default: the study's lsn/lsn_activation")
    add(
        "-n",
        "--name",
        metavar="NAME",
        help="of the run's folder, or of a single model's files; default: the study's name, a model's own",
    )
    add(
        "-f",
        "--mask_file",
        metavar="MASK",
        help="neurons by language (lsn/identify.py), or their random control alone; default: the study's",
    )
    add("--control-mask", metavar="MASK", help="random control; default: MASK with .control.json, if it is there")
    add("-l", "--lang", metavar="LANG", help="language; default: the study's languages.target")
    add("--tokens", type=cli.positive, default=TOKENS, metavar="N", help=f"tokens; default {TOKENS:,}")
    add("--block-size", type=cli.positive, metavar="N", help="tokens a block; default: that of --type")
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
    opening.look_over(models)
    base = args.base_model or (study.get("base") if is_run else None)
    lang = str(study.value(args.lang, "--lang", "languages.target"))
    folder = study.output(args.save_folder, "--save_folder", "lsn_activation")
    name, base_tag = names_of(args, study, models, is_run)
    ids = args.id_path or id_file(study, lang)
    files = mask_files(args, study, not is_run and activation_files.is_control_name(name))
    if is_run and base is None:
        cli.warn("the base is not measured, which step 10 needs: give --base-model, or the study key base")

    todo = [(ref, place_of(ref, folder, name, lang, None, is_run)) for ref in models]
    if base is not None:
        todo.insert(0, (refs.model(base), place_of(refs.model(base), folder, name, lang, base_tag, is_run)))
    process = processes.Process(args.device, args.device_map)
    chosen = masks_of(todo, lang, files, study, args)
    todo = jobs(args, study, todo, Path(ids), chosen, process.device)
    process.wait()  # no process may see a result that another is about to write
    means = measure_all(todo, chosen, process, args.drop_revisions)
    if len(todo) > 1 and "language" in means and process.is_main:
        part = beside.name(study, steps=args.steps, limit=args.limit)  # the study's figure is of all that there is
        figure = folder / dotted(name, part)
        draw(figure, means, lang, sum(map(len, chosen.layers["language"].values())), todo[0].blocks.numel())
        cli.say(f"wrote {figure}.pdf and .png")


def names_of(args, study: Study, models: list[refs.ModelRef], is_run: bool) -> tuple[str, str]:
    """What the results are called: the run's folder or the single model's files, and the folder of the base.

    Raises:
        InputError: nothing says it, or a name that means another step than the model's.
    """
    base_tag = beside.name(study, base=args.base_model) or "base"
    name = args.name
    if name is None and not study:
        raise InputError("nothing says how the results are called: give --name NAME, or run inside a study")
    if name is None:
        name = dotted(study.name, beside.name(study, run=args.model)) if is_run else models[0].model_id
    step = None if is_run else activation_files.step_in(name)
    if step is not None and models[0].step not in (None, step):
        raise InputError(f"--name {name} means step {step}, but {models[0].spec} is of step {models[0].step}")
    return name, args.base_tag or base_tag


def mask_files(args, study: Study, named_control: bool) -> dict[str, Path]:
    """The masks to follow: "language" and its "control", or the control alone where --mask_file is one.

    Args:
        named_control: --name is one that the published scripts have for controls.

    Raises:
        InputError: a name that means the control where the mask is none, or two controls.
    """
    path = study.input(args.mask_file, "--mask_file", "lsn_mask", "lsn/identify.py")
    control = Path(args.control_mask) if args.control_mask else masks.control_beside(path)
    said = masks.is_control(path)
    if said or (said is None and named_control):
        if args.control_mask:
            raise InputError(f"{path} and {control} are both controls; give the language's mask as --mask_file")
        cli.say(f"{path} is measured as a random control{'' if said else f', as --name {args.name} says'}")
        return {"control": path}
    if named_control:
        raise InputError(
            f"--name {args.name} is that of a random control, but {path} is a mask of language-specific neurons; give "
            "the control as --mask_file, or another --name"
        )
    if control is None:
        cli.warn(f"no random control: there is none beside {path}, and --control-mask is not given")
    return {"language": path} | ({"control": control} if control else {})


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

    def earlier_path(self, mask: str) -> Path:
        return self.place.earlier_file(mask, self.blocks.numel())

    def is_finished(self, mask: str) -> bool:
        """Raises InputError where another request has a file of this name, or of the earlier one."""
        paths = dict.fromkeys((self.path(mask), self.earlier_path(mask)))
        made = [results.made_by(path, SCHEMA, self.requests[mask], "another --name") for path in paths]
        return any(made)

    def write(self, mask: str, content: dict, header: dict) -> None:
        results.write_json(self.path(mask), content, header)
        if self.earlier_path(mask) != self.path(mask):
            self.earlier_path(mask).unlink(missing_ok=True)

    def mean(self, mask: str) -> float:
        path = self.path(mask) if self.path(mask).exists() else self.earlier_path(mask)
        return results.read_json(path, SCHEMA, allow_limited=True)[0]["all_layers"]


def id_file(study: Study, lang: str) -> Path:
    """The study's token ids of a language."""
    from cpt_utils.base import languages
    from cpt_utils.measures import tokenids

    folder = Path(study.value(None, "--id_path", "tokens"))
    codes = [str(code) for code in study.get("languages.lsn", [])]
    spelled = languages.find(codes, lang, default=lang)  # the file's name has the study's spelling
    return folder / tokenids.file_name(spelled, study.name)


def masks_of(todo: list, lang: str, files: dict[str, Path], study: Study, args) -> Masks:
    """The neurons to follow in the models of `todo`, which must all have them.

    Raises:
        InputError: models of different sizes, or masks that do not belong to them.
    """
    from cpt_utils.architectures import archs
    from cpt_utils.measures import neurons

    widths = [neurons.widths(archs.for_config(ref.config()), ref.config()) for ref, _ in todo]
    for (ref, _), theirs in zip(todo, widths, strict=True):
        if theirs != widths[0]:
            raise InputError(f"{ref.spec} has other layers or neurons than {todo[0][0].spec}: the mask fits only one")
    described = refs.relatives([ref for ref, _ in todo], study.get("base"), args.run or study.get("run"))
    places = (files.get(mask) for mask in ("language", "control"))
    hint = "give its mask; of a base, name the run that it belongs to with --run (study key run)"
    found = masks.read_both(*places, lang, len(widths[0]), widths[0], described, hint)
    layers = dict(zip(("language", "control"), found, strict=True))
    return Masks(lang, files, {mask: layers[mask] for mask in files}, widths[0])


def jobs(args, study: Study, todo: list, ids: Path, chosen: Masks, device: torch.device) -> list[Job]:
    """Everything there is to measure; all is checked before the first model is loaded."""
    from cpt_utils.measures import neurons

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
        requests = {mask: facts | {"mask": layers} for mask, layers in chosen.layers.items()}
        job = Job(ref, place, blocks, requests, [], ids, dtype, batch_size)
        job.left.extend(mask for mask in requests if args.overwrite or not job.is_finished(mask))
        found.append(job)
    return found


def measure_all(
    todo: list[Job], chosen: Masks, process: processes.Process, drop: bool = False
) -> dict[str, dict[int, float]]:
    """Measure what is left, one model after the other; the means by mask and step, in the first process.

    `drop`: weights of a checkpoint on the hub go from the disk when it is done.
    """
    from cpt_utils.architectures import archs
    from cpt_utils.models import loading

    means: dict[str, dict[int, float]] = {mask: {} for mask in chosen.layers}
    following = [job.ref for job in todo if job.left]
    for job in todo:
        if job.left:
            model = loading.load_model(job.ref, job.dtype, process.device, process.device_map)
            following.pop(0)
            if following and process.is_main and not drop:
                loading.prefetch(following[0])  # read while this one computes
            followed = {mask: chosen.layers[mask] for mask in job.left}
            found = measure(model, archs.for_config(job.ref.config()), job.blocks, followed, job.batch_size, process)
            del model
            if drop and not job.place.is_base:
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
    from cpt_utils.base import languages

    request = job.requests[mask]
    return results.header(
        SCHEMA,
        models={"model": job.ref.describe()},
        step=job.step,
        n_layers=len(chosen.widths),
        ffn_width=max(chosen.widths),
        language=languages.canonical(chosen.lang, any_tag=True),
        control=mask == "control",
        mask=chosen.files[mask],
        tokens={"file": job.ids, **request["ids"]},
        block_size=request["block_size"],
        limit=request["ids"]["limit"],
        dtype=request["dtype"].removeprefix("torch."),
        device=request["device"],
        request=request,
    )


if __name__ == "__main__":
    cli.run(main)
