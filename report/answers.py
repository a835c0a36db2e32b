"""What came out of each step in a sentence, made by rule from its numbers for any study, and never more than they say.

An interval that excludes a bound lets a sentence say on which side of it a number lies; a number without an interval is
told as such. No sentence has a number: these stand below it, and several runs with the same answer share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cpt_utils.base import cli, figures, languages
from cpt_utils.base.study import Study
from cpt_utils.measures import verdicts

headlines = cli.sibling("report/headlines.py")

BARE = "numbers without an interval"
FEW = 4  # names in a sentence; of more it says how many there are
MEASURES = {
    "nll_per_byte": "loss", "task_accuracy": "the task", "retrieval_readout": "retrieval", "lsn_activation":
    "LSN activation",
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What a run has of a step.

    Attributes:
        numbers: those that matter, in the order of HEADLINES; None where there is none.
        rows: all numbers of the step; claims: what claims.json says; head: the header of `lsn_layers`.
    """

    numbers: list[dict | None]
    rows: list[dict]
    study: Study
    claims: dict
    rich: list[int]

    def at(self, measure: str, **columns) -> list[dict]:
        """All numbers of a measure at the last step where columns are as said."""
        fit = [row for row in self.rows if row["measure"] == measure and row["step"] != 0]
        fit = [row for row in fit if all(row[key] == value for key, value in columns.items())]
        last = max((row["step"] or 0 for row in fit), default=0)
        return [row for row in fit if (row["step"] or 0) == last]

    def target(self, row: dict) -> bool:
        code = self.study.get("languages.target")
        return bool(code and row["language"] and languages.same(row["language"], code))

    def of_claim(self, name: str, begins: str = "") -> dict | None:
        """The first number that decides a claim, or that of these words."""
        rows = self.claims.get(name, {}).get("numbers", [])
        return next((row for row in rows if row["name"].startswith(begins)), None)


def answer(step: str, numbers: list[dict | None], rows: list[dict], study: Study, claims: dict, rich: list[int]) -> str:
    """The sentence on a step of one run; empty where there is no rule, or not the numbers for it."""
    found = Found(numbers, rows, study, claims, rich)
    return (ANSWERS[step](found) or "") if step in ANSWERS and rows else ""


def side(row: dict | None, bound: float = 0.0) -> int:
    """1 where an interval lies above the bound, -1 below, 0 where it includes it or there is none."""
    if not row or row["value"] is None or row["ci_low"] is None or row["ci_high"] is None:
        return 0
    return (row["ci_low"] > bound) - (row["ci_high"] < bound)


def apart(one: dict, other: dict) -> int:
    """1 where the interval of `one` lies above that of the other, -1 below, 0 where they overlap."""
    ends = [row[end] for row in (one, other) for end in ("ci_low", "ci_high")]
    return 0 if None in ends else (ends[0] > ends[3]) - (ends[1] < ends[2])


def listed(names: list, none: str = "none") -> str:
    return verdicts.listed(list(map(str, names))) if names else none


def layers(numbers: list) -> str:
    return f"layer{'s' * (len(numbers) != 1)} {listed(numbers)}"


# ---------------------------------------------------------------- a rule for each step


def retrieval(found: Found) -> str:
    best, *others = found.numbers
    words = {1: "more than", -1: "less than", 0: "not clearly more than"}
    told = [
        f"{words[apart(best, one)]} in {what}"
        for one, what in zip(others, ("the base", "an untrained model"), strict=True) if best and one
    ]  # fmt: skip
    state = best and f"Translations are found best at {best['where']}"
    return state and f"{state}{', ' * bool(told)}{listed(told, '')}{', each at its own best' * bool(told)}."


def split(found: Found) -> str:
    rows, least = found.at("in_hub"), found.numbers[2]
    hub, others = ([row["layer"] for row in rows if bool(row["value"]) == side] for side in (True, False))
    unsure = f" {least['where'].capitalize()} is the least sure of its side." if least else ""
    return f"The hub is {layers(hub)}, the interface {layers(others)}.{unsure}" if rows else ""


