"""Write docs/architectures.md from the table in cpt_utils/arch_table.py: one row for each model type.

python docs/architectures.py
"""

from __future__ import annotations

from pathlib import Path

from cpt_utils import archs

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Architectures

Written by `python docs/architectures.py` from `ARCHS` in `cpt_utils/arch_table.py`; a test compares the two. {count}
model types (`model_type` in config.json). For each one `tests/test_architectures.py` makes tiny random models and
checks against slow references that look into the running model: where every projection, bias, router and expert is, the weight
change of each, swaps of layers, attention, FFN and single experts on disk and in memory, pooled hidden states, and
counts of active neurons. The models named as examples are of these types; their own weights are not part of the tests.

- **attention, FFN**: modules of a layer, in the order q, k, v, o and gate, up, down. "q+k+v in" a module: fused,
  several projections in one tensor, of which a swap or a comparison takes its slice; "per KV head" if their rows
  alternate with the KV heads.
- **gate**: without one the neurons are those of the up projection, and a layer has six projections.
- **experts**: a mixture of experts (MoE). Experts are separate on disk and one parameter in memory (files that hold
  them as memory does are swapped, too); the router is a component of its own, neither attention nor FFN; neurons are
  counted over the tokens routed to their expert.
- **norms**: where the norms of a layer stand on the way from and to the residual stream. They move with whole layers.

| model type | attention | FFN | gate | experts | norms | for example | notes |
|---|---|---|---|---|---|---|---|
"""
FOOT = """
A type that is not here stops with a message that says which entry to add and what `transformers` calls the modules of
its layers. Where these are Llama's names the entry is `"the_type": Arch()`; what can differ is listed at `Arch`. Then
run `pytest tests/test_architectures.py -k the_type` (what its tiny config needs beyond the usual sizes stands in `TINY`
in `tests/helpers.py`) and write this page anew.

`--dtype float64` makes results independent of the batch, bit by bit, where the whole arithmetic is in float64. Gemma 2,
Bloom and MPT take their attention's softmax in float32 even then (differences of 4e-7 and less); XGLM has no float64.
"""


def modules(arch: archs.Arch, projections: tuple[str, ...]) -> str:
    """The modules of some projections below a layer, fused ones with what is in them."""
    found = {}
    for slot in (slot for name in projections for slot in archs.as_slots(arch.projections_at.get(name, ()))):
        found[slot.module] = slot.module
        if slot.order:
            parts = "+".join(part.removesuffix("_proj") for part in slot.order)
            found[slot.module] = parts + (" per KV head" if slot.by_group else "") + f" in `{slot.module}`"
    plain = [name for name, text in found.items() if text == name]
    stems = {name.rpartition(".")[0] for name in plain}
    if len(plain) > 1 and len(stems) == 1:
        (stem,) = stems
        found = {name: text for name, text in found.items() if name not in plain}
        last = ", ".join(name.rpartition(".")[2] for name in plain)
        return ", ".join([*found.values(), f"`{stem}`: {last}" if stem else last])
    return ", ".join(f"`{text}`" if text in plain else text for text in found.values())


def experts(arch: archs.Arch) -> str:
    if arch.experts_at is None:
        return ""
    names = ", ".join(arch.experts_at.names[name] for name in archs.FFN)
    return f"`{arch.experts_at.block}.experts.N`: {names}; router `{arch.experts_at.block}.gate`"


def row(arch: archs.Arch) -> str:
    cells = (
        f"`{arch.model_type}`",
        modules(arch, archs.ATTENTION),
        modules(arch, archs.FFN),
        "yes" if "gate_proj" in arch.projections() else "no",
        experts(arch),
        arch.norms,
        ", ".join(arch.examples),
        arch.notes,
    )
    return "| " + " | ".join(cells) + " |"


def page() -> str:
    """The whole page; types in the order of the table."""
    return HEAD.format(count=len(archs.ARCHS)) + "\n".join(map(row, archs.ARCHS.values())) + "\n" + FOOT


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
