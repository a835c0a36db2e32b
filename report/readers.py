"""How keys of a result file map to columns of the table of all numbers (rows.py), by schema.

A new experiment adds a line to READERS and, if its result must be rearranged first, a function to PREPARE.
"""

from __future__ import annotations

from collections.abc import Callable

ABS = {"measure": "mean_abs"}  # mean |dW|
SETS = [
    "sets/{component}/{condition}/values/{measure}", "sets/{component}/{condition}/{measure}",
]  # fmt: skip
CURVES = [*SETS, "points/{condition}/values/{measure}", "points/{condition}/{measure}"]
LAYER = "checkpoints/{step}/layers/layer_{layer}"


def of_steps(payload: dict, header: dict) -> dict:
    """The payload with its series, which are lists over steps, keyed by step."""
    series = payload.get("series") or {}
    lists = {key: values for key, values in series.items() if key != "steps" and isinstance(values, list)}
    steps = enumerate(map(str, series.get("steps", [])))
    by_step = {step: {key: values[i] for key, values in lists.items()} for i, step in steps}
    return payload | {"series": by_step | {key: series[key] for key in series if key not in lists and key != "steps"}}


def counted(payload: dict, header: dict) -> dict:
    """A mask {language: {layer: neurons}} with neurons replaced by their number."""
    return {lang: {layer: len(neurons) for layer, neurons in layers.items()} for lang, layers in payload.items()}


def tasks(payload: dict, header: dict) -> dict:
    """The scores of an lm_eval result, with their numbers of rows."""
    rows = payload.get("n-samples") or {}
    scores = payload.get("results") or {}
    return {
        task: {**own, "sample_len": None, "n": (rows.get(task) or {}).get("effective")} for task, own in scores.items()
    }


def compared(payload: dict, header: dict) -> dict:
    """A comparison without the curves of its figure, its numbers keyed by run and name."""
    return {
        kind: {run: {row["name"]: row for row in numbers} for run, numbers in payload.get(kind, {}).items()}
        for kind in ("values", "differences", "agreement")
    }


def by_measure(payload: dict, header: dict) -> dict:
    """A comparison along a line, its worst gap keyed by the measure it is of."""
    worst = payload.get("worst") or {}
    return payload | {"worst": {worst.get("measure", ""): worst}}


def with_groups(payload: dict, header: dict) -> dict:
    """A split of the layers with the gate and `in_hub`, 1 for hub layers and 0 for the others."""
    n, hub = len(payload.get("layer_accuracy") or []), payload.get("semantic_layers") or []
    return payload | {"in_hub": [int(layer in hub) for layer in range(n)], "gate": header.get("gate")}


