"""YAML files of settings, read and checked against a model of their keys; a mistake is reported in one line.

A model is a subclass of `Keys`. Its types are strict: a number in quotes is text, `no` is a boolean and not a language.
The description of a field says what its value must be, and ends the message.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from cpt_utils.base.errors import InputError

Model = TypeVar("Model", bound="Keys")
UNKNOWN = ("extra_forbidden", "invalid_key")


def _of_text(value):
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


OF_TEXT = BeforeValidator(_of_text)  # for numbers: YAML reads 2e-3 as text
REQUIRED: Any = ...


def key(meaning: str, example, usual: str = "", default=None) -> Any:
    """A field with its meaning and example for docs/study.md; `usual`: what holds without the key, if not `default`."""
    return Field(default, title=meaning, examples=[example], json_schema_extra={"usual": usual})


class Keys(BaseModel):
    """The keys of a mapping; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def fields(cls) -> dict[str, FieldInfo]:
        """The fields by their names in the file."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}

    @classmethod
    def defaults(cls) -> dict:
        """The values of the keys that a file may leave out."""
        free = {name: field for name, field in cls.fields().items() if not field.is_required()}
        return {name: field.get_default(call_default_factory=True) for name, field in free.items()}


def group(names: str, kind, default=None) -> type[Keys]:
    """A model whose keys all have the same type; `default` Ellipsis: none may be left out."""
    return create_model("Group", __base__=Keys, **dict.fromkeys(names.split(), (kind, default)))


def read(path: Path, missing: str, empty: str) -> dict:
    """The mapping in a YAML file; InputError if there is none, with the remedy for a `missing` or `empty` file."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; {missing}") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        words = str(error).replace('in "<unicode string>", ', "").split()
        raise InputError(f"{path} is not valid YAML: {' '.join(words)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no keys; {empty}")
    return values


def check(model: type[Model], values, path, prefix: str = "") -> Model:
    """`values` validated as a `model`.

    Args:
        path: the file, for the message.
        prefix: the dotted key of the values in the file ("sources[en]").

    Raises:
        InputError: an unknown key (with the nearest), a missing one, or a value of another type or outside its range.
    """
    try:
        return model.model_validate(values)
    except ValidationError as failed:
        # An unknown key is reported before a missing one: it may be a misspelling of it.
        error = min(failed.errors(), key=lambda error: error["type"] not in UNKNOWN)
    raise InputError(f"{path}: {_told(error, model, values, prefix)}")


def refuse_unknown(values: Iterable, allowed: Iterable[str], path, prefix: str = "") -> None:
    """InputError for the first key of `values` that is not in `allowed`, naming the nearest one."""
    for key in values:
        if key not in (known := list(allowed)):
            raise InputError(f"{path}: {_unknown(key, known, prefix)}")


def _unknown(key, allowed: list[str], prefix: str) -> str:
    near = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.5)
    hint = f"did you mean {_dotted(prefix, near[0])}?" if near else f"the keys are {', '.join(allowed)}"
    return f"unknown key {_dotted(prefix, key)}; {hint}"


def _told(error: dict, model: type[Keys], values, name: str) -> str:
    """An error of pydantic in the terms of the file: dotted key, value, what it must be."""
    kind, models, field, above = error["type"], [model], None, name
    # The depth of a key that the file lacks, or that is not text (null).
    last = len(error["loc"]) - (error["loc"][-1:] == ("[key]",))
    odd_depth = last if kind in ("missing", "invalid_key") or last < len(error["loc"]) else None
    for depth, part in enumerate(error["loc"], 1):
        if isinstance(values, list) and isinstance(part, int):
            above, values = name, values[part]
            item_name = values.get("name") if isinstance(values, dict) else None
            name += f"[{part if item_name is None else item_name}]"
        elif isinstance(values, dict) and (part in values or depth == odd_depth):
            above, values, name = name, values.get(part), _dotted(name, part)
            field = next((m.fields()[part] for m in models if part in m.fields()), field)
            allowed = list(models[0].fields())
            models = (field and list(_models(field.annotation))) or models
        elif part == "[key]":
            name = f"a key of {above}"
        else:  # the tag that selects one of several models
            models = [m for m in models if any(part in get_args(f.annotation) for f in m.fields().values())] or models
    value, must = (
        error.get("input"),
        (field and field.description)
        or error["msg"].replace("Input should", "it must").replace("valid string", "text"),
    )
    if kind in UNKNOWN:
        return _unknown(part if kind == "extra_forbidden" else value, allowed, above)
    if kind == "missing" or (value is None and field is not None and field.is_required()):
        return f"{name} is missing; {must}"
    if kind == "value_error":  # from a validator of the model
        return f"{name}: {error['ctx']['error']}" if name else str(error["ctx"]["error"])
    if kind.startswith("union_tag"):
        tags = error["ctx"].get("expected_tags", "").replace("'", "")
        return f"{name} needs a {error['ctx']['discriminator']}".replace("'", "") + (tags and f", one of {tags}")
    if kind in ("model_type", "model_attributes_type"):
        return f"{name} must hold the keys {', '.join(models[0].fields())}"
    return f"{name} is {value!r}; {must}"


def _models(annotation) -> Iterable[type[Keys]]:
    """The models in a type: Language in `dict[str, Language] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Keys):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _dotted(prefix: str, key) -> str:
    return f"{prefix}.{key}" if prefix else str(key)
