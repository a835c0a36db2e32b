"""Write docs/architectures.md from the table in cpt_utils/architectures/arch_table.py: one row for each model type.

python docs/architectures.py
"""

from __future__ import annotations

from pathlib import Path

from cpt_utils.architectures import arch_left_out, arch_table, archs

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Architectures

Written by `python docs/architectures.py` from `ARCHS` in `cpt_utils/architectures/arch_table.py`; a test compares the
two. {count} model types (`model_type` in config.json). For each one `tests/test_architectures.py` makes tiny random
models and checks, against slow references that look into the running model: where every projection, bias, router and
expert is, the weight change of each, swaps of layers, attention, FFN and single experts on disk and in memory, pooled
hidden states, and counts of active neurons. The models named as examples are of these types; their own weights are not
part of the tests.

- **attention, FFN**: modules of a layer, in the order q, k, v, o and gate, up, down. "q+k+v in" a module: fused,
  several projections in one tensor, of which a swap or a comparison takes its slice; "per KV head" if their rows
  alternate with the KV heads. Of **latent attention** (MLA) q is `q_a_proj` and `q_b_proj` (or `q_proj` alone); k is
  `kv_a_proj_with_mqa` and the key rows of `kv_b_proj`, v its value rows: what both come from counts with k, so that
  every entry is counted, and swapped, once. A projection of several matrices has the sums over all of their entries,
  and no sums by head. What else an attention has (norms, sinks, an output gate of its own, an indexer) is none of the
  four, and moves with whole layers.
- **heads**: a head has its rows of q, k and v, with their biases, and its columns of o, whatever the layout. A *unit*,
  the smallest thing that can be put back whole, is a KV head with the query heads that share it; a single query head
  has rows of q and columns of o. With heads also go the pieces of what is named here, where the config has it:
  segments of a norm over all heads (which couples them all the same: it divides by the size of all), attention sinks,
  rows of an output gate. "In pairs": a head is the difference of two, h and h + half of all, and so is a KV head.
  "Shared" are the narrow layers of a latent attention. They and the output bias, norms that are the same for every
  head, indexers and the like belong to no head; all units with shared matrices and output bias are what a swap of
  attention moves. What a layer has instead of attention has no heads here, as it has none of the projections. Units of
  a layer that attends to another's keys are its query heads alone.
- **in its place**: hybrids have layers without attention. What stands there (linear attention, Mamba, a short
  convolution) is not attention: it moves with whole layers only. Such a layer enters no mean of attention and has
  nothing of it to swap, and every script says which layers these are; so it is with layers without an FFN.
- **gate**: without one the neurons are those of the up projection, and a layer has six projections.
- **experts**: a mixture of experts (MoE): how many there are, and which layers are dense, says the config. On disk
  they are separate (`experts.N`) or all in one tensor, transposed or not, gate and up one after the other or in turns:
  a file is read as it is, and base and checkpoint may differ in that. The router is a component of its own, neither
  attention nor FFN. An FFN beside the experts (shared experts) is a part of the layer's FFN. Neurons: expert e's are
  e I to e I + I - 1, counted over the tokens routed to it, and those beside the experts come last, counted over all
  tokens.
- **norms**: where the norms of a layer stand on the way from and to the residual stream. They move with whole layers.

| model type | attention | heads | in its place | FFN | gate | experts | norms | for example | notes |
|---|---|---|---|---|---|---|---|---|---|
"""
WITH_TOWERS = """
## Language models with image towers

Compared, swapped and measured is the language model; the other towers stay the target's. It is of the type named here,
or of whichever type of the table the config's `text_config` names. A model of these types and its language model alone
are one architecture.

| model type | language model | below | for example |
|---|---|---|---|
"""
NOT_HERE = """
## Types that are not here

All others that transformers {release} makes causal language models of, alone or with towers beside them:

