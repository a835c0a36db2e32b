"""Every number of a study's result files as rows of one table, identified by columns instead of by JSON path.

A result is read by the patterns of its schema (readers.py), which say which parts of a number's path are columns. A
number that no pattern matches keeps its path as the name of its measure; none is left out.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from cpt_utils.base import cli, experiments, languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study
from cpt_utils.measures.lm_eval_results import is_number

reading_of = cli.sibling("report/readers.py")

# `hidden_state` i is the output of block i - 1, 0 the embeddings; a number about a block's weights has a `layer`.
COLUMNS = (
    "study", "seed", "run", "step", "layer", "hidden_state", "component", "language", "condition", "measure", "value",
    "ci_low", "ci_high", "n", "controls", "result", "file",
)  # fmt: skip
PLAIN = "plain"  # name of the study's own run beside arms and other runs
OF_PAIR = ("retrieval", "alignment")  # steps whose results are in a folder for two languages
OF_ONE = ("sentence-retrieval", "sentence-alignment", "lm_eval", "lsn-activation")  # results of a single model
WHOLE = ("seed", "step", "layer", "hidden_state", "n", "controls")  # integer columns

# The interval or number of units of a mapping belongs to the first of MAIN that it has.
MAIN = (
    "own_minus_random", "own_minus_matched", "own", "value", "mean", "gain", "correlation", "difference", "harm",
    "selectivity", "nll_per_byte", "ratio", "acc", "acc,none",
)  # fmt: skip
UNITS = ("n", "n_units", "n_points", "documents", "n_tokens")
CONTROLS = ("n_random", "n_matched", "n_pairs", "draws")
# Not results: settings, and lists of layers, heads and names.
SETTINGS = {
    results.HEADER, "request", "shape", "step", "n_layers", "seed", "set", "layer", "expert", "experts", "orders",
    "sweeps", "what",
}  # fmt: skip
LABELS = {
    "interface_layers", "semantic_layers", "semantic_hub_layers", "random_layers", "layers",
    "lsn_rich", "interface", "hub_blocks", "differs", "richest_layers", "languages", "kept", "chain", "margins",
    "seeds", "runs", "steps", "files",
}  # fmt: skip
# How the entries of a list are named; what the name contains is not a number of the entry.
ENTRIES = {
    "sets": "{component}/{name}", "conditions": "{name}", "points": "{curve} {at} {draw}", "orders": "{name}",
    "heads": "layer_{layer}/unit_{unit}", "single": "layer_{layer}/unit_{unit}", "query_heads": "head_{head}",
    "matrices": "{name}", "numbers": "{name}", "beside": "{name}", "pairs": "{runs}", "against_full": "{share}",
}  # fmt: skip
TEMPLATE = re.compile(r"\{(\w+)(?::([^}]*))?\}")
OTHER_LOSS = re.compile(r"(?P<measure>(.*/)?nll_per_byte):(?P<language>[^/]+)(?P<rest>.*)")  # not the target's
KINDS = {"component": "[^/]*", "step": r"\d+|base", "layer": r"\d+", "hidden_state": r"\d+", "measure": ".+"}


# ---------------------------------------------------------------- one file


def numbers(value, place: tuple[str, ...] = (), around=None) -> Iterator[tuple[tuple[str, ...], dict]]:
    """(path, {value, ci_low, ci_high, n, controls}) of every number below `value`; None and booleans do not count.

    Args:
        around: the intervals of these numbers, in the same order and under the same names.
    """
    value, around = _by_name(value, place[-1] if place else ""), _by_name(around, "")
    if isinstance(value, dict):
        yield from _in_mapping(value, place, around if isinstance(around, dict) else {})
    elif is_number(value):
        low, high = around.values() if isinstance(around, dict) and len(around) == 2 else (None, None)
        yield place, {"value": value, "ci_low": low, "ci_high": high}


def _in_mapping(value: dict, place: tuple[str, ...], around: dict) -> Iterator[tuple[tuple[str, ...], dict]]:
    facts = {"n": _first(value, UNITS), "controls": _first(value, CONTROLS)}
    about = "ci_low" in value or any(fact is not None for fact in facts.values())
    main = next((key for key in MAIN if about and is_number(value.get(key))), None)
    units = [name for name in (*UNITS, *CONTROLS) if main and is_number(value.get(name))]
    ends = {key: value.get(key) for key in ("ci_low", "ci_high")}
    if main:
        row = {"value": value[main], **ends, **facts}
        yield place if main in ("value", "mean", *place[-1:]) else (*place, main), row
    for key, below in value.items():
        if key in (main, *ends) or key in units or key.endswith("_ci") or key == "intervals" or _is_label(key, below):
            continue
        intervals = around.get(key, value.get(f"{key}_ci"))
        if key in ("matrix", "retention"):
            intervals = value.get("intervals")
        elif key == "values" and all(isinstance(end, dict) for end in ends.values()):
            intervals = {name: [end.get(name) for end in ends.values()] for name in below}
        yield from numbers(below, (*place, *key.split("/")), intervals)


def _by_name(value, called: str):
    """A list as a mapping: pairs [x, number] by x, mappings by name (`ENTRIES` of `called`), others by index."""
    if not isinstance(value, list):
        return value
    firsts = [item[0] for item in value if isinstance(item, list) and len(item) in (2, 3, 4) and is_number(item[0])]
    if len(firsts) == len(value) > 0 and all(a < b for a, b in itertools.pairwise(firsts)):
        return {str(item[0]): _beyond_first(item[1:]) for item in value}
    if called not in ENTRIES:
        return {str(i): item for i, item in enumerate(value)}
    keys = re.findall(r"\{(\w+)\}", ENTRIES[called])
    names = [ENTRIES[called].format(**{key: _named(item.get(key, "")) for key in keys}).strip() for item in value]
    named: dict[str, dict] = {}
    for i, (name, item) in enumerate(zip(names, value, strict=True)):
        if names.count(name) > 1:  # random sets are told apart by their layers
            name += f" {item['layers']}" if item.get("layers") else f" {names[:i].count(name)}"
        named[name] = {key: below for key, below in item.items() if key not in keys}
    return named


def _named(value):
    return " and ".join(map(str, value)) if isinstance(value, list) else value


def _beyond_first(rest: list):
    """What follows x in an entry: a number, an interval, or a number with its interval."""
    if len(rest) == 3:
        return dict(zip(("value", "ci_low", "ci_high"), rest, strict=True))
    return rest[0] if len(rest) == 1 else rest


def _is_label(key: str, below) -> bool:
    return key in SETTINGS or (key in LABELS and isinstance(below, list))


def _first(value: dict, names: tuple[str, ...]):
    return next((value[name] for name in names if is_number(value.get(name))), None)


# ---------------------------------------------------------------- columns


def of_file(payload: dict, header: dict) -> Iterator[dict]:
    """The numbers of one result as rows of the columns that its JSON gives."""
    schema = header["schema"]
    readers = [(_pattern(template), fixed) for template, fixed in map(_entry, reading_of.READERS.get(schema, []))]
    usual = _of_header(header)
    prepared = reading_of.PREPARE[schema](payload, header) if schema in reading_of.PREPARE else payload
    for place, number in numbers(prepared):
        path = "/".join(place)
        matches = ((hit, fixed) for pattern, fixed in readers if (hit := pattern.fullmatch(path)))
        match, extra = next(matches, (None, {}))
        named = match.groupdict() if match else {"measure": path}
        measure = [part for part in (extra.get("measure"), named.get("measure"), named.pop("also", None)) if part]
        yield _tidied(usual | number | extra | named | {"measure": "/".join(measure)}, header)


def _tidied(row: dict, header: dict) -> dict:
    other = OTHER_LOSS.fullmatch(row["measure"])
    if other:
        row |= {"measure": other["measure"] + other["rest"], "language": other["language"]}
    if "base" in (row.get("run"), row.get("step"), row.get("condition")):
        row |= {"step": 0}
        row |= {"run": None} if row.get("run") == "base" else {}
    row |= {"component": "attention"} if row.get("component") == "attn" else {}
    if row.get("n") is None:
        of_text = ("heldout_others", other["language"]) if other else ("heldout",)
        row["n"] = _units(row["measure"], header, (*of_text, "documents"))
    return {key: int(x) if key in WHOLE and x is not None else x for key, x in row.items() if x != ""}


def _units(measure: str, header: dict, documents: tuple[str, ...]):
    """The number of sentences, documents or task rows that a mean is over, from the header."""
    for begins, keys in (("retrieval", ("n_used",)), ("nll_per_byte", documents), ("task_accuracy", ("task", "rows"))):
        if measure.startswith(begins) and "/" not in measure:
            value = header
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            return value
    return header.get("n_used") if header["schema"] in OF_ONE[:2] else None


def _of_header(header: dict) -> dict:
    """The columns that a header gives for all numbers of its file."""
    models = header.get("models") or {}
    ref = next((models[role] for role in ("target", "plain", "model") if models.get(role)), {})
    language = header.get("language") or header.get("target_lang")
    columns = {"step": ref.get("step"), "language": language}
    if header["schema"] == "heads":
        columns["step"] = max(models.get("checkpoints") or {}, key=int, default=None)
    if header["schema"] == "comparison":  # its runs may have ended at different steps
        columns["step"] = None
    if header["schema"] == "lsn-activation":
        columns["condition"] = "control" if header.get("control") else "lsn"
    return columns


def _entry(entry) -> tuple[str, dict]:
    return entry if isinstance(entry, tuple) else (entry, {})


@cache
def _pattern(template: str) -> re.Pattern:
    parts, end = [], 0
    for match in TEMPLATE.finditer(template):
        name, regex = match[1], match[2] or KINDS.get(match[1], "[^/]+")
        parts += [re.escape(template[end : match.start()]), f"(?P<{name}>{regex})"]
        end = match.end()
    return re.compile("".join(parts) + re.escape(template[end:]))


# ---------------------------------------------------------------- a study


def files(study: Study) -> Iterator[tuple[str, Path]]:
    """(step, file) of every existing result of a study, ordered by step and name."""
    for step in sorted(experiments.said("RESULTS")):
        result = study.result(step)
        if result.is_dir():
            paths = sorted(result.rglob("*.json"))
            yield from ((step, path) for path in paths if not (path.parent / "config.json").is_file())
        elif result.is_file() and result.suffix == ".json":
            yield step, results.facts_beside(result) if results.facts_beside(result).is_file() else result
            for more in ("singles", "report"):  # from the same measurement
                if (beside := result.with_suffix(f".{more}.json")).is_file():
                    yield step, beside


def read(study: Study) -> Iterator[tuple[str, Path, dict, dict]]:
    """(step, file, payload, header) of every result of a study; those made with --limit are left out with a warning.

    Raises:
        InputError: a file is damaged, or not what its step writes.
    """
    for step, path in files(study):
        payload, header = _content(path)
        if header.get("limit") is not None:
            cli.warn(f"{path} was made with --limit {header['limit']} and is left out")
        elif header.get("schema"):
            yield step, path, payload, header


def _content(path: Path) -> tuple[dict, dict]:
    """Payload and header of a result; both empty if it has no header (made by hand, or settings of a tool)."""
    with contextlib.suppress(ValueError):
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or results.HEADER not in content:
            return {}, {}
    return results.read_json(path, allow_limited=True)


def rows(study: Study, found: list[tuple[str, Path, dict, dict]] | None = None) -> list[dict]:
    """Every number of every result of a study, or of one of its arms or runs, as rows of `COLUMNS`.

    Missing results give no rows, and columns that do not apply are None. `result` is the step's name in the RESULTS of
    its script. `found`: the results, if they have been read (`read`) before.
    """
    found, steps = list(read(study)) if found is None else found, {}
    for _, path, _, header in found:
        with reading(path):
            steps |= _steps(header)
    same = {"study": study.name, "run": study.arm or PLAIN}
    table = []
    for step, path, payload, header in found:
        where = {"result": step, "file": str(path)}
        same["seed"] = header["seed"] if isinstance(header.get("seed"), int) else study.seed
        with reading(path):
            about = _model(header, steps, study) if header["schema"] in OF_ONE else {}
            for row in of_file(payload, header):
                row |= {key: value for key, value in about.items() if value is not None}
                row |= where | {key: value for key, value in same.items() if row.get(key) is None}
                if row.get("language") is None and "nll_per_byte" in row["measure"].split("/"):
                    row["language"] = study.get("languages.target")
                table.append({column: row.get(column) for column in COLUMNS})
    return table


def of_the_pair(table: list[dict], study: Study) -> list[dict]:
    """The rows without retrieval between other languages than the study's, if there is any between the study's."""
    pairs = {Path(row["file"]).parent.name for row in table if row["result"] in OF_PAIR}
    with contextlib.suppress(InputError):
        base, target = (str(study.get(f"languages.{side}")) for side in ("base", "target"))
        pair = languages.find_pair(pairs, base, target)
        return [row for row in table if row["result"] not in OF_PAIR or Path(row["file"]).parent.name == pair]
    return table


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn errors about the contents of a damaged file into one line.

    Raises:
        InputError: the file lacks a key, or holds something other than it should.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is not as its step writes it ({type(error).__name__}: {error}); run that step again"
        ) from error


def _steps(header: dict) -> dict[tuple, int]:
    """The step of the base (0) and of every model of the run, if a header names them: {identity: step}."""
    models = header.get("models") or {}
    if not models.get("base") or not models.get("checkpoints"):
        return {}
    steps = {_identity(ref): int(step) for step, ref in models["checkpoints"].items()}
    return steps | {_identity(models["base"]): 0}


def _identity(ref: dict) -> tuple:
    keys = ("weights_sample", "config_sha256") if ref.get("weights_sample") else ("model_id", "revision")
    return tuple(ref.get(key) for key in keys)


def _model(header: dict, steps: dict[tuple, int], study: Study) -> dict:
    """The step, or else the condition, of the one model that a result is about."""
    models = header.get("models") or {}
    ref = models.get("model") or {}
    if "untrained_like" in models:
        return {"condition": "untrained"}
    if not ref or _identity(ref) in steps:
        return {"step": steps.get(_identity(ref))}
    spec, run = str(ref.get("spec")), study.get("run")
    if spec == study.get("base"):
        return {"step": 0}
    folders = spec.partition("@")[0], str(Path(spec).parent)
    if ref.get("step") is not None and isinstance(run, str) and run.partition("@")[0].rstrip("/") in folders:
        return {"step": ref["step"]}
    return {"condition": re.sub(r"__checkpoint-\d+$", "", str(ref.get("model_id"))).replace("__", "/")}
