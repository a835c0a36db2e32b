"""Study files: one YAML that gives every script its models, languages, data and results folder.

A value on the command line overrides the study's, which overrides the script's default. Strings may contain
`{seed}` and `{name}`, which stand for the study's seed and name, and `${VARIABLE}` from the environment.
Paths are relative to the folder a command is run in (the repository root), like paths on the command line.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
from pathlib import Path

from cpt_utils.base import cli, experiments
from cpt_utils.base.errors import InputError

REQUIRED = object()


class Study:
    """The values of one study file; empty (falsy) if there is no file.

    Attributes:
        arm: the name of the arm or other run that the study is read as; empty: the study itself. `run` is then the
            retrained run of that arm (key `arms`), or the other run (key `runs`), and results are below the study's,
            in `arms/<name>` or `runs/<name>`.
        plain: the study itself, also when it is read as an arm.
    """

    arm = ""

    def __init__(self, values: dict | None = None, path: Path | None = None, seed: int | None = None):
        self.path = path
        self.values = dict(values or {})
        if seed is not None:
            self.values["seed"] = seed
        if self.values:
            from cpt_utils.base import keys, study_keys  # not at the top: pydantic would slow --help by .1 s

            keys.check(study_keys.Study, self.values, path)
        names = {"seed": self.values.get("seed", 42), "name": self.values.get("name", path.stem if path else "study")}
        self.values = expand(self.values, lambda text: _fill_in(text, names))
        self.plain = self

    def __bool__(self) -> bool:
        return self.path is not None

    @classmethod
    def find(cls, path: str | os.PathLike | None = None, seed: int | None = None, arm: str | None = None) -> Study:
        """The study at `path`, else `study.yaml` in the current folder, else an empty one; read as `arm`, if given."""
        file = Path(path) if path else Path("study.yaml")
        if not path and not file.is_file():
            if arm is not None:
                raise InputError(f"--arm {arm} needs a study that has it (--study FILE, or study.yaml in this folder)")
            return cls(seed=seed)
        from cpt_utils.base import keys

        missing, empty = (
            f"give another path, or write it: make study STUDY={file}",
            "it needs at least base, run, languages and results",
        )
        study = cls(keys.read(file, missing, empty), file, seed)
        return study if arm is None else study.of_arm(arm)

    @classmethod
    def of_seeds(cls, path, seeds: list[int | None], arm: str | None = None) -> list[Study]:
        """The study of each seed (`find`), checked by `refuse_shared`."""
        studies = [cls.find(path, seed, arm) for seed in seeds]
        refuse_shared(studies)
        return studies

    def of_arm(self, name: str) -> Study:
        """The study read as one of its arms, or as one of its other runs.

        Raises:
            InputError: it has none of that name, or an arm is asked for and the study's run is not one folder.
        """
        arms, runs, run = self.get("arms", {}), self.get("runs", {}), self.get("run")
        if name not in (*arms, *runs):
            names = ", ".join((*arms, *runs)) or "none"
            raise InputError(f"{self.path} has no arm {name!r}; it has {names} (keys arms and runs)")
        if name in arms and not isinstance(run, str):
            raise InputError(f"{self.path}: arms are trained beside the study's run, which must be one folder")
        as_arm = copy.copy(self)
        as_arm.arm, kind = name, "arms" if name in arms else "runs"
        run_path = Path(run).parent / "arms" / name / Path(run).name if name in arms else runs[name]
        results = self.get("results") or f"results/{self.name}"
        as_arm.values = self.values | {"run": str(run_path), "results": f"{results}/{kind}/{name}"}
        return as_arm

    @property
    def name(self) -> str:
        return str(self.values.get("name", self.path.stem if self.path else "study"))

    @property
    def seed(self) -> int:
        return int(self.values.get("seed", 42))

    def get(self, key: str, default=None):
        """The value at a dotted key such as `languages.base`, or `default`."""
        value = self.values
        for part in key.split("."):
            if not isinstance(value, dict) or value.get(part) is None:
                return default
            value = value[part]
        # Only this value: a step that needs no data runs without the environment variable for its folder.
        return expand(value, lambda text: expand_environment(text, self.path))

    def value(self, given, flag: str, key: str, default=REQUIRED):
        """`given` (command line), else the study's `key`, else `default`.

        Raises:
            InputError: nothing provides the value; the message names the flag and the key.
        """
        if given is not None:
            return given
        value = self.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            raise InputError(
                f"nothing says {key.replace('.', ' ')}: give {flag}, or the key {key} in a study file {self._where()}"
            )
        return default

    @property
    def folder(self) -> Path:
        """The folder of all results of the study."""
        return Path(self.get("results") or f"results/{self.name}")

    def result(self, step: str) -> Path | None:
        """The path of `step`'s result in this study (see `experiments`); None outside a study."""
        return self.folder / experiments.result(step).replace("{name}", self.name) if self else None

    def output(self, given, flag: str, step: str, other: str = "") -> Path:
        """The path to write to: `given`, else the study's path for `step`.

        If `other` is not empty, the result is not the study's: its path gets `other` as a further suffix.
        """
        if given is not None:
            return Path(given)
        path = self.result(step)
        if path is None:
            raise InputError(
                f"nothing says where the result goes: give {flag}, or the key results in a study file {self._where()}"
            )
        if not other:
            return path
        beside = path.with_name(f"{path.stem}.{other}{path.suffix}")
        cli.say(f"{path} is kept for the study's own base, whole run and language; this goes to {beside}")
        return beside

    def input(self, given, flag: str, step: str, how: str = "") -> Path:
        """The file or folder of an earlier step: `given`, else the study's path; it must exist.

        Args:
            how: flags that its script has to be run with, for the message (" --controls").
        """
        path, made_by = Path(given) if given is not None else self.result(step), experiments.made_by(step) + how
        if path is None:
            raise InputError(
                f"nothing says where the result of {made_by} is: give {flag}, or run inside a study {self._where()}"
            )
        if not path.exists():
            raise InputError(f"{path} does not exist; run {made_by} first, or give {flag}")
        if given is None and step == "layers":
            self._refuse_other_split(path, made_by)
        return path

    def _refuse_other_split(self, path: Path, made_by: str) -> None:
        """Refuse a layer split by another curve or other sentences than the study's: the study has changed since."""
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the reader of the layers reports these
            head = json.loads(path.read_text(encoding="utf-8")).get("_header")
            for key, usual in (("measure", "published"), ("sentences", "all")):
                used, wanted = (head or {}).get(key, usual), self.get(key) or usual
                if head and used != wanted:
                    raise InputError(
                        f"{path} splits layers by {used}, the study's {key} is {wanted}; run {made_by} again"
                    )

    def _where(self) -> str:
        return f"({self.path} has none)" if self else "(--study FILE, or study.yaml in this folder)"