def larger(one: str, other: str, more: str = "more") -> Callable[[Found], str]:
    """Of two numbers and their ratio, which has no interval."""

    def told(found: Found) -> str:
        ratio = found.numbers[2]
        if not ratio:
            return ""
        ahead, behind = (one, other) if ratio["value"] > 1 else (other, one)
        return f"{headlines.capital(ahead)} {more} than {behind} ({BARE})."

    return told


def followed(found: Found, at: tuple[int, int], words: tuple[str, str]) -> str:
    """Which of two correlations is the larger one."""
    rows = [found.numbers[i] for i in at]
    if None in rows:
        return ""
    ahead = apart(*rows)
    if ahead:
        return f"It follows {words[ahead < 0]} more closely than {words[ahead > 0]}."
    neither = ", and both include 0" if not any(map(side, rows)) else ""
    return f"Not clear: the intervals of both correlations overlap{neither}."


def layer_swap(found: Found) -> str:
    beside, own, _ = found.numbers
    words = {1: "more", -1: "less", 0: "neither clearly more nor clearly less"}
    if not own:
        return ""
    plainly = f"the hub swap costs {words[side(own)]} loss than random layers do on average"
    if not beside:
        return f"{headlines.capital(plainly)}."
    text = f"Hub layers cost {words[side(beside)]} loss than other layers of like depth and seams; {plainly}."
    differ = side(own) != side(beside)
    return text + " Random layers lie elsewhere and in other pieces, which only the first allows for." * differ


def language_loss(found: Found) -> str:
    rows = sorted(found.at("change"), key=lambda row: -abs(row["value"]))
    words = {-1: "falls", 1: "rises", 0: "does not clearly change"}
    told = [
        f"{word} in {listed([figures.language(row['language']) for row in rows if side(row) == way])}"
        for way, word in words.items() if any(side(row) == way for row in rows)
    ]  # fmt: skip
    return f"The loss {listed(told)} (largest change first)." if told else ""


def arms(found: Found) -> str:
    short, none = [], []
    for measure, words in MEASURES.items():
        rows = [row for row in found.at(f"share/{measure}") if row["run"] != "plain"]
        names = [row["run"] for row in rows if side(row, 1.0) < 0]
        who = listed(names) if len(names) <= FEW else f"{len(names)} of {len(rows)} arms"
        if rows:
            (short if names else none).append(f"in {words} {who}" if names else words)
    text = f"Clearly short of the plain run: {'; '.join(short)}." if short else ""
    return f"{text} {f'No arm clearly in {listed(none)}.' if none else ''}".strip()


def compare(found: Found) -> str:
    rows = [row for row in found.rows if row["measure"].startswith("differences/") and row["ci_low"] is not None]
    clear = sum(bool(side(row)) for row in rows)
    return f"{clear} of {len(rows)} differences that have an interval are clear of 0." if rows else ""


def lsn_mask(found: Found) -> str:
    counts = {row["layer"]: row["value"] for row in found.at("neurons") if found.target(row)}
    chosen: list[int] = []
    for layer in sorted(counts, key=lambda layer: (-counts[layer], layer)):
        if 2 * sum(counts[one] for one in chosen) < sum(counts.values()):
            chosen.append(layer)
    rich = f" As LSN-rich count {layers(found.rich)}." if found.rich else ""
    return f"Half of the new language's neurons or more lie in {layers(sorted(chosen))}.{rich}" if chosen else ""


def deactivation(found: Found) -> str:
    harm, beyond, random = found.numbers
    if not harm or not beyond:
        return ""
    text = {1: "Silencing them harms the new language", -1: "Without them the new language is predicted better",
            0: "Silencing them does not clearly harm the new language"}[side(harm)]  # fmt: skip
    text += {1: ", and more than the others", -1: ", and the others more", 0: ", and not clearly more than the others"}[
        side(beyond)
    ]
    if random:
        less = random["value"] < beyond["value"]
        text += f"; random neurons do so {'less' if less else 'as much or more'} on average"
    return f"{text}."


def more_active(found: Found) -> str:
    last, base, _ = found.numbers
    if not last or not base:
        return ""
    return f"{'Yes' if last['value'] > base['value'] else 'No, on average they are less active'} ({BARE})."


