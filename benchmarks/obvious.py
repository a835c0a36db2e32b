"""The obvious way to do what the scripts do, as a reference: load everything with transformers, then loop.

Two are commands, as a user would run them; the second prints the seconds it took after its imports:

    python benchmarks/obvious.py compare BASE CHECKPOINT
    python benchmarks/obvious.py swap BASE CHECKPOINT OUT layers|ffn 1,3,5

The others are functions on a loaded model, for benchmarks/forward.py.
"""

from __future__ import annotations

import contextlib
import sys
import time

from cpt_utils.base import cli
from cpt_utils.base.errors import InputError
from cpt_utils.base.lazy import torch, transformers

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load(folder: str):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def compare(base: str, checkpoint: str) -> dict[str, dict[str, float]]:
    """Mean |dW|, Frobenius norm and largest |dW| of every projection; both models are mapped from their files."""
    before, after = load(base).state_dict(), load(checkpoint).state_dict()
    changes = {}
    for name, weight in before.items():
        if any(part in name for part in PROJECTIONS):
            difference = after[name].float() - weight.float()
            changes[name] = {
                "mean_abs": difference.abs().double().mean().item(),
                "norm": difference.double().norm().item(),
                "max_abs": difference.abs().max().item(),
            }
    return changes


def swap(base: str, checkpoint: str, out: str, component: str, layers: list[int]) -> None:
    """Copy tensors of the base over the checkpoint's, and save the model."""
    source, model = load(base).state_dict(), load(checkpoint)
    state = model.state_dict()
    for name in state:
        inside = any(f".layers.{layer}." in name for layer in layers)
        if inside and (component == "layers" or ".mlp." in name):
            state[name].copy_(source[name])
    model.save_pretrained(out)


def spectra(base: str, checkpoint: str, layers: list[int], device: str = "cpu") -> dict[str, list[torch.Tensor]]:
    """Singular values of B, C and dW of every projection in `layers`: SVD of whole matrices, both models in memory."""
    b, c = (load(folder).float().to(device).state_dict() for folder in (base, checkpoint))
    inside = [f".layers.{layer}." for layer in layers]
    names = [name for name in b if any(part in name for part in PROJECTIONS) and any(layer in name for layer in inside)]
    matrices = {name: (b[name], c[name], c[name] - b[name]) for name in names}
    return {name: [torch.linalg.svd(w, full_matrices=False)[1] for w in three] for name, three in matrices.items()}


# ---------------------------------------------------------------- forward passes


def states(model, sequences: list[list[int]], pad: int, batch_size: int):
    """Mean hidden states [layers + 1, sentences, hidden]: batches in the given order, all states and logits kept."""
    means = []
    for start in range(0, len(sequences), batch_size):
        rows = sequences[start : start + batch_size]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        stacked = torch.stack(output.hidden_states).float()
        means.append(((stacked * mask[:, :, None]).sum(2) / mask.sum(1)[:, None]).cpu())
    return torch.cat(means, dim=1)


@contextlib.contextmanager
def hooked(model, hook_of):
    """Register a forward hook `hook_of(layer)` on every layer's activation function."""
    hooks = [layer.mlp.act_fn.register_forward_hook(hook_of(number)) for number, layer in enumerate(model.model.layers)]
    yield
    for hook in hooks:
        hook.remove()


def _activations(model, ids):
    """The activations of every layer for blocks of ids, collected by hooks: layers x [blocks, size, neurons]."""
    kept: list[torch.Tensor] = []
    with torch.no_grad(), hooked(model, lambda _: lambda _m, _i, output: kept.append(output)):
        model(input_ids=ids.to(model.device))
    return kept


def counts(model, blocks):
    """Number of tokens with a positive activation, by layer and neuron: int64 [layers, neurons]."""
    return sum(torch.stack([(kept > 0).sum((0, 1)) for kept in _activations(model, part)]).cpu() for part in blocks)


def activations(model, blocks, mask: dict[int, list[int]]) -> float:
    """The mean activation of masked neurons over tokens and neurons."""
    total, number = 0.0, 0
    for part in blocks:
        for layer, kept in enumerate(_activations(model, part)):
            masked = kept[:, :, mask[layer]].double()
            total, number = total + masked.sum().item(), number + masked.numel()
    return total / number


def losses(model, sequences: list[list[int]], mask: dict[int, list[int]]) -> list[float]:
    """The loss of each sequence, one at a time; a hook sets a copy of the masked neurons' activations to zero."""

    def silence(layer: int):
        def hook(_module, _input, output):
            output = output.clone()
            output[..., mask[layer]] = 0
            return output

        return hook

    nlls = []
    with torch.no_grad(), hooked(model, silence):
        for row in sequences:
            ids = torch.tensor([row], device=model.device)
            nlls.append(model(input_ids=ids, labels=ids).loss.item() * (len(row) - 1))
    return nlls


def main(argv=None) -> None:
    from transformers import LlamaForCausalLM  # noqa: F401  untimed imports

    words = list(sys.argv[1:] if argv is None else argv)
    start = time.perf_counter()
    with torch.no_grad():
        if len(words) == 3 and words[0] == "compare":
            compare(*words[1:])
        elif len(words) == 6 and words[0] == "swap":
            swap(*words[1:5], [int(layer) for layer in words[5].split(",")])
            cli.say(f"{time.perf_counter() - start:.4f}")
        else:
            raise InputError("obvious.py takes: compare BASE CHECKPOINT, or swap BASE CHECKPOINT OUT KIND LAYERS")


if __name__ == "__main__":
    cli.run(main)
