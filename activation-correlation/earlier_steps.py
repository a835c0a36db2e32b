"""Reads the results of earlier steps for activation-correlation.py, all of one run, its neurons and its text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli, experiments, languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import relatives
from cpt_utils.measures import activation_files, gate, layer_lists

AGAIN = "rerun the step that wrote the older one"
NAMES = {"mask": "masks", "control": "control masks", "text": "texts"}


@dataclass(frozen=True)
class Sources:
    """The files of earlier steps: activations in `folder`/`name` (run) and `folder`/`base_tag`, and three others."""

    folder: Path
    name: str
    base_tag: str
    weights: Path
    gates: Path
    layers: Path


@dataclass(frozen=True)
class Found:
    """Their content for `steps`: mean activations by (is control, step), with the base as step 0; each step's row of
    the weight-difference files; the interface layers; and what the result's header records."""

    steps: list[int]
    means: dict[tuple[bool, int], float]
    attention: dict[int, dict]
    gates: dict[int, dict]
    interface: list[int]
    facts: dict


def read(sources: Sources, lang: str, wanted: list[int] | None) -> Found:
    """Everything to correlate, for the steps `wanted`, else for all.

    Raises:
        InputError: a file is missing, or is about other steps, models, neurons or languages than the others.
    """
    run_folder = sources.folder / sources.name
    run = activation_files.find(run_folder, lang, of_run=True)
    base = activation_files.find(sources.folder / sources.base_tag, lang, of_run=False)
    tokens = choose_tokens(run, base, sources.folder)
    attention, attention_header = read_changes(sources.weights, "attn_vs_ffn", "weight-diff/attn_vs_ffn.py")
    gates, gate_header = read_changes(sources.gates, "gate_lsn", "weight-diff/gate_lsn.py")
    if not languages.same(gate_header.get("language", lang), lang):
        raise InputError(f"{sources.gates} is about {gate_header['language']}, not {lang}; run weight-diff/gate_lsn.py")
    available = {str(sources.weights): set(attention), str(sources.gates): set(gates)}
    for control, what in ((False, "activation"), (True, "activation of the control")):
        available[f"{what} in {run_folder}"] = {step for kind, step in run[tokens] if kind == control and step}
    steps = common_steps(available, wanted)

    keys = [(control, step) for control in (False, True) for step in (0, *steps)]
    paths = {key: (run if key[1] else base)[tokens][key] for key in keys}
    means, headers = {}, {}
    for key, path in paths.items():
        means[key], headers[path] = read_activation(path, lang)
    models = refuse_strangers(
        [(sources.weights, weight_models(attention_header)), (sources.gates, weight_models(gate_header))]
        + [(path, activation_model(headers[path], step)) for (_, step), path in paths.items()]
    )
    refuse_other_neurons(headers, sources.gates, gate_header)
    n_layers = len(attention[steps[0]]["layers"])
    interface = read_interface(sources.layers, n_layers, list(models.values()))
    facts = {
        "models": {
            "base": models.get("base"),
            "checkpoints": {str(step): models[f"step {step}"] for step in steps if f"step {step}" in models},
        },
        "n_layers": n_layers,
        "language": languages.canonical(lang, any_tag=True),
        "tokens": tokens,
        "interface_layers": interface,
        "gate": gate.carried(sources.layers),
        "files": {
            "activation": sources.folder,
            "attn_vs_ffn": sources.weights,
            "gate_lsn": sources.gates,
            "layers": sources.layers,
        },
        "n_used": len(steps),
        "n_available": len(set.intersection(*available.values())),
    }
    return Found(steps, means, attention, gates, interface, facts)


def choose_tokens(run: dict[str, dict], base: dict[str, dict], folder: Path) -> str:
    """The number of tokens over which mask and control were measured, for the base and for checkpoints.

    Raises:
        InputError: there is no such number, or more than one; names what is missing, or the numbers.
    """
    missing, complete = [] if run else ["everything of the run except trials with --limit"], []
    for n in run:
        lacks = []
        for control, what in ((False, "activation"), (True, "control")):
            if (control, 0) not in base.get(n, {}):
                lacks.append(f"the base's {what} over {n} tokens")
            if control not in {kind for kind, _ in run[n]}:
                lacks.append(f"the {what} of the checkpoints over {n} tokens")
        missing += lacks
        complete += [] if lacks else [n]
    if len(complete) == 1:
        return complete[0]
    if complete:
        numbers = " and over ".join(sorted(complete))
        raise InputError(f"{folder} has activations over {numbers} tokens; keep one kind, and move the others")
    made_by = experiments.made_by("lsn_activation")
    raise InputError(f"{folder} lacks {', '.join(missing)}; run {made_by} with the mask and its control")


