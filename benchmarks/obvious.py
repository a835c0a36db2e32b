"""The obvious way to do what the scripts do, to measure them against: load everything with transformers, then loop.

The first two are commands, as a user would run them; the second prints the seconds that it took after its imports:

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
    """Mean |dW|, Frobenius norm and largest |dW| of every projection of both models, mapped from their files."""
    one, other = load(base).state_dict(), load(checkpoint).state_dict()
    found = {}
    for name, weight in one.items():
        if any(part in name for part in PROJECTIONS):
            difference = other[name].float() - weight.float()
            found[name] = {
                "mean_abs": difference.abs().double().mean().item(),
                "norm": difference.double().norm().item(),
                "max_abs": difference.abs().max().item(),
            }
    return found


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
    """Singular values of B, C and dW of every projection of `layers`: whole matrices by SVD, both models in memory."""
    one, other = load(base).float().to(device).state_dict(), load(checkpoint).float().to(device).state_dict()
    inside = [f".layers.{layer}." for layer in layers]
    names = [name for name in one if any(part in name for part in PROJECTIONS) and any(at in name for at in inside)]
    found = {name: (one[name], other[name], other[name] - one[name]) for name in names}
    return {name: [torch.linalg.svd(each, full_matrices=False)[1] for each in both] for name, both in found.items()}


# ---------------------------------------------------------------- forward passes


def states(model, sequences: list[list[int]], pad: int, batch_size: int):
    """Mean hidden states [layers + 1, sentences, hidden]: batches in the given order, all states and logits kept."""
    found = []
    for at in range(0, len(sequences), batch_size):
        rows = sequences[at : at + batch_size]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        stacked = torch.stack(output.hidden_states).float()
        found.append(((stacked * mask[:, :, None]).sum(2) / mask.sum(1)[:, None]).cpu())
    return torch.cat(found, dim=1)


@contextlib.contextmanager
def hooked(model, hook_of):
    """A forward hook `hook_of(layer)` on every layer's activation function."""
    hooks = [layer.mlp.act_fn.register_forward_hook(hook_of(number)) for number, layer in enumerate(model.model.layers)]
    yield
    for hook in hooks:
        hook.remove()


def _activations(model, ids):
    """The activations of every layer for blocks of ids, kept from hooks: layers x [blocks, size, neurons]."""
    kept: list[torch.Tensor] = []
    with torch.no_grad(), hooked(model, lambda _: lambda _m, _i, output: kept.append(output)):
        model(input_ids=ids.to(model.device))
    return kept


def counts(model, blocks):
    """Tokens with a positive activation, by layer and neuron: int64 [layers, neurons]."""
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
    """The loss of each sequence, one at a time, with masked neurons' activations set to zero by a hook that copies."""

    def silence(layer: int):
        def hook(_module, _input, output):
            output = output.clone()
            output[..., mask[layer]] = 0
            return output

        return hook

    found = []
    with torch.no_grad(), hooked(model, silence):
        for row in sequences:
            ids = torch.tensor([row], device=model.device)
            found.append(model(input_ids=ids, labels=ids).loss.item() * (len(row) - 1))
    return found


def main(argv=None) -> None:
    from transformers import LlamaForCausalLM  # noqa: F401  the imports that the first load would do

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