# schema -> patterns for the path of a number, of which the first that matches counts: a name in braces is a column,
# `{column:regex}` one that fits the regex, `also` the end of the measure. A pair adds columns, or starts the measure.
READERS: dict[str, list] = {
    "ablation-sweep": [
        "conditions/{condition}/values/{measure}", "retention/{condition}/{measure}/{also}",
        "summary/{measure}/{also:marginal_in|marginal_out}/{layer}", "summary/{measure}",
    ],
    "activation_correlation": ["series/{step}/{measure}", "series/{measure}"],
    "arms": ["models/{run}/values/{measure}", "models/{run}/{measure}"],
    "attn_vs_ffn": [
        (LAYER + "/{component:attention|ffn}_{also:max|mean}", ABS),
        LAYER + "/{measure:\\w+}/{component:attention|ffn}_{also:max|mean}",
        LAYER + "/{measure:\\w+}/{component}", LAYER + "/{measure:delta_attn_ffn}", (LAYER + "/{component}", ABS),
        "checkpoints/{step}/{measure:summary\\w*}/{component}", "checkpoints/{step}/{measure}",
        ("pooled/{step}/{component}", {"measure": "pooled_relative"}),
    ],
    "bigram": ["{language}/{step}/{measure}"],
    "claims": ["claims/{condition}/{measure}"],
    "comparison": ["{measure:values|differences|agreement}/{run}/{also:.+}"],
    "connect": [*CURVES, "distance/{layer}/{measure}", "distance/{component}/{measure}"],
    "deactivation": [
        "{also:matrix}/{condition}/{language}", "{measure:random|active}/{condition}/{also}/{language}",
        "{measure:unmasked|tokens|documents}/{language}", "{measure:n_neurons|left_out}/{condition}",
        "{measure:activity|(?:halves/\\w+/)?selectivity|diagonal}/{condition}/{also:.+}",
    ],
    "downstream_correlation": [
        ("values/{step}/{component:interface|semantic_hub}_avg", ABS), "values/{step}/{measure}",
        "{component:interface|semantic_hub}/{measure}",
    ],
    "gate_lsn": [
        ("checkpoints/{step}/layers/layer_{layer}/{component}", {**ABS, "condition": "lsn"}),
        ("checkpoints/{step}/{condition:control}/layer_{layer}/{component}", ABS),
        ("checkpoints/{step}/summary/{condition}", ABS), "{measure:neurons}/{layer}",
    ],
    "gradients": ["{step}/layers/layer_{layer}/{component}/{measure}", "{step}/{component}/{measure}"],
    "heads": ["heads/layer_{layer}/{condition:unit_\\d+/head_\\d+|unit_\\d+}/{measure}", "steps/{step}/{measure}"],
    "int_and_sem": [
        ("checkpoints/{step}/{component:interface|semantic_hub}_avg", ABS), ("layers/{step}/{layer}", ABS),
    ],
    "language-loss": ["{language}/{step}/{measure}"],
    "layer-specialize": ["{measure:layer_accuracy|label_stability|in_hub}/{layer}"],
    "lm_eval": ["sib200_{language}/{measure}"],
    "lsn-activation": [
        ("layers/{layer}", {"measure": "activation"}), ("{measure:all_layers}", {"measure": "activation"}),
    ],
    "lsn-layers": [("counts/{layer}", {"measure": "neurons"})],
    "lsn-methods": [
        "{measure:agreement}/{language}/{condition}/{also}", "{measure:overall|classes|base}/{condition}/{also:.+}",
        "best/{measure:overall/reported}/{condition}/{also}", "best/{language}/{measure:reported}/{condition}/{also}",
        "halves/{condition}/{measure:\\w+/selectivity}/{language}/{also:.+}", "halves/{condition}/{measure}",
        ("by_layer/{condition}/{language}/{layer}", {"measure": "neurons"}),
        "{measure:\\w+}/{condition}/{language}/{also:.+}", "{measure:\\w+}/{condition}/{language}",
    ],
    "lsn-mask": [("{language}/{layer}", {"measure": "neurons"})],
    "lsn-report": [
        "languages/{language}/{measure:counts|own}/{layer}", "languages/{language}/{measure}",
    ],
    "moe-routing": [
        LAYER + "/{measure:use_difference}/{component}", LAYER + "/{measure:divergence.*}",
        LAYER + "/{measure:\\w+}/{language}", "checkpoints/{step}/{measure:n_experts}/{language}",
        "checkpoints/{step}/{measure}",
    ],
    "rewind": [*CURVES, "{measure:largest|best|beyond}/{condition}/{also:.+}"],
    "router-steering": [
        ("steered/{step}/{condition}/{component}/{language}", {"measure": "change"}),
        "steered/{step}/{condition}/{component}/{language}/{measure}",
        ("unsteered/{step}/{language}", {"measure": "nll_per_byte"}),
    ],
    "rewind-singles": [*SETS, "single/layer_{layer}/{condition}/{measure}"],
    "runs": ["runs/{run}/values/{measure}/mean", "runs/{run}/{measure}"],
    "sentence-alignment": ["{measure:(?:published|unit_centred)/[^/]+}/{hidden_state}"],
    "sentence-retrieval": ["{measure:[^/]+}/{hidden_state}"],
    "spectrum": [
        "matrices/layer_{layer}.{component}/steps/{step}/{measure}", "pooled/{step}/{measure}",
        ("matrices/layer_{layer}.{component}/{measure}", {"step": 0}),
    ],
    "steering": [
        "sweep/{step}/layer_{layer}/{condition:\\w+/[^/]+}/{measure}", "{also:beyond}/{step}/{condition}",
        "{also:whole|best}/{step}/{condition}/{measure}", "{also:residual}/{step}/{measure}/layer_{layer}",
    ],
    "swap-controls": [
        "sets/{component}/{condition}/{measure:\\w+_accuracy}/{hidden_state}", *SETS,
        "additive/{measure}/{also:per_layer}/{layer}", "{also:matched}/{condition}/{measure}",
    ],
    "truncate": [*CURVES, "{measure:largest|beyond}/{condition}/{also:.+}"],
}  # fmt: skip
PREPARE: dict[str, Callable[[dict, dict], dict]] = {
    "activation_correlation": of_steps, "comparison": compared, "connect": by_measure, "layer-specialize": with_groups,
    "lm_eval": tasks, "lsn-mask": counted,
}  # fmt: skip
