"""The result of each step in one sentence, derived by rule from its numbers and claiming no more than they support.

A sentence says on which side of a bound a number lies only if its interval excludes the bound; numbers without an
interval are marked. Sentences contain no numbers: these follow below, and runs with the same answer share a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cpt_utils.base import cli, figures, languages
from cpt_utils.base.study import Study
from cpt_utils.measures import verdicts

headlines = cli.sibling("report/headlines.py")

BARE = "numbers without intervals"
FEW = 4  # names listed in a sentence; longer lists are counted
MEASURES = {
    "nll_per_byte": "loss", "task_accuracy": "the task", "retrieval_readout": "retrieval", "lsn_activation":
    "LSN activation",
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """The results of one step of a run.

    Attributes:
        numbers: the headline numbers, in the order of HEADLINES; None for one that is missing.
        rows: all numbers of the step; claims: the claims of claims.json; rich: the LSN-rich layers.
    """

    numbers: list[dict | None]
    rows: list[dict]
    study: Study
    claims: dict
    rich: list[int]

    def at(self, measure: str, **columns) -> list[dict]:
        """The rows of a measure at its last step that have these values in these columns."""
        rows = [row for row in self.rows if row["measure"] == measure and row["step"] != 0]
        rows = [row for row in rows if all(row[key] == value for key, value in columns.items())]
        last = max((row["step"] or 0 for row in rows), default=0)
        return [row for row in rows if (row["step"] or 0) == last]

    def target(self, row: dict) -> bool:
        code = self.study.get("languages.target")
        return bool(code and row["language"] and languages.same(row["language"], code))

    def of_claim(self, name: str, begins: str = "") -> dict | None:
        """The first deciding number of a claim whose name starts with `begins`."""
        rows = self.claims.get(name, {}).get("numbers", [])
        return next((row for row in rows if row["name"].startswith(begins)), None)


def answer(step: str, numbers: list[dict | None], rows: list[dict], study: Study, claims: dict, rich: list[int]) -> str:
    """The sentence on a step of one run; empty if the step has no rule or lacks the numbers for it."""
    step_results = Found(numbers, rows, study, claims, rich)
    return (ANSWERS[step](step_results) or "") if step in ANSWERS and rows else ""


def side(row: dict | None, bound: float = 0.0) -> int:
    """1 if the interval lies above the bound, -1 if below, 0 if it includes the bound or is missing."""
    if not row or row["value"] is None or row["ci_low"] is None or row["ci_high"] is None:
        return 0
    return (row["ci_low"] > bound) - (row["ci_high"] < bound)


def apart(one: dict, other: dict) -> int:
    """1 if the interval of `one` lies above that of `other`, -1 if below, 0 if they overlap or one is missing."""
    ends = [row[end] for row in (one, other) for end in ("ci_low", "ci_high")]
    return 0 if None in ends else (ends[0] > ends[3]) - (ends[1] < ends[2])


def listed(names: list, none: str = "none") -> str:
    return verdicts.listed(list(map(str, names))) if names else none


def layers(numbers: list) -> str:
    return f"layer{'s' * (len(numbers) != 1)} {listed(numbers)}"


# ---------------------------------------------------------------- a rule for each step


def retrieval(found: Found) -> str:
    best, *others = found.numbers
    words = {1: "higher than", -1: "lower than", 0: "not clearly higher than"}
    comparisons = [
        f"{words[apart(best, one)]} in {what}"
        for one, what in zip(others, ("the base", "an untrained model"), strict=True) if best and one
    ]  # fmt: skip
    if not best:
        return ""
    compared = f": {listed(comparisons)}, each at its own best hidden state" if comparisons else ""
    return f"Retrieval accuracy is highest at {best['where']}{compared}."


def split(found: Found) -> str:
    rows, least = found.at("in_hub"), found.numbers[2]
    hub, others = ([row["layer"] for row in rows if bool(row["value"]) == in_hub] for in_hub in (True, False))
    unsure = f" The assignment of {least['where']} is the least stable." if least else ""
    return f"The hub is {layers(hub)}; the interface is {layers(others)}.{unsure}" if rows else ""


def larger(one: str, other: str, more: str = "more") -> Callable[[Found], str]:
    """A rule for two numbers and their ratio, none of which has an interval."""

    def rule(found: Found) -> str:
        ratio = found.numbers[2]
        if not ratio:
            return ""
        ahead, behind = (one, other) if ratio["value"] > 1 else (other, one)
        return f"{headlines.capital(ahead)} {more} than {behind} ({BARE})."

    return rule


def followed(found: Found, at: tuple[int, int], words: tuple[str, str]) -> str:
    """Which of two correlations is larger."""
    rows = [found.numbers[i] for i in at]
    if None in rows:
        return ""
    ahead = apart(*rows)
    if ahead:
        return f"It follows {words[ahead < 0]} more closely than {words[ahead > 0]}."
    neither = ", and both include 0" if not any(map(side, rows)) else ""
    return f"Not clear: the intervals of the two correlations overlap{neither}."


def layer_swap(found: Found) -> str:
    fitted, plain, _ = found.numbers
    words = {1: "more", -1: "less", 0: "neither clearly more nor clearly less"}
    if not plain:
        return ""
    plain_words = f"the hub swap raises the loss {words[side(plain)]} than swaps of random layers do on average"
    if not fitted:
        return f"{headlines.capital(plain_words)}."
    text = f"At equal depth and seams, swapping hub layers raises the loss {words[side(fitted)]} than swapping others; "
    differ = side(plain) != side(fitted)
    why = " Random layers differ in depth and seams, which only the first comparison allows for."
    return f"{text}{plain_words}.{why if differ else ''}"


def language_loss(found: Found) -> str:
    rows = sorted(found.at("change"), key=lambda row: -abs(row["value"]))
    words = {-1: "falls", 1: "rises", 0: "does not clearly change"}
    changes = [
        f"{word} in {listed([figures.language(row['language']) for row in rows if side(row) == sign])}"
        for sign, word in words.items() if any(side(row) == sign for row in rows)
    ]  # fmt: skip
    return f"The loss {listed(changes)} (largest change first)." if changes else ""


def arms(found: Found) -> str:
    short, none = [], []
    for measure, words in MEASURES.items():
        rows = [row for row in found.at(f"share/{measure}") if row["run"] != "plain"]
        names = [row["run"] for row in rows if side(row, 1.0) < 0]
        who = listed(names) if len(names) <= FEW else f"{len(names)} of {len(rows)} arms"
        if rows:
            (short if names else none).append(f"in {words}: {who}" if names else words)
    text = f"Clearly short of the plain run {'; '.join(short)}." if short else ""
    return f"{text} {f'No arm clearly falls short in {listed(none)}.' if none else ''}".strip()


def compare(found: Found) -> str:
    rows = [row for row in found.rows if row["measure"].startswith("differences/") and row["ci_low"] is not None]
    clear = sum(bool(side(row)) for row in rows)
    return f"{clear} of {len(rows)} differences with an interval clearly differ from 0." if rows else ""


def lsn_mask(found: Found) -> str:
    counts = {row["layer"]: row["value"] for row in found.at("neurons") if found.target(row)}
    chosen: list[int] = []
    for layer in sorted(counts, key=lambda layer: (-counts[layer], layer)):
        if 2 * sum(counts[one] for one in chosen) < sum(counts.values()):
            chosen.append(layer)
    rich = f" LSN-rich: {layers(found.rich)}." if found.rich else ""
    return f"At least half of the new language's neurons are in {layers(sorted(chosen))}.{rich}" if chosen else ""


def deactivation(found: Found) -> str:
    harm, beyond, random = found.numbers
    if not harm or not beyond:
        return ""
    text = {1: "Silencing them harms the new language", -1: "Without them the new language is predicted better",
            0: "Silencing them does not clearly harm the new language"}[side(harm)]  # fmt: skip
    text += {1: "; the harm exceeds that to other languages", -1: "; the harm to other languages is larger",
             0: "; the harm does not clearly exceed that to other languages"}[side(beyond)]  # fmt: skip
    if random:
        less = random["value"] < beyond["value"]
        text += f"; with random neurons this difference is {'smaller' if less else 'as large or larger'} on average"
    return f"{text}."


def more_active(found: Found) -> str:
    last, base, _ = found.numbers
    if not last or not base:
        return ""
    return f"{'Yes' if last['value'] > base['value'] else 'No, on average they are less active'} ({BARE})."


def less_loss(place: str, words: str) -> Callable[[Found], str]:
    """A rule for attention against the FFN of the same layers, compared on the same documents."""

    def rule(found: Found) -> str:
        row = found.of_claim("C5a", f"attention minus FFN, {place}, loss")
        if not row or row["value"] is None:
            return ""
        more = {1: "more than", -1: "less than", 0: "neither clearly more nor clearly less than"}[side(row)]
        return f"On the same documents, the base's attention in {words} raises the loss {more} its FFN does."

    return rule


def ablation(found: Found) -> str:
    row = found.numbers[2]
    if not row:
        why = (found.of_claim("C8") or {}).get("note")
        return f"Cannot be judged: {why}." if why else ""
    return {1: "What serves perception comes earlier in the stack than what serves production.",
            -1: "What serves production comes earlier in the stack than what serves perception.",
            0: "Neither clearly comes earlier in the stack."}[side(row)]  # fmt: skip


def cogsym(found: Found) -> str:
    by_result: dict[str, list[str]] = {}
    for name, words in (("interface", "the interface"), ("change", "the layers that change most")):
        for p in found.at(f"overlaps/{name}/p_value"):
            by_result.setdefault("more" if p["value"] <= verdicts.ALPHA else "not clearly more", []).append(words)
    parts = [f"{how} than expected by chance with {listed(names)}" for how, names in by_result.items()]
    return f"Its layers overlap {listed(parts)}." if parts else ""


def runs(found: Found) -> str:
    margin, by_side = 0.03, {-1: [], 1: [], 0: []}  # measures by side of the margin
    for measure, words in list(MEASURES.items())[:3]:
        rows = [row for row in found.rows if row["measure"] == f"short_of_full/{measure}/short"]
        if rows:
            best = min(rows, key=lambda row: row["value"])
            by_side[side(best, margin)].append(words)
    words = {-1: "falls short by clearly less than 3 % in", 1: "falls short by clearly more than 3 % in",
             0: "is not clearly on either side of 3 % in"}  # fmt: skip
    parts = [f"{words[sign]} {listed(names)}" for sign, names in by_side.items() if names]
    return f"The best run that trains only a part {listed(parts)}." if parts else ""


def spectrum(found: Found) -> str:
    row = found.numbers[1]
    if not row:
        return ""
    how = {1: "More", -1: "Less", 0: "Neither clearly more nor clearly less"}[side(row, 1.0)]
    return f"{how} of the change lies in the singular values than for a random change of the same size."


def by_claim(name: str, words: tuple[str, str, str]) -> Callable[[Found], str]:
    """A rule for the deciding number of a claim; `words` for as claimed, contrary and not clear."""

    def rule(found: Found) -> str:
        row = found.of_claim(name)
        known = row and row["value"] is not None
        return words[("for", "against", "open").index(verdicts.standing(row))] if known else ""

    return rule


def rewind(found: Found) -> str:
    beyond, best = found.numbers[2:]
    order = {1: "More of the update", -1: "Less of the update", 0: "Not clearly more of the update"}
    helps = {1: "improves", -1: "worsens", 0: "neither clearly improves nor clearly worsens"}
    chosen = " Putting back the best share, chosen on half of the items, {} the loss on the other half."
    text = beyond and f"{order[side(beyond)]} can be put back with least changed heads first than in random order."
    return f"{text or ''}{chosen.format(helps[side(best)]) if best else ''}".strip()


def connect(found: Found) -> str:
    worst = found.numbers[0]
    if not worst:
        return ""
    text = {-1: "The line is below the chord in every language that training clearly improved.",
            0: "The line is not clearly above the chord.", 1: "The line is above the chord."}[side(worst)]  # fmt: skip
    base, other, this = (
        {row["language"]: row["value"] for row in found.rows
         if row["measure"] == headlines.LOSS and row["condition"] == name}
        for name in ("base", "other", "target")
    )  # fmt: skip
    bad = []
    for words, ends, rest in (("the other run", other, this), ("this run", this, other)):
        worse = [lang for lang in base if ends.get(lang, 0) > base[lang] > rest.get(lang, base[lang])]
        bad += [f"{words} is worse than the base in {listed([figures.language(lang) for lang in worse])}"] * bool(worse)
    high = "an end that bad raises the chord, and a line below it may still be worse than the base."
    return f"{text} But {listed(bad)}: {high}" if bad else text


def alignment(found: Found) -> str:
    best, *others = found.numbers
    words = {1: "more alike than", -1: "less alike than", 0: "not clearly more alike than"}
    comparisons = [
        f"{words[apart(best, one)]} in {what}"
        for one, what in zip(others, ("the base", "an untrained model"), strict=True) if best and one
    ]  # fmt: skip
    return f"The two geometries are {listed(comparisons)}, each at its own best hidden state." if comparisons else ""


def gradients(found: Found) -> str:
    _, beyond, apart_ = found.numbers
    if not beyond:
        return ""
    more = {1: "more alike than", -1: "less alike than", 0: "not clearly more alike than"}[side(beyond)]
    text = f"The gradients of a sentence and its translation are {more} those of a sentence and another's translation"
    where = {1: "more so in attention", -1: "more so in the FFN", 0: "not clearly more so in attention or the FFN"}
    return f"{text}{f', {where[side(apart_)]}' if apart_ else ''}."


def bigram(found: Found) -> str:
    now, base, beyond = found.numbers
    if not now or not base:
        return ""
    words = {1: "more closely than in the base", -1: "less closely than in the base",
             0: "not clearly more or less closely than in the base"}[apart(now, base)]  # fmt: skip
    more = {1: "more closely than unigrams", -1: "less closely than unigrams",
            0: "not clearly more closely than unigrams"}[side(beyond)]  # fmt: skip
    return f"Surprisal in the new language follows its bigrams {words}, and {more}."


def lsn_methods(found: Found) -> str:
    def of(measure: str) -> list[dict]:
        return [row for row in found.at(f"{measure}/selectivity") if found.target(row)]

    ahead, halves = next(iter(of("reported")), None), of("reports/selectivity")
    if not ahead:
        none = "On the half of the text used to choose, no method finds neurons whose silencing harms the new language."
        return none if halves else ""
    rest = [row for row in halves or of("selectivity") if row["condition"] != ahead["condition"]]
    clear = bool(rest) and side(ahead) > 0 and all(apart(ahead, row) > 0 for row in rest)
    harm = {1: "", -1: " (its selectivity is below 0)", 0: " (its selectivity is not clearly above 0)"}[side(ahead)]
    where = "half of the text, and on the other half" if halves else "the text, and on the same text"
    method = headlines.methods.WORDS.get(ahead["condition"], ahead["condition"])
    return (
        f"For the new language the neurons of {method} are the most selective on {where} "
        f"{'' if clear else 'not '}clearly ahead of all others{harm}."
    )


def steering(found: Found) -> str:
    rows = {row["step"] or 0: row for row in found.rows if (row["measure"], row["condition"]) == ("beyond", "random")}
    words = {1: "beats", -1: "falls behind", 0: "does not clearly beat"}
    by_result: dict[str, list[str]] = {}
    for step in sorted({0, max(rows, default=0)} & rows.keys()):
        by_result.setdefault(words[side(rows[step])], []).append("after CPT" if step else "in the base")
    phrases = [f"{word} random ones {' and '.join(where)}" for word, where in by_result.items()]
    return f"The best direction {listed(phrases)}." if phrases else ""


def routing(found: Found) -> str:
    now, change, _ = found.numbers
    layers_ = found.at("divergence/p_value")
    if not now or not layers_:
        return ""
    clear = sum(row["value"] <= verdicts.ALPHA for row in layers_)
    where = "all layers" if clear == len(layers_) else f"{clear} of {len(layers_)} layers"
    moved = {1: "further apart than in the base", -1: "less far apart than in the base",
             0: "not clearly further apart or closer than in the base"}[side(change)]  # fmt: skip
    return f"The languages are routed further apart than by chance in {where}, and on the whole {moved}."


def router_steering(found: Found) -> str:
    experts, random, _ = found.numbers
    if not experts:
        none = not any(row["measure"] == "change" for row in found.rows)
        return "No expert is used more in one language than in the other: there is nothing to steer." if none else ""
    worse = {1: "is predicted worse", -1: "is predicted better", 0: "is not clearly predicted worse"}[side(experts)]
    more = (
        random
        and f", {'more' if experts['value'] > random['value'] else 'no more'} than without random ones on average"
    )
    return f"Without its experts the new language {worse}{more or ''}."


ANSWERS: dict[str, Callable[[Found], str | None]] = {
    "retrieval": retrieval,
    "layers": split,
    "int_and_sem": larger("interface layers", "hub layers", "change more"),
    "downstream": lambda found: followed(found, (1, 2), ("interface layers", "hub layers")),
    "layer_swap": layer_swap,
    "language_loss": language_loss,
    "arms": arms,
    "compare": compare,
    "attn_vs_ffn": larger("attention", "the FFN", "changes more, relative to its size,"),
    "lsn_mask": lsn_mask,
    "deactivation": deactivation,
    "lsn_activation": more_active,
    "gate_lsn": larger("the weights of these neurons", "the weights of random neurons", "change more"),
    "activation_correlation": lambda found: followed(found, (0, 1), ("attention", "the neurons' own weights")),
    "attn_int_swap": less_loss("interface", "interface layers"),
    "ffn_lsn_swap": less_loss("LSN-rich layers", "LSN-rich layers"),
    "layer_ablation": ablation,
    "cogsym": cogsym,
    "runs": runs,
    "spectrum": spectrum,
    "heads": by_claim("D2", (
        "Yes: the most changed tenth holds clearly more than 1.2 times what it would by chance.",
        "No: the most changed tenth holds clearly less than 1.2 times what it would by chance.",
        "Whether the most changed tenth holds 1.2 times what it would by chance is not clear.",
    )),
    "rewind": rewind,
    "truncate": by_claim("D5", (
        "Low-rank in this sense: more singular values can be cut off than for a random update of the same size.",
        "Not low-rank: fewer singular values can be cut off than for a random update of the same size.",
        "Not clearly more singular values can be cut off than for a random update of the same size.",
    )),
    "connect": connect,
    "alignment": alignment,
    "gradients": gradients,
    "bigram": bigram,
    "lsn_methods": lsn_methods,
    "steering": steering,
    "routing": routing,
    "router_steering": router_steering,
}  # fmt: skip