def read_activation(path: Path, lang: str) -> tuple[float, dict]:
    """The mean activation of a file, and its header.

    Raises:
        InputError: the file has no mean, or is about another language.
    """
    payload, header = results.read_json(path, "lsn-activation")
    value = payload.get("all_layers") if isinstance(payload, dict) else None
    if not isinstance(value, int | float):
        raise InputError(f"{path} has no mean activation all_layers; run {experiments.made_by('lsn_activation')} again")
    if not languages.same(header.get("language", lang), lang):
        raise InputError(
            f"{path} is about {header['language']}, not {lang}; run {experiments.made_by('lsn_activation')} again"
        )
    return float(value), header


def read_changes(path: Path, schema: str, script: str) -> tuple[dict[int, dict], dict]:
    """`{step: row}` of a weight-difference file, without step 0, and its header.

    Raises:
        InputError: the file has no checkpoints with layers.
    """
    payload, header = results.read_json(path, schema)
    rows = payload.get("checkpoints") if isinstance(payload, dict) else None
    try:
        by_step = {int(step): row for step, row in rows.items() if int(step)}
        if not by_step or not all(row["layers"] for row in by_step.values()):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path} has no checkpoints with layers; give the file of {script}") from None
    return dict(sorted(by_step.items())), header


def read_interface(path: Path, n_layers: int, models: list[dict]) -> list[int]:
    """The interface layers in step 2's file, which must be about one of `models`, if these are known."""
    if not models:  # files of the published scripts do not name their models
        models = [ref for ref in (results.read_json(path)[1].get("models") or {}).values() if isinstance(ref, dict)]
    return layer_lists.read_layers(path, "interface", n_layers, models, averaged=True)[0]


def common_steps(steps: dict[str, set[int]], wanted: list[int] | None) -> list[int]:
    """The steps `wanted`, else all; `steps`: those of each file.

    Raises:
        InputError: a file lacks a wanted step, or one that another file has; names the file and the steps.
    """
    asked = set().union(*steps.values()) if wanted is None else set(wanted)
    lacking = {name: sorted(asked - have) for name, have in steps.items() if asked - have}
    if lacking:
        what = ", and ".join(f"{name} has no step {', '.join(map(str, lacks))}" for name, lacks in lacking.items())
        hint = "measure them, or choose with --steps" if wanted is None else "give --steps that all have"
        raise InputError(f"the steps do not match: {what}; {hint}")
    return sorted(asked)


def weight_models(header: dict) -> dict[str, dict]:
    """The models in a weight file's header: `{"base": .., "step 10": ..}`."""
    models = header.get("models") or {}
    checkpoints = {f"step {step}": ref for step, ref in (models.get("checkpoints") or {}).items()}
    return checkpoints | ({"base": models["base"]} if models.get("base") else {})


def activation_model(header: dict, step: int) -> dict[str, dict]:
    model = (header.get("models") or {}).get("model")
    return {f"step {step}" if step else "base": model} if model else {}


def refuse_strangers(files: list[tuple[Path, dict[str, dict]]]) -> dict[str, dict]:
    """The models that the files are about, `{"base": .., "step 10": ..}`, as far as their headers say.

    Raises:
        InputError: two files name different models for one of them, or it was trained again in between.
    """
    known: dict[str, tuple[Path, dict]] = {}
    for path, models in files:
        for what, ref in models.items():
            first, other = known.setdefault(what, (path, ref))
            if not relatives.same_model(other, ref):
                raise InputError(
                    f"{path} and {first} are about different models ({what}: {ref.get('spec')} and "
                    f"{other.get('spec')}, or trained again in between); {AGAIN}"
                )
    return {what: ref for what, (_, ref) in known.items()}


def refuse_other_neurons(activations: dict[Path, dict], gate_file: Path, gate_header: dict) -> None:
    """Refuse activations (file -> header) that differ in text or neurons, or whose neurons are not those of the gates.

    Raises:
        InputError: they do; names both files. Headers that do not say are taken on trust.
    """
    fingerprint = cli.sibling("weight-diff/gate_lsn.py").fingerprint
    known = {kind: (gate_file, gate_header[kind]) for kind in ("mask", "control") if gate_header.get(kind)}
    for path, header in activations.items():
        stated = {}
        neurons = (header.get("request") or {}).get("mask")
        if neurons:
            kind = "control" if header.get("control") else "mask"
            stated[kind] = fingerprint({int(layer): neurons[layer] for layer in neurons})
        text = header.get("tokens")
        if isinstance(text, dict) and text.get("sha256"):
            stated["text"] = text["sha256"]
        for what, value in stated.items():
            first, other = known.setdefault(what, (path, value))
            if value != other:
                raise InputError(f"{path} and {first} were made with different {NAMES[what]}; {AGAIN}")