def less_loss(place: str, words: str) -> Callable[[Found], str]:
    """Attention against the FFN of the same layers, compared on the same documents."""

    def told(found: Found) -> str:
        row = found.of_claim("C5a", f"attention minus FFN, {place}, loss")
        if not row or row["value"] is None:
            return ""
        text = {1: "more loss than", -1: "less loss than", 0: "neither clearly more nor clearly less loss than"}
        return f"Attention of the base in {words} costs {text[side(row)]} its FFN there, on the same documents."

    return told


def ablation(found: Found) -> str:
    row = found.numbers[2]
    if not row:
        why = (found.of_claim("C8") or {}).get("note")
        return f"It cannot be said: {why}." if why else ""
    return {1: "What serves perception comes earlier in the stack than what serves production.",
            -1: "What serves production comes earlier in the stack than what serves perception.",
            0: "Neither clearly comes earlier in the stack."}[side(row)]  # fmt: skip


def cogsym(found: Found) -> str:
    told: dict[str, list[str]] = {}
    for name, words in (("interface", "the interface"), ("change", "the layers that change most")):
        for p in found.at(f"overlaps/{name}/p_value"):
            told.setdefault("more" if p["value"] <= verdicts.ALPHA else "not clearly more", []).append(words)
    parts = [f"{how} than by chance with {listed(names)}" for how, names in told.items()]
    return f"Its layers overlap {listed(parts)}." if parts else ""


def runs(found: Found) -> str:
    margin, told = 0.03, {-1: [], 1: [], 0: []}
    for measure, words in list(MEASURES.items())[:3]:
        rows = [row for row in found.rows if row["measure"] == f"short_of_full/{measure}/short"]
        if rows:
            best = min(rows, key=lambda row: row["value"])
            told[side(best, margin)].append(words)
    words = {-1: "falls clearly less than 3 % short in", 1: "falls clearly more than 3 % short in",
             0: "is on neither side of 3 % clearly in"}  # fmt: skip
    parts = [f"{words[way]} {listed(names)}" for way, names in told.items() if names]
    return f"The best run that trains a part {listed(parts)}." if parts else ""


def spectrum(found: Found) -> str:
    row = found.numbers[1]
    return (
        row
        and {
            -1: "Less of the change lies in the singular values than of a random change of its size.",
            1: "More of the change lies in the singular values than of a random change of its size.",
            0: "Not clearly more or less of the change lies in the singular values than of a random one of its size.",
        }[side(row, 1.0)]
    )


def by_claim(name: str, words: tuple[str, str, str]) -> Callable[[Found], str]:
    """By the number that decides a claim: as it says, contrary to it, or neither."""

    def told(found: Found) -> str:
        row = found.of_claim(name)
        known = row and row["value"] is not None
        return words[("for", "against", "open").index(verdicts.standing(row))] if known else ""

    return told


def rewind(found: Found) -> str:
    beyond, best = found.numbers[2:]
    order = {1: "More of the update can go", -1: "Less of the update can go",
             0: "Not clearly more of the update can go"}  # fmt: skip
    helps = {1: "better", -1: "worse", 0: "neither clearly better nor clearly worse"}
    chosen = " The best share to put back, chosen on half of the items, makes the loss {} on the others."
    text = beyond and f"{order[side(beyond)]} where the least changed heads go first than in random order."
    return f"{text or ''}{chosen.format(helps[side(best)]) if best else ''}".strip()


def connect(found: Found) -> str:
    worst = found.numbers[0]
    if not worst:
        return ""
    text = {-1: "The line is below the chord in every language that training made clearly better.",
            0: "The line is not clearly above the chord.", 1: "The line is above the chord."}[side(worst)]  # fmt: skip
    base, other, own = (
        {row["language"]: row["value"] for row in found.rows
         if row["measure"] == headlines.LOSS and row["condition"] == name}
        for name in ("base", "other", "target")
    )  # fmt: skip
    bad = []
    for words, ends, rest in (("the other run", other, own), ("this run", own, other)):
        worse = [lang for lang in base if ends.get(lang, 0) > base[lang] > rest.get(lang, base[lang])]
        bad += [f"{words} is worse than the base in {listed([figures.language(lang) for lang in worse])}"] * bool(worse)
    high = "where an end is so bad, the chord is high, and a line below it may be worse than the base."
    return f"{text} But {listed(bad)}: {high}" if bad else text