"""
FOOT = """
A type that is not here stops with a message that gives the reason, or says which entry to add and what `transformers`
calls the modules of its layers. Where these are Llama's names in all layers the entry is `"the_type": Arch()`; what can
differ is listed at `Layers` in `cpt_utils/architectures/arch_layers.py`. Then run
`pytest tests/test_architectures.py -k the_type` (what its tiny config needs beyond the usual sizes stands in `TINY` in
`tests/tiny.py`) and write this page again.

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
            groups = f" in {slot.groups} groups" if slot.groups else " per head" if "q_proj" not in slot.order else ""
            groups = groups or " per KV head"
            found[slot.module] = parts + (groups if slot.by_group else "") + f" in `{slot.module}`"
    plain = [name for name, text in found.items() if text == name]
    stems = {name.rpartition(".")[0] for name in plain}
    if len(plain) > 1 and len(stems) == 1:
        (stem,) = stems
        found = {name: text for name, text in found.items() if name not in plain}
        last = ", ".join(name.rpartition(".")[2] for name in plain)
        return ", ".join([*found.values(), f"`{stem}`: {last}" if stem else last])
    return ", ".join(f"`{text}`" if text in plain else text for text in found.values())


def heads(arch: archs.Arch) -> str:
    """What goes with single heads beside their rows and columns, and what all heads share."""
    pairs = ["in pairs"] if arch.differential else []
    slots = [slot for name in archs.ATTENTION for slot in archs.as_slots(arch.projections_at.get(name, ()))]
    shared = [f"`{slot.module.rpartition('.')[2]}` shared" for slot in slots if slot.shared]
    beside = [name for names in arch.with_heads.values() for name in names]
    named = dict.fromkeys(name.partition(".")[2].removesuffix(".weight").removesuffix(".bias") for name in beside)
    return ", ".join([*pairs, *(f"`{name.removesuffix('.{}')}`" for name in named), *shared])


def experts(arch: archs.Arch) -> str:
    at = arch.experts_at
    if at is None:
        return ""
    block = f"{at.block}." if at.block else ""
    how = [how for how, true in (("[in, out]", at.transposed), ("gate and up in turns", at.interleaved)) if true]
    names = ", ".join(at.names[name] for name in archs.FFN if name in at.names)
    each = f"in one tensor `{block}experts` ({', '.join(how)})" if how else f"`{block}experts.N`: {names}"
    slots = [slot for slots in at.shared.values() for slot in archs.as_slots(slots)]
    beside = f"; beside them `{slots[0].module.rpartition('.')[0]}`" if slots else ""
    return f"{each}; router `{block}{at.router}`{beside}"


def row(arch: archs.Arch) -> str:
    cells = (
        f"`{arch.model_type}`",
        modules(arch, archs.ATTENTION),
        heads(arch),
        ", ".join(f"`{name}`" for name in dict.fromkeys(arch.mixers.values())),
        modules(arch, archs.FFN),
        "yes" if "gate_proj" in arch.projections() else "no",
        experts(arch),
        arch.norms,
        ", ".join(arch.examples),
        arch.notes,
    )
    return "| " + " | ".join(cells) + " |"


def tower(name: str) -> str:
    entry, arch = arch_table.TOWERS[name], archs.ARCHS[name]
    text = f"{entry.config_type} (as `{entry.text}`)" if entry.config_type else f"`{entry.text}`"
    return f"| `{name}` | {text} | `{arch.decoder_path}` | {', '.join(arch.examples)} |"


def page() -> str:
    """The whole page; types in the order of the table."""
    rows = [row(arch) for name, arch in archs.ARCHS.items() if name not in arch_table.TOWERS]
    left = [f"- {why}: {', '.join(f'`{t}`' for t in sorted(types))}" for why, types in arch_left_out.REASONS.items()]
    return "".join(
        (
            HEAD.format(count=len(archs.ARCHS)),
            "\n".join(rows) + "\n",
            WITH_TOWERS,
            "\n".join(map(tower, arch_table.TOWERS)) + "\n",
            NOT_HERE.format(release=arch_left_out.TRIED),
            "\n".join(left) + "\n",
            FOOT,
        )
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
