"""What the report shows first: the deciding number of each claim with a sentence, and a few numbers of each step.

Nothing is measured here: claims come from claims.json and numbers from report/rows.py; report/page.py shows them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from cpt_utils.base import cli, languages
from cpt_utils.base.study import Study
from cpt_utils.measures import verdicts

methods = cli.sibling("lsn/methods_shown.py")

MINUS = "−"
# What the numbers of one run say about a claim.
CONTRARY, CLAIMED, UNCLEAR, WITHOUT, UNMEASURED = "contrary", "as claimed", "not clear", "no interval", "not measured"
UNDEFINED = "cannot be judged"  # measured, but the number is undefined
RANK = [
    verdicts.YES, verdicts.NO, verdicts.OPEN, CLAIMED, CONTRARY, UNCLEAR, WITHOUT, UNDEFINED, UNMEASURED, verdicts.VOID,
]  # fmt: skip
ORDER = {"against": 0, "open": 1, "for": 2}  # the number that speaks most against a claim is shown

# ---------------------------------------------------------------- numbers in words


def decimals(value: float, low: float | None, high: float | None) -> int:
    """Decimal places that give the half width of the interval two digits, or a number without an interval three."""
    width = (high - low) / 2 if low is not None and high is not None else 0.0
    width = width if width > 1e-9 * abs(value) else abs(value) / 10  # no width but rounding
    return min(8, max(0, 1 - math.floor(math.log10(width)))) if 0 < width < math.inf else 3


def signed(value: float, places: int) -> str:
    text = f"{value:,.{places}f}"
    return text.replace("-", MINUS) if float(text.replace(",", "")) else text.lstrip("-")


def in_digits(
    value: float | None, low: float | None = None, high: float | None = None, bound: float | None = None
) -> str:
    """ "0.058 [0.037, 0.080]", with as many digits as the interval supports; whole numbers without one stay whole.

    With a `bound`, enough digits that no end of the interval is shown as equal to it.
    """
    if value is None:
        return "none"
    if low is None and float(value).is_integer() and abs(value) >= 1:
        return signed(value, 0)
    places = decimals(value, low, high)
    while bound is not None and places < 6 and any(
        abs(end) != abs(bound) and round(abs(end), places) == round(abs(bound), places)
        for end in (low, high) if end is not None
    ):  # fmt: skip
        places += 1
    text = signed(value, places)
    return text if low is None or high is None else f"{text} [{signed(low, places)}, {signed(high, places)}]"


# ---------------------------------------------------------------- claims


def deciding(numbers: list[dict]) -> dict | None:
    """The deciding number that speaks most against its claim, or least for it; None if there is none."""
    known = [row for row in numbers if row["value"] is not None]
    return min(known, key=lambda row: (ORDER[verdicts.standing(row)], _distance(row)), default=None)


def _distance(row: dict) -> float:
    """How far a number lies on the claim's side of its bound, in half widths of its interval; without an interval, as a
    share of |number| + |bound|."""
    low, high, says, value = row["ci_low"], row["ci_high"], row["says"], row["value"]
    distance = value - says["bound"] if says["side"] == "above" else says["bound"] - value
    distance = min(distance, value + says["bound"]) if says["side"] == "within" else distance
    no_interval = low is None or high is None or high <= low
    return distance / ((abs(value) + abs(says["bound"]) or 1.0) if no_interval else (high - low) / 2)


def lacking(why: str) -> str:
    """The word for a missing number: not measured if the reason `why` names a script that makes it, else undefined."""
    return UNMEASURED if ".py" in why else UNDEFINED


def outcome(claim: dict) -> str:
    """What the numbers of one run jointly say about their claim, in a word or two."""
    numbers = claim["numbers"]
    known = [row for row in numbers if row["value"] is not None]
    if not known:
        why = [row.get("note") or "" for row in numbers] or [claim["reason"]]
        return min(map(lacking, why), key=RANK.index)
    standings = {verdicts.standing(row) for row in known}
    if "against" in standings:
        return CONTRARY
    if all(row["ci_low"] is None for row in known):
        return WITHOUT
    return CLAIMED if standings == {"for"} and len(known) == len(numbers) else UNCLEAR


def why(claim: dict) -> str:
    """One sentence on what a verdict rests on, or why there is none."""
    numbers = claim["numbers"]
    if not numbers or claim["verdict"] == verdicts.VOID or (claim["verdict"] == verdicts.OPEN and not decided(claim)):
        return sentence(claim["reason"].removeprefix("not measured: "))
    notes = {row.get("note") for row in numbers}
    if all(row["value"] is None for row in numbers) and len(notes) == 1 and None not in notes:
        return sentence(notes.pop())
    text = counted(numbers)
    if claim["p_value"] is not None:
        text += f" ({verdicts.shown_p(claim['p_value'])} after Holm"
        needed = claim["seeds_needed"]
        text += f"; {needed} seeds would decide it)" if needed else ")"
    return sentence(text)


def decided(claim: dict) -> bool:
    """Whether the claim was tested over seeds."""
    return claim["p_value"] is not None


def counted(numbers: list[dict]) -> str:
    """ "2 of 4 numbers are contrary to the claim, 1 as claimed, 1 not clear"."""
    standings = {
        "contrary to the claim": 0, "as claimed": 0, "not clear": 0, "without an interval": 0, "not defined": 0,
        "not measured": 0,
    }  # fmt: skip
    for row in numbers:
        standings[standing(row)] += 1
    counts = {word: n for word, n in standings.items() if n}
    if len(numbers) == 1:
        (word,) = counts
        return {
            "not clear": f"its interval includes {numbers[0]['says']['bound']:g}",
            "without an interval": "one number over all weights: only several seeds give it an interval",
        }.get(word, f"the number is {word}")
    if len(counts) == 1:
        if len(numbers) == 2 and "not clear" in counts:
            return "neither number is clear"
        return f"{'both' if len(numbers) == 2 else f'all {len(numbers)}'} numbers are {next(iter(counts))}"
    (lead, n), *others = counts.items()
    return ", ".join(
        [f"{n} of {len(numbers)} numbers {'is' if n == 1 else 'are'} {lead}", *(f"{m} {word}" for word, m in others)]
    )


def standing(row: dict) -> str:
    """What a number says about its claim, in words."""
    if row["value"] is None:
        return "not defined" if lacking(row.get("note") or "") == UNDEFINED else "not measured"
    if row["ci_low"] is None:
        return "without an interval"
    return {"for": "as claimed", "against": "contrary to the claim", "open": "not clear"}[verdicts.standing(row)]


def capital(text: str) -> str:
    """The text with a capital first letter, unless it begins with a file name."""
    return text if "." in text.split(" ")[0] else text[:1].upper() + text[1:]


def sentence(text: str) -> str:
    return capital(text) + ("" if text.endswith(".") else ".")


# ---------------------------------------------------------------- the numbers of a step

TARGET, BASE, ANY = "languages.target", "languages.base", object()  # in `where`: the study's languages, any value
LOSS = "nll_per_byte"
PER_BYTE = "loss (nats per byte)"
OF_ANY = {"run": ANY, "language": TARGET}
ITS_EXPERTS = {"condition": "suppressed", "component": TARGET}


@dataclass(frozen=True)
class Spec:
    """A headline number as a query on the table of rows.py; of the matching rows, those of the last step count.

    Attributes:
        where: required values of columns.
        take: the row with the largest or smallest value ("max", "min"), or the layers with value 1 ("which").
        over: columns of the number to divide by; None: it is not divided.
    """

    words: str
    measure: str
    where: dict = field(default_factory=dict)
    take: str = ""
    over: dict | None = None


def between(
    words: str, one: tuple[str, str], other: tuple[str, str], measure: str, column: str, **more
) -> tuple[Spec, ...]:
    """A measure of two things, each given as (words, value of `column`), and their ratio."""
    first, second = ({column: value} | more for _, value in (one, other))
    return (
        Spec(f"{words}, {one[0]}", measure, first), Spec(f"{words}, {other[0]}", measure, second),
        Spec("the first over the second", measure, first, over=second),
    )  # fmt: skip


def lost(own: str) -> tuple[Spec, ...]:
    """What a swap costs in loss, compared with swaps of random layers."""
    at = f"comparison/{LOSS}"
    return (
        Spec(f"hub layers minus others at equal depth and seams (claim C2b), {PER_BYTE}",
             f"additive/{LOSS}/contrast_adjusted/semantic_hub"),
        Spec(f"{own} minus swaps of random layers, {PER_BYTE}", f"{at}/own_minus_random"),
        Spec(f"share of the gain in loss that {own} loses", f"{at}/own_gain_lost"),
    )  # fmt: skip


def swapped(place: str, words: str) -> tuple[Spec, ...]:
    named = (("the unchanged checkpoint", "target"), (f"attention of the base in {words}", f"attention_{place}"),
             (f"FFN of the base in {words}", f"ffn_{place}"))  # fmt: skip
    return tuple(Spec(f"{PER_BYTE}, {what}", LOSS, {"condition": condition}) for what, condition in named)


def cut(words: str, control: str, condition: str, null: str, axis: str) -> tuple[Spec, ...]:
    """How much of an update can be removed with 95 % of the gain in loss kept."""
    kept, beyond = f"largest/{LOSS}/{axis}/kept", f"beyond/{null}/{LOSS}/{axis}/kept"
    target = {"condition": condition, "language": TARGET}
    return (
        Spec(f"{words}, 95 % of the gain in loss kept", kept, target),
        Spec(f"the same for {control}", kept, target | {"condition": null}),
        Spec("their difference", beyond, target),
    )


HEADLINES: dict[str, tuple[Spec, ...]] = {
    "retrieval": (
        Spec("accuracy (published measure) at the best hidden state, last checkpoint", "layer_accuracy",
             {"condition": None}, "max"),
        Spec("the same for the base", "layer_accuracy", {"condition": None, "step": 0}, "max"),
        Spec("the same for an untrained model", "layer_accuracy", {"condition": "untrained"}, "max"),
    ),
    "alignment": (
        Spec("linear CKA at the best hidden state, tokens of length 1, last checkpoint", "unit_centred/cka",
             {"condition": None}, "max"),
        Spec("the same for the base", "unit_centred/cka", {"condition": None, "step": 0}, "max"),
        Spec("the same for an untrained model", "unit_centred/cka", {"condition": "untrained"}, "max"),
    ),
    "layers": (
        Spec("hub layers (layer i outputs hidden state i + 1)", "in_hub", take="which"),
        Spec("silhouette of the split (1: clear, 0: none)", "silhouette"),
        Spec("stability of the least stable layer", "label_stability", take="min"),
    ),
    "int_and_sem": between("mean |ΔW|", ("interface layers", "interface"), ("hub layers", "semantic_hub"), "mean_abs",
                           "component", layer=None),
    "downstream": (
        Spec("accuracy on the task, last checkpoint", "acc", {"component": None}),
        Spec("correlation of first differences with interface layers", "first_differences/correlation",
             {"component": "interface"}),
        Spec("correlation of first differences with hub layers", "first_differences/correlation",
             {"component": "semantic_hub"}),
    ),
    "layer_swap": lost("the hub swap"),
    "language_loss": (
        Spec(f"change of the {PER_BYTE}, new language", "change", {"language": TARGET}),
        Spec(f"change of the {PER_BYTE}, language of the base", "change", {"language": BASE}),
        Spec("largest change over all languages", "change", take="max"),
    ),
    "arms": (
        Spec("smallest share of the gain that an arm reaches, loss", f"share/{LOSS}", OF_ANY, "min"),
        Spec("the same for the task", "share/task_accuracy", {"run": ANY}, "min"),
        Spec("the same for retrieval, last hidden state", "share/retrieval_readout", {"run": ANY}, "min"),
        Spec("the same for the change in LSN activation", "share/lsn_activation", {"run": ANY}, "min"),
    ),
    "compare": tuple(
        Spec(f"{words}: other run minus the first (the largest)", f"differences/{measure}", {"run": ANY}, "max")
        for words, measure in (
            ("retrieval, mean over hidden states", "retrieval: published, mean over h_1 .. h_L"),
            (f"cost of the hub swap, {PER_BYTE}", "swaps: hub, loss"), ("accuracy on the task", "task: accuracy"),
        )
    ),
    "attn_vs_ffn": between("‖ΔW‖ / ‖W‖ over all weights", ("attention", "attention"), ("FFN", "ffn"), "pooled_relative",
                           "component"),
    "gradients": (
        Spec("cosine of the gradients of a sentence and its translation", "cosine", {"component": "all"}),
        Spec("the same minus that of shuffled pairs", "beyond", {"component": "all"}),
        Spec("the latter, attention minus FFN", "beyond", {"component": "attention_minus_ffn"}),
    ),
    "bigram": (
        Spec("correlation of surprisal with bigrams, new language", "bigram", {"language": TARGET}),
        Spec("the same for the base", "bigram", {"language": TARGET, "step": 0}),
        Spec("the former minus that with unigrams", "beyond", {"language": TARGET}),
    ),
    "lsn_mask": (
        Spec("neurons of the new language", "n_neurons", {"language": TARGET}),
        Spec("neurons of any language", "n_selected"),
        Spec("neurons of the model", "n_neurons", {"language": None}),
    ),
    "deactivation": (
        Spec("change of the loss per token, new language without its neurons", "diagonal/harm", {"condition": TARGET}),
        Spec("the same minus the mean harm to other languages", "selectivity/selectivity", {"condition": TARGET}),
        Spec("the latter with random neurons, mean", "selectivity/random_mean", {"condition": TARGET}),
    ),
    "lsn_methods": (
        Spec("selectivity of the most selective method, chosen on the other half of the text, new language",
             "reported/selectivity", {"language": TARGET}, "max"),
        Spec("the same for LAPE, on all of the text", "selectivity/selectivity",
             {"language": TARGET, "condition": "lape"}),
        Spec("lowest agreement between two methods (Jaccard)", "agreement/jaccard", {"language": TARGET}, "min"),
    ),
    "lsn_activation": (
        Spec("mean activation, last checkpoint", "activation/all_layers", {"condition": "lsn"}),
        Spec("mean activation, base", "activation/all_layers", {"condition": "lsn", "step": 0}),
        Spec("mean activation of random neurons, last checkpoint", "activation/all_layers", {"condition": "control"}),
    ),
    "gate_lsn": between("mean |ΔW|", ("the language's neurons", "lsn"), ("random neurons", "control"), "mean_abs",
                        "condition", layer=None),
    "activation_correlation": (
        Spec("correlation of first differences with attention in the interface",
             "interface_attention/first_differences/pearson/correlation"),
        Spec("the same with the neurons' own weights", "lsn_ffn/first_differences/pearson/correlation"),
        Spec("the latter minus that with random neurons",
             "lsn_ffn_minus_control/first_differences/pearson/correlation"),
    ),
    "attn_int_swap": swapped("interface", "interface layers"),
    "ffn_lsn_swap": swapped("lsn_rich", "LSN-rich layers"),
    "layer_ablation": (
        Spec("A(perception): above 0 if it comes with early layers", "perception/A"),
        Spec("A(production): below 0 if it comes with late layers", "production/A"),
        Spec("specialisation: their difference, if both improved", "specialisation"),
    ),
    "runs": (
        Spec("shortfall of the best run that trains only a part, as a share of the full run's score, loss",
             f"short_of_full/{LOSS}/short", OF_ANY, "min"),
        Spec("the same for the task", "short_of_full/task_accuracy/short", {"run": ANY}, "min"),
        Spec("the same for retrieval, last hidden state", "short_of_full/retrieval_readout/short", {"run": ANY}, "min"),
    ),
    "cogsym": (
        Spec("share of the layers that are trained", "share_of_layers"),
        Spec("overlap with the interface (Jaccard)", "overlaps/interface/jaccard"),
        Spec("overlap expected by chance", "overlaps/interface/expected"),
    ),
    "spectrum": (
        Spec("share of the change that lies in the singular values", "value_share", {"component": None}),
        Spec("that share over a random change's (brackets: where another random draw would lie)",
             "nulls/gaussian/ratio", {"component": None}),
        Spec("share of it that only scales the base, as weight decay does", "scale_share", {"component": None}),
        Spec("share of the rest that lies in the singular values", "unscaled_value_share", {"component": None}),
        Spec("effective rank of the change over the size of the matrix, median", "effective_rank", {"component": None}),
    ),
    "heads": (
        Spec("share of the update in the tenth of the heads (rounded up) that changed most", "concentration/top_share"),
        Spec("the same with features permuted", "concentration/permuted"),
        Spec("the same if heads changed in proportion to their size", "concentration/in_proportion"),
        Spec("number of these heads", "concentration/k"),
    ),
    "rewind": (
        *cut("share of the update that can be put back, least changed heads first", "heads in random order",
             "importance:energy", "random:energy", "energy"),
        Spec(f"improvement with some of these heads put back (claim D4), {PER_BYTE}", f"best/{LOSS}",
             {"condition": "importance", "language": TARGET}),
    ),
    "truncate": cut("share of the singular values that can be cut off, smallest first", "a random update of that size",
                    "svd", "as_random", "at"),
    "steering": (
        Spec("score of the best direction, last checkpoint", "score/best", {"condition": "diffmean"}),
        Spec("the same for the best random direction", "score/best", {"condition": "random"}),
        Spec("score of a prompt with translations, without steering", "score/whole", {"condition": "prompt"}),
    ),
    "connect": (
        Spec("largest barrier over all languages, as a share of the gain in loss (below 0: none)", f"worst/{LOSS}",
             {"language": ANY}, "max"),
        Spec(f"{PER_BYTE}, new language, the other run (a = 0)", LOSS, {"condition": "other", "language": TARGET}),
        Spec("the same for this run (a = 1)", LOSS, {"condition": "target", "language": TARGET}),
        Spec("the same for the base", LOSS, {"condition": "base", "language": TARGET, "step": 0}),
    ),
    "routing": (
        Spec("divergence of the languages' routing, last checkpoint, mean over layers", "divergence", {"layer": None}),
        Spec("its change from the base", "change"),
        Spec("experts that the new language uses more", "n_experts", {"language": TARGET}),
    ),
    "router_steering": (
        Spec(f"change of the {PER_BYTE} without its experts, new language", "change",
             ITS_EXPERTS | {"language": TARGET}),
        Spec("the same without random experts, mean", "random_mean", ITS_EXPERTS | {"language": TARGET}),
        Spec("change in the language of the base", "change", ITS_EXPERTS | {"language": BASE}),
    ),
}  # fmt: skip


def three(step: str, rows: list[dict], study: Study) -> list[tuple[str, dict | None]]:
    """(words, row) of the headline numbers of a step; a row is None if the result lacks the number."""
    return [(spec.words, ratio(spec, rows, study)) for spec in HEADLINES.get(step, ())]


def ratio(spec: Spec, rows: list[dict], study: Study) -> dict | None:
    """The number of `spec`, divided by another if `spec.over` is given."""
    row = lookup(spec, rows, study)
    if spec.over is None or row is None:
        return row
    other = lookup(replace(spec, where=spec.over), rows, study)
    return row | {"value": row["value"] / other["value"], "ci_low": None} if other and other["value"] else None


def lookup(spec: Spec, rows: list[dict], study: Study) -> dict | None:
    """The row that holds the number of `spec`; rows of the base (step 0) count only if `spec` names a step."""
    where = {"run": study.arm or "plain"} | spec.where
    matches = [row for row in rows if row["measure"] == spec.measure and all(map(_fits(row, study), where.items()))]
    matches = [row for row in matches if row["step"] != 0 or "step" in where]
    last = max((row["step"] or 0 for row in matches), default=0)
    matches = [row for row in matches if (row["step"] or 0) == last]
    if not matches or not spec.take:
        return matches[0] if matches else None
    if spec.take == "which":
        return matches[0] | {"text": ", ".join(str(row["layer"]) for row in matches if row["value"]) or "none"}
    row = (max if spec.take == "max" else min)(matches, key=lambda one: one["value"])
    return row | {"where": _place(row, (None, "plain", study.arm))}


def _fits(row: dict, study: Study):
    def fits(wanted: tuple) -> bool:
        column, value = wanted
        if value is ANY:
            return True
        if value in (TARGET, BASE):
            code = study.get(value)
            return bool(code and row[column]) and languages.same(row[column], code)
        return row[column] == value

    return fits


def _place(row: dict, usual: tuple) -> str:
    """Which of several rows this is, e.g. "hidden state 4"; values in `usual` are not mentioned."""
    of_text = row["result"] in ("language_loss", "connect")
    if row["result"] == "lsn_methods" and row["condition"]:
        return " and ".join(methods.WORDS.get(name, name) for name in row["condition"].split(" and "))
    columns = ("language",) if of_text else ("run", "hidden_state", "layer")
    return ", ".join(f"{name.replace('_', ' ')} {row[name]}" for name in columns if row[name] not in usual)
