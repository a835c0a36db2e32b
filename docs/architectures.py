"""Write docs/architectures.md from the table in cpt_utils/architectures/arch_table.py: one row per model type.

python docs/architectures.py
"""

from __future__ import annotations

from pathlib import Path

from cpt_utils.architectures import arch_left_out, arch_table, archs

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Architectures

Written by `python docs/architectures.py` from `ARCHS` in `cpt_utils/architectures/arch_table.py`; a test compares the
two. {count} model types (`model_type` in config.json). For each one, `tests/test_architectures.py` makes tiny random
models and checks against slow references that inspect the running model: the location of every projection, bias, router
and expert, its weight change, swaps of layers, attention, FFN and single experts on disk and in memory, pooled hidden
states, and counts of active neurons. The models named as examples have these types; the tests do not use their weights.

- **attention, FFN**: modules of a layer, in the order q, k, v, o and gate, up, down. "q+k+v in" a module: fused, that
  is, several projections in one tensor, from which a swap or a comparison takes its slice; "per KV head" if their rows
  alternate by KV head. In a **latent attention** (MLA), q is `q_a_proj` and `q_b_proj` (or `q_proj` alone); k is
  `kv_a_proj_with_mqa` and the key rows of `kv_b_proj`; v is the value rows of `kv_b_proj`. The matrix that keys and
  values share counts as part of k, so every entry is counted, and swapped, once. For a projection made of several
  matrices, sums run over all their entries, and there are no sums by head. Other parameters of an attention (norms,
  sinks, a separate output gate, an indexer) belong to none of the four projections and move with whole layers.
- **heads**: a head has its rows of q, k and v, with their biases, and its columns of o, whatever the layout. A *unit*,
  the smallest part of an attention that can be swapped completely, is a KV head with the query heads that share it; a
  single query head has rows of q and columns of o. Heads also include their pieces of the parameters named in this
  column, if the config has them: segments of a norm over all heads (which still couples the heads, since it divides by
  the norm of all), attention sinks, rows of an output gate. "In pairs": a head is the difference of two, h and h + half
  of all; likewise a KV head. "Shared" marks the narrow layers of a latent attention. These, the output bias, norms
  shared by all heads, indexers and the like belong to no head; a swap of attention moves all units, the shared matrices
  and the output bias. A module that replaces attention has no heads here and none of the projections. In a layer that
  attends to another layer's keys, units are query heads alone.
- **in its place**: hybrids have layers without attention. The module in place of attention (linear attention, Mamba, a
  short convolution) does not count as attention: it only moves with whole layers. Such a layer is left out of means
  over attention and of swaps of attention, and every script names these layers; the same holds for layers without an
  FFN.
- **gate**: without one, the neurons are those of the up projection, and a layer has six projections.
- **experts**: for a mixture of experts (MoE); the config states their number and which layers are dense. On disk
  they are separate (`experts.N`) or all in one tensor, transposed or not, with gate and up concatenated or interleaved:
  each file is read in its own layout, and base and checkpoint may differ in it. The router is a separate component,
  neither attention nor FFN. An FFN beside the experts (shared experts) is part of the layer's FFN. Expert e has the
  neurons e I to e I + I - 1, counted over the tokens routed to it; those of the shared FFN come last, counted over all
  tokens.
- **norms**: the position of a layer's norms relative to the residual stream. They move with whole layers.

| model type | attention | heads | in its place | FFN | gate | experts | norms | for example | notes |
|---|---|---|---|---|---|---|---|---|---|
"""
WITH_TOWERS = """
## Language models with image towers

Only the language model is compared, swapped and measured; the other towers stay the target's. Its type is the one named
here, or the type of the table that the config's `text_config` names. A model of these types and its language model
alone count as the same architecture.

| model type | language model | below | for example |
|---|---|---|---|
"""
NOT_HERE = """
## Types that are not here

All other types for which transformers {release} has causal language models, alone or with towers beside them:

"""
FOOT = """
For a type that is not in the table, scripts stop with a message that gives the reason, or states which entry to add and
what `transformers` calls the modules of its layers. If these are Llama's names in all layers, the entry is
`"the_type": Arch()`; `Layers` in `cpt_utils/architectures/arch_layers.py` lists what can differ. Then run
`pytest tests/test_architectures.py -k the_type` (`TINY` in `tests/tiny.py` holds what a tiny config needs beyond the
usual sizes) and write this page again.

With `--dtype float64`, results do not depend on the batch, bit for bit, if all arithmetic is in float64. Gemma 2, Bloom
and MPT compute the softmax of their attention in float32 even then (differences of 4e-7 and less); XGLM has no float64.
"""


def modules(arch: archs.Arch, projections: tuple[str, ...]) -> str:
    """The modules of some projections below a layer; for fused modules, with the projections they hold."""
    texts = {}
    for slot in (slot for name in projections for slot in archs.as_slots(arch.projections_at.get(name, ()))):
        texts[slot.module] = slot.module
        if slot.order:
            parts = "+".join(part.removesuffix("_proj") for part in slot.order)
            groups = f" in {slot.groups} groups" if slot.groups else " per head" if "q_proj" not in slot.order else ""
            groups = groups or " per KV head"
            texts[slot.module] = parts + (groups if slot.by_group else "") + f" in `{slot.module}`"
    plain = [name for name, text in texts.items() if text == name]
    stems = {name.rpartition(".")[0] for name in plain}
    if len(plain) > 1 and len(stems) == 1:
        (stem,) = stems
        texts = {name: text for name, text in texts.items() if name not in plain}
        last = ", ".join(name.rpartition(".")[2] for name in plain)
        return ", ".join([*texts.values(), f"`{stem}`: {last}" if stem else last])
    return ", ".join(f"`{text}`" if text in plain else text for text in texts.values())


def heads(arch: archs.Arch) -> str:
    """The parameters that belong to single heads beside rows and columns, and those that all heads share."""
    pairs = ["in pairs"] if arch.differential else []
    slots = [slot for name in archs.ATTENTION for slot in archs.as_slots(arch.projections_at.get(name, ()))]
    shared = [f"`{slot.module.rpartition('.')[2]}` shared" for slot in slots if slot.shared]
    beside = [name for names in arch.with_heads.values() for name in names]
    named = dict.fromkeys(name.partition(".")[2].removesuffix(".weight").removesuffix(".bias") for name in beside)
    return ", ".join([*pairs, *(f"`{name.removesuffix('.{}')}`" for name in named), *shared])


def experts(arch: archs.Arch) -> str:
    spec = arch.experts_at
    if spec is None:
        return ""
    block = f"{spec.block}." if spec.block else ""
    cases = (("[in, out]", spec.transposed), ("gate and up interleaved", spec.interleaved))
    layout = [text for text, holds in cases if holds]
    names = ", ".join(spec.names[name] for name in archs.FFN if name in spec.names)
    described = f"in one tensor `{block}experts` ({', '.join(layout)})" if layout else f"`{block}experts.N`: {names}"
    slots = [slot for slots in spec.shared.values() for slot in archs.as_slots(slots)]
    beside = f"; beside them `{slots[0].module.rpartition('.')[0]}`" if slots else ""
    return f"{described}; router `{block}{spec.router}`{beside}"


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
    """The whole page, with types in the order of the table."""
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
