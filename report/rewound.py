"""What rewinding says about heads, from rewind.json: largest harmless shares against random heads, and best shares."""

from __future__ import annotations

from cpt_utils.base import cli
from cpt_utils.measures.verdicts import number

evidence, interventions = cli.sibling("report/evidence.py"), cli.sibling("report/interventions.py")


class Rewound:
    """rewind.json of a study.

    Attributes:
        curves: the orders of heads; measures: those compared by sentence, document or row.
    """

    def __init__(self, found: evidence.Results):
        self.file = found.file("rewind", "rewind")
        self.curves = {row["curve"] for row in self.file.payload["points"]}
        if not self.curves >= {"importance", "random"}:
            raise evidence.Missing(f"{self.file.path.name} lacks the order of importance or the random one")
        # The mean of retrieval over hidden states also says how deep the changed layers lie.
        self.measures = [name for name in self.file.payload["largest"]["importance"] if name != "retrieval_mean"]
        best = self.file.payload["best"]["importance"]
        self.n = {measure: row["n"] for measure, row in self.file.payload["at_equal_energy"].items()}
        self.n_held = {measure: row["n"] for measure, row in best.items()}

    def _number(self, name: str, measure: str, keys: tuple, n: dict, **more) -> dict:
        """The number at these keys with its interval, or why it is missing."""
        words, row = interventions.words(measure), self.file.payload
        for key in keys:
            has_parent, row = row is not None, (row or {}).get(key)
        if row is None:
            lacking = f"{self.file.path.name} has no such number for {words} (made by {self.file.made_by})"
            if has_parent and keys[-1] == "kept":
                lacking = f"CPT's gain in {words} is not clear"
            return number(f"{name}, {words}", None, note=lacking, **more)
        value, low, high = (self.file.at(*keys, key) for key in ("value", "ci_low", "ci_high"))
        return number(f"{name}, {words}", value, (low, high), n.get(measure), "units", **more)

    def beyond(self, name: str, curve: str, null: str, measure: str, axis: str, *kept: str, **more) -> dict:
        """The largest harmless share of a curve minus that of another."""
        return self._number(name, measure, ("beyond", curve, null, measure, axis, *kept), self.n, **more)

    def at_equal_energy(self, name: str, measure: str) -> dict:
        return self._number(name, measure, ("at_equal_energy", measure), self.n)

    def best(self, name: str, curve: str, measure: str, **more) -> dict:
        """How much better than the checkpoint the best share of a curve is, on the other half of the items."""
        return self._number(name, measure, ("best", curve, measure), self.n_held, **more)