def refuse_shared(studies: list[Study], who: str = "the seeds") -> None:
    """InputError if two of several studies, mostly the seeds of one, share a results folder."""
    folders = [study.folder for study in studies if study]
    if len({*folders}) < len(folders):
        raise InputError(f"{who} share {folders[0]}: the study's results must hold {{seed}}")


def dotted(*parts: str) -> str:
    """The non-empty parts joined by dots: `demo`, or `demo.<other>` for results that are not the study's own."""
    return ".".join(filter(None, parts))


def as_yaml(values: dict) -> str:
    """The values as YAML of a study file; a mapping or list without nested ones takes one line."""
    import yaml

    return yaml.safe_dump(values, default_flow_style=None, sort_keys=False, allow_unicode=True, width=1000)


def expand(value, change):
    """`value` with `change` applied to every string in it."""
    if isinstance(value, dict):
        return {key: expand(below, change) for key, below in value.items()}
    if isinstance(value, list):
        return [expand(below, change) for below in value]
    return change(value) if isinstance(value, str) else value


def _fill_in(text: str, names: dict) -> str:
    for name, value in names.items():
        text = text.replace("{" + name + "}", str(value))
    return text


def expand_environment(text: str, path: Path | None) -> str:
    """`text` with every `${NAME}` replaced from the environment; InputError if one is not set."""

    def from_environment(match: re.Match) -> str:
        value = os.environ.get(match[1])
        if not value:
            raise InputError(
                f"{path}: the environment variable {match[1]} is not set; export {match[1]}=<folder or file>"
            )
        return value

    return re.sub(r"\$\{(\w+)\}", from_environment, text)


if __name__ == "__main__":  # --init; the command inspects models, and may not be imported from this package
    import runpy

    runpy.run_path(str(cli.REPOSITORY / "workflow/init.py"), run_name="__main__")
