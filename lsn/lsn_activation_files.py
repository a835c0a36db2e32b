"""Which masks lsn/lsn_activation_cpt.py follows, and how its results are named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study, dotted
from cpt_utils.checkpoints import beside, refs
from cpt_utils.measures import activation_files, masks


@dataclass(frozen=True)
class Files:
    """Where the results of one model go: see `activation_files`."""

    folder: Path
    stem: str
    lang: str
    is_base: bool = False

    def of(self, mask: str, tokens: int) -> list[Path]:
        """The file of a mask, then that of an earlier version if its name differs."""
        naming = activation_files.path_of, activation_files.earlier_path_of
        paths = [name(self.folder, self.stem, self.lang, tokens, mask == "control") for name in naming]
        return list(dict.fromkeys(paths))


def files_of(ref: refs.ModelRef, folder: Path, name: str, lang: str, base_tag: str | None, is_run: bool) -> Files:
    if base_tag is not None:
        return Files(folder / base_tag, "", lang, is_base=True)
    if is_run:
        return Files(folder / name, f"checkpoint-{ref.step}", lang)
    # A control's published name (r, checkpoint-100-r) marks it, as `Files.of` does.
    stem = name.removesuffix("r").removesuffix("-") if activation_files.is_control_name(name) else name
    return Files(folder, stem, lang)


def names_of(args, study: Study, models: list[refs.ModelRef], is_run: bool) -> tuple[str, str]:
    """The name of the run's folder or of the single model's files, and that of the base's folder.

    Raises:
        InputError: no name is given, or it means a step other than the model's.
    """
    base_tag = beside.name(study, base=args.base_model) or "base"
    name = args.name
    if name is None and not study:
        raise InputError("nothing says what to call the results: give --name NAME, or run inside a study")
    if name is None:
        name = dotted(study.name, beside.name(study, run=args.model or args.run)) if is_run else models[0].model_id
    step = None if is_run else activation_files.step_in(name)
    if step is not None and models[0].step not in (None, step):
        raise InputError(f"--name {name} means step {step}, but {models[0].spec} is of step {models[0].step}")
    return name, args.base_tag or base_tag


def mask_files(args, study: Study, named_control: bool) -> dict[str, Path]:
    """The masks to follow: "language" and its "control", or the control alone if --mask_file is one.

    Args:
        named_control: --name is one that the published scripts use for controls.

    Raises:
        InputError: the name is that of a control but the mask is none, or both masks are controls.
    """
    path = study.input(args.mask_file, "--mask_file", "lsn_mask")
    control = Path(args.control_mask) if args.control_mask else masks.control_beside(path)
    is_control = masks.is_control(path)  # None: its header does not say
    if is_control or (is_control is None and named_control):
        if args.control_mask:
            raise InputError(f"{path} and {control} are both controls; give the language's mask as --mask_file")
        cli.say(f"{path} is measured as a random control{'' if is_control else f', as --name {args.name} says'}")
        return {"control": path}
    if named_control:
        raise InputError(
            f"--name {args.name} is that of a random control, but {path} is a mask of language-specific neurons; give "
            "the control as --mask_file, or another --name"
        )
    if control is None:
        cli.warn(f"no random control: there is no file of one for {path}, and --control-mask is not given")
    return {"language": path} | ({"control": control} if control else {})