def alignment(found: Found) -> str:
    best, *others = found.numbers
    words = {1: "more alike than", -1: "less alike than", 0: "not clearly more alike than"}
    told = [
        f"{words[apart(best, one)]} in {what}"
        for one, what in zip(others, ("the base", "an untrained model"), strict=True) if best and one
    ]  # fmt: skip
    return f"The two geometries are {listed(told, '')}, each at its own best state." if told else ""


def gradients(found: Found) -> str:
    _, beyond, apart_ = found.numbers
    if not beyond:
        return ""
    more = {1: "more alike than", -1: "less alike than", 0: "not clearly more alike than"}[side(beyond)]
    text = f"A sentence and its translation ask for changes {more} a sentence and another one's translation do"
    where = {1: "more so in attention", -1: "more so in the FFN", 0: "not clearly more in attention or in the FFN"}
    return f"{text}{f', {where[side(apart_)]}' if apart_ else ''}."


def bigram(found: Found) -> str:
    now, base, beyond = found.numbers
    if not now or not base:
        return ""
    words = {1: "more closely than the base's", -1: "less closely than the base's",
             0: "not clearly more or less closely than the base's"}[apart(now, base)]  # fmt: skip
    more = {1: "and goes with bigrams beyond unigrams", -1: "and less with bigrams than with unigrams",
            0: "and not clearly more with bigrams than with unigrams"}[side(beyond)]  # fmt: skip
    return f"The new language's surprisal follows its bigrams {words}, {more}."


def lsn_methods(found: Found) -> str:
    def of(measure: str) -> list[dict]:
        return [row for row in found.at(f"{measure}/selectivity") if found.target(row)]

    ahead, halves = next(iter(of("reported")), None), of("reports/selectivity")
    if not ahead:
        none = "On the half of the text that chooses, no method finds neurons whose silencing harms the new language."
        return none if halves else ""
    rest = [row for row in halves or of("selectivity") if row["condition"] != ahead["condition"]]
    clear = bool(rest) and side(ahead) > 0 and all(apart(ahead, row) > 0 for row in rest)
    harm = {1: "", -1: " (its selectivity is below 0)", 0: " (its selectivity is not clearly above 0)"}[side(ahead)]
    where = "half of the text, and on the other half" if halves else "the text, and on the same text"
    return (
        f"For the new language the neurons of {ahead['condition']} are the most selective on {where} "
        f"{'' if clear else 'not '}clearly ahead of all others{harm}."
    )


def steering(found: Found) -> str:
    rows = {row["step"] or 0: row for row in found.rows if (row["measure"], row["condition"]) == ("beyond", "random")}
    words = {1: "beats", -1: "falls behind", 0: "does not clearly beat"}
    told = [
        f"{'after CPT' if step else 'in the base'} the best direction {words[side(rows[step])]} random ones"
        for step in sorted({0, max(rows, default=0)} & rows.keys())
    ]
    return f"{headlines.capital(listed(told))}." if told else ""


def routing(found: Found) -> str:
    now, change, _ = found.numbers
    layers_ = found.at("divergence/p_value")
    if not now or not layers_:
        return ""
    clear = sum(row["value"] <= verdicts.ALPHA for row in layers_)
    where = "all layers" if clear == len(layers_) else f"{clear} of {len(layers_)} layers"
    moved = {1: "further apart than in the base", -1: "less far apart than in the base",
             0: "not clearly further apart or nearer than in the base"}[side(change)]  # fmt: skip
    return f"The languages are routed further apart than by chance in {where}, and on the whole {moved}."


def router_steering(found: Found) -> str:
    own, random, _ = found.numbers
    if not own:
        none = not any(row["measure"] == "change" for row in found.rows)
        return "No expert is used more in one language than in the other: there is nothing to steer." if none else ""
    worse = {1: "is predicted worse", -1: "is predicted better", 0: "is not clearly predicted worse"}[side(own)]
    more = random and f", {'more' if own['value'] > random['value'] else 'no more'} than without random ones on average"
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
    "attn_vs_ffn": larger("attention", "the FFN", "changes more, for its size,"),
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
        "Of low rank in this sense: more of its singular values can go than of a random update of that size.",
        "Not of low rank: less of its singular values can go than of a random update of that size.",
        "Not clearly more of its singular values can go than of a random update of that size.",
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
