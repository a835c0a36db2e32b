"""What activation-correlation.py reads: the results of the steps before, all of one run, its neurons and its text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpt_utils.base import cli, experiments, languages, results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import relatives
from cpt_utils.measures import activation_files, gate, layer_lists

AGAIN = "run again the step that wrote the older one"
NAMES = {"mask": "masks", "control": "control masks", "text": "texts"}


@dataclass(frozen=True)
class Sources:
    """The files of the steps before: activations in `folder` below `name` and `base_tag`, and the three others."""

    folder: Path
    name: str
    base_tag: str
    weights: Path
    gates: Path
    layers: Path


@dataclass(frozen=True)
class Found:
    """What they hold of `steps`: mean activations by (is control, step), the base at step 0; of each step the rows of
    the weight-difference files; the interface layers; and what the header says of all this."""

    steps: list[int]
    means: dict[tuple[bool, int], float]
    attention: dict[int, dict]
    gates: dict[int, dict]
    interface: list[int]
    facts: dict


def read(sources: Sources, lang: str, wanted: list[int] | None) -> Found:
    """Everything that is correlated, of the steps `wanted`, or else of all.

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
    have = {str(sources.weights): set(attention), str(sources.gates): set(gates)}
    for control, what in ((False, "activation"), (True, "activation of the control")):
        have[f"{what} in {run_folder}"] = {step for kind, step in run[tokens] if kind == control and step}
    steps = common_steps(have, wanted)

    kinds = [(control, step) for control in (False, True) for step in (0, *steps)]
    measured = {key: (run if key[1] else base)[tokens][key] for key in kinds}
    means, headers = {}, {}
    for key, path in measured.items():
        means[key], headers[path] = read_activation(path, lang)
    models = refuse_strangers(
        [(sources.weights, weight_models(attention_header)), (sources.gates, weight_models(gate_header))]
        + [(path, activation_model(headers[path], step)) for (_, step), path in measured.items()]
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
        "n_available": len(set.intersection(*have.values())),
    }
    return Found(steps, means, attention, gates, interface, facts)


def choose_tokens(run: dict[str, dict], base: dict[str, dict], folder: Path) -> str:
    """The number of tokens for which mask and control of the base and of checkpoints are there.

    Raises:
        InputError: there is none, or there are several; names them.
    """
    missing, full = [] if run else ["everything of the run but tries with --limit"], []
    for n in run:
        lacks = []
        for control, what in ((False, "activation"), (True, "control")):
            if (control, 0) not in base.get(n, {}):
                lacks.append(f"the base's {what} over {n} tokens")
            if control not in {kind for kind, _ in run[n]}:
                lacks.append(f"the {what} of the checkpoints over {n} tokens")
        missing += lacks
        full += [] if lacks else [n]
    if len(full) == 1:
        return full[0]
    if full:
        raise InputError(
            f"{folder} has activations over {' and over '.join(sorted(full))} tokens; keep one kind, and move the other"
        )
    made_by = experiments.made_by("lsn_activation")
    raise InputError(f"{folder} lacks {', '.join(missing)}; run {made_by} with the mask and its control")


def read_activation(path: Path, lang: str) -> tuple[float, dict]:
    """The mean activation of a file, and its header.

    Raises:
        InputError: no mean in it, or another language.
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
        InputError: it has no checkpoints with layers.
    """
    payload, header = results.read_json(path, schema)
    rows = payload.get("checkpoints") if isinstance(payload, dict) else None
    try:
        found = {int(step): row for step, row in rows.items() if int(step)}
        if not found or not all(row["layers"] for row in found.values()):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path} has no checkpoints with layers; give the file of {script}") from None
    return dict(sorted(found.items())), header


def read_interface(path: Path, n_layers: int, models: list[dict]) -> list[int]:
    """The interface layers of step 2's file; it must be about one of `models`, where they are known."""
    if not models:  # files of the published scripts say of no model what it is
        models = [ref for ref in (results.read_json(path)[1].get("models") or {}).values() if isinstance(ref, dict)]
    return layer_lists.read_layers(path, "interface", n_layers, models, averaged=True)[0]


def common_steps(steps: dict[str, set[int]], wanted: list[int] | None) -> list[int]:
    """The steps that all files share; `wanted` of them where given.

    Raises:
        InputError: a file has a step that another has not, or lacks a wanted one; names the file and its steps.
    """
    asked = set().union(*steps.values()) if wanted is None else set(wanted)
    lacking = {name: sorted(asked - have) for name, have in steps.items() if asked - have}
    if lacking:
        what = ", and ".join(f"{name} has no step {', '.join(map(str, lacks))}" for name, lacks in lacking.items())
        hint = "measure them, or choose with --steps" if wanted is None else "give --steps that all have"
        raise InputError(f"the steps do not match: {what}; {hint}")
    return sorted(asked)


def weight_models(header: dict) -> dict[str, dict]:
    """The models of a weight file's header by what they are: `base`, `step 10`, .."""
    models = header.get("models") or {}
    found = {f"step {step}": ref for step, ref in (models.get("checkpoints") or {}).items()}
    return found | ({"base": models["base"]} if models.get("base") else {})


def activation_model(header: dict, step: int) -> dict[str, dict]:
    model = (header.get("models") or {}).get("model")
    return {f"step {step}" if step else "base": model} if model else {}


def refuse_strangers(files: list[tuple[Path, dict[str, dict]]]) -> dict[str, dict]:
    """The models that the files are about, `{"base": .., "step 10": ..}`, as far as their headers say.

    Raises:
        InputError: two files mean different models by one of them, or one that was trained again in between.
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
    """Refuse activations (file -> header) over other texts or neurons than one another's, or other neurons than the
    gates'.

    Raises:
        InputError: names both files. Headers that do not say are taken on trust.
    """
    fingerprint = cli.sibling("weight-diff/gate_lsn.py").fingerprint
    known = {kind: (gate_file, gate_header[kind]) for kind in ("mask", "control") if gate_header.get(kind)}
    for path, header in activations.items():
        said = {}
        neurons = (header.get("request") or {}).get("mask")
        if neurons:
            kind = "control" if header.get("control") else "mask"
            said[kind] = fingerprint({int(layer): neurons[layer] for layer in neurons})
        text = header.get("tokens")
        if isinstance(text, dict) and text.get("sha256"):
            said["text"] = text["sha256"]
        for what, value in said.items():
            first, other = known.setdefault(what, (path, value))
            if value != other:
                raise InputError(f"{path} and {first} were made with different {NAMES[what]}; {AGAIN}")
