"""Puts the base model's FFN back into the layers richest in language-specific neurons, in every checkpoint (step 11).

gate, up and down (up and down without a gate; weights and biases) of these layers come from the base, everything else
from the checkpoint. If these neurons do not route the new language, retrieval should hold; compare with attn_int_swap.py.

In:   B and RUN (default: the study's), F with the LSN-rich layers (default: the study's, from lsn/identify.py).
Out:  OUT/checkpoint-<step>/, complete model folders with a swap.json each, so OUT is a run for every script, and
      OUT/metadata.json. With --controls, instead: OUT/controls.json, .pt and figure, measured in memory on the last
      checkpoint: base, checkpoint, this swap, random layers of the same number, and the crossed conditions (attention or
      FFN, interface or LSN-rich layers, with and without embeddings and lm_head).

Full: python component-swap/ffn_lsn_swap.py --base-model meta-llama/Llama-2-7b-hf --checkpoint-dir runs/eus --layer-list eus.layers.json --output-dir swapped/ffn
Tiny: python component-swap/ffn_lsn_swap.py --study demo/tiny.yaml --controls 10
"""  # noqa: E501

from __future__ import annotations

from cpt_utils.base import cli

component_swap = cli.sibling("component-swap/component_swap.py")

RESULTS = {"ffn_lsn_swap": "component-swap/ffn_lsn_swap"}
ASKED = {
    "ffn_lsn_swap": (
        "What is lost when the FFN of the layers richest in language-specific neurons is reset to the base?"
    ),
}
OWN = "ffn_lsn_rich"  # gate, up, down in the layers of --layer-list


def build_parser():
    p = cli.parser(__doc__)
    component_swap.add_flags(p, "lsn_rich")
    return p


def main(argv=None) -> None:
    component_swap.run(build_parser().parse_args(argv), OWN, "ffn_lsn_swap")


if __name__ == "__main__":
    cli.run(main)
