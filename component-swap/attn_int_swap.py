"""Puts the base model's attention back into the interface layers of every checkpoint of a run (step 11).

q, k, v and o (weights and biases) of the interface layers come from the base, everything else from the checkpoint. If
attention in these layers is what routes the new language, retrieval should fall; compare with ffn_lsn_swap.py.

In:   B and RUN (default: the study's), LAYERS.json with `interface_layers` (default: the study's, from layer-specialize).
Out:  OUT/checkpoint-<step>/, complete model folders with a swap.json each, so OUT is a run for every script, and
      OUT/metadata.json. With --controls, instead: OUT/controls.json, .pt and figure, measured in memory on the last
      checkpoint: base, checkpoint, this swap, random layers of the same number, and the crossed conditions (attention or
      FFN, interface or LSN-rich layers, with and without embeddings and lm_head).

Full: python component-swap/attn_int_swap.py --base-model meta-llama/Llama-2-7b-hf --checkpoint-dir runs/eus --layer-selection layers.json --output-dir swapped/attn
Tiny: python component-swap/attn_int_swap.py --study demo/tiny.yaml --controls 10
"""  # noqa: E501

from __future__ import annotations

from cpt_utils.base import cli

component_swap = cli.sibling("component-swap/component_swap.py")

RESULTS = {"attn_int_swap": "component-swap/attn_int_swap"}
ASKED = {
    "attn_int_swap": (
        "What is lost when attention in interface layers is reset to the base, and is it more than with the FFN?"
    ),
}
OWN = "attention_interface"  # q, k, v, o in the layers of --layer-selection


def build_parser():
    p = cli.parser(__doc__)
    component_swap.add_flags(p, "interface")
    return p


def main(argv=None) -> None:
    component_swap.run(build_parser().parse_args(argv), OWN, "attn_int_swap")


if __name__ == "__main__":
    cli.run(main)
