"""Every type of the table: weight change, surgery, hidden states and counts against slow references.

The references never ask the table where something is. They find it by running the loaded model: which rows of a fused
projection reach the attention as queries, which matrix feeds the activation, which half of the experts' parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from helpers import EVERY_ARCHITECTURE, ROOT, bits, load_script, read_tensors, save_tiny, tiny_model
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from cpt_utils import archs, compare, refs, surgery
from cpt_utils.batching import padded
from cpt_utils.errors import InputError
from cpt_utils.hooks import pooled_states
from cpt_utils.neurons import Counter

LAYERS = 3
# Other layouts of the same type, by config.
VARIANTS = {
    "falcon, groups": ("falcon", {"new_decoder_architecture": True}),
    "falcon, all heads": ("falcon", {"multi_query": False, "num_kv_heads": 4, "bias": True, "parallel_attn": False}),
    "gpt_bigcode, all heads": ("gpt_bigcode", {"multi_query": False}),
    "stablelm, norms on q and k": ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True}),
}
CASES = {name: (name, {}) for name in EVERY_ARCHITECTURE} | VARIANTS
MIXTURES = [name for name in EVERY_ARCHITECTURE if archs.ARCHS[name].experts_at]
IDS = torch.arange(3, 40)[None]

Rows = slice | torch.Tensor
View = tuple[torch.Tensor, Rows]  # a matrix [out, in] or bias [out], and the rows that are a projection's
Where = tuple[nn.Module, Rows]


def load(folder) -> nn.Module:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def blocks_of(model) -> nn.ModuleList:
    """The decoder's layers: the one list of LAYERS modules outside a vision tower."""
    lists = [m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and "vision" not in name]
    (found,) = [m for m in lists if len(m) == LAYERS]
    return found


@dataclass
class Case:
    """Base (float16 on disk) and target (float32) of one type, as folders and loaded."""

    name: str
    base: Path
    target: Path

    @cached_property
    def models(self):
        return load(self.base), load(self.target)

    @cached_property
    def arch(self):
        return archs.for_config(self.models[1].config)


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory) -> Case:
    model_type, config = CASES[request.param]
    folder = tmp_path_factory.mktemp("architecture")
    made = [
        save_tiny(model_type, folder / name, seed=seed, dtype=dtype, **config)
        for seed, (name, dtype) in enumerate((("base", "float16"), ("target", "float32")))
    ]
    return Case(request.param, *made)


# --- where everything is, found by running the model ---


def matrix(module) -> torch.Tensor:
    """The weight as [out, in], a view."""
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


def run_recorded(model, block) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every module in a layer, of one token at position 0, where rotary positions turn nothing."""
    seen, handles = {}, []
    for name, module in block.named_modules():
        if not list(module.children()):

            def hook(_module, args, output, name=name):
                if args and isinstance(output, torch.Tensor):
                    seen[name] = args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1])

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(torch.tensor([[7]]))
    for handle in handles:
        handle.remove()
    return seen


def split_rows(model, attention, linear) -> dict[str, torch.Tensor]:
    """Rows of a fused q, k, v module by what they become: it is made to put out row numbers, and those that arrive at
    the attention are read off."""
    rows = matrix(linear).shape[0]
    numbers = torch.arange(rows, dtype=torch.float32).view(1, 1, rows)
    kind = type(attention).__name__
    if kind == "BloomAttention":
        arrived = attention._reshape(numbers)
    elif kind == "MptAttention":
        arrived = numbers.chunk(3, dim=2)
    else:
        arrived, own = [], functional.scaled_dot_product_attention

        def catch(query, key, value, **kwargs):
            arrived.append((query, key, value))
            return own(query, key, value, **kwargs)

        def put_out_numbers(*_):
            arrived.clear()  # what is caught first from here on is this layer's
            return numbers

        handle = linear.register_forward_hook(put_out_numbers)
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(functional, "scaled_dot_product_attention", catch)
            model(torch.tensor([[7]]))
        handle.remove()
        arrived = arrived[0]
    # Keys and values may arrive once for each query head that shares them; queries keep their order.
    return {name: torch.unique(found.flatten()).long() for name, found in zip("qkv", arrived, strict=True)}


def ffn_of(block, seen, linears) -> tuple[dict[str, Where], nn.Module]:
    """Gate, up and down of a dense layer and its activation, told by their widths and by what feeds the activation."""
    down = next(name for name in linears if matrix(linears[name]).shape[1] != 32)
    width, parent = matrix(linears[down]).shape[1], down.rpartition(".")[0]
    others = [name for name in linears if name.rpartition(".")[0] == parent and name != down]
    (act,) = [name for name, (x, _) in seen.items() if name not in linears and x.shape[-1] == width]
    pieces = {}
    for name in others:
        for start in range(0, matrix(linears[name]).shape[0], width):
            rows = slice(start, start + width)
            pieces[name, start] = (linears[name], rows), torch.equal(seen[name][1][:, rows], seen[act][0])
    (feeding,) = [place for place, feeds in pieces.values() if feeds]
    rest = [place for place, feeds in pieces.values() if not feeds]
    assert len(rest) <= 1
    gate_up = {"gate_proj": feeding, "up_proj": rest[0]} if rest else {"up_proj": feeding}
    return gate_up | {"down_proj": (linears[down], slice(None))}, block.get_submodule(act)


def attention_of(model, block, linears) -> dict[str, Where]:
    """q, k, v, o among the matrices of an attention: four by their names, or two, of which the larger one is fused."""
    if len(linears) == 2:
        fused, out = sorted(linears, key=lambda name: -len(matrix(linears[name])))
        owner = block.get_submodule(fused.rpartition(".")[0])
        found = {name: (linears[fused], rows) for name, rows in split_rows(model, owner, linears[fused]).items()}
    else:
        named = {name.rpartition(".")[2]: name for name in linears}
        found = {name: (linears[named.pop(f"{name}_proj")], slice(None)) for name in "qkv"}
        (out,) = named.values()
    return {f"{name}_proj": place for name, place in found.items()} | {"o_proj": (linears[out], slice(None))}


def found_in(model, layer: int) -> tuple[dict[str, list[View]], dict[str, list[View]], nn.Module]:
    """Weights and biases of every projection of a layer as views of the model's parameters, and the activation."""
    block = blocks_of(model)[layer]
    seen, experts = run_recorded(model, block), experts_of(block)
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    where, activation = ffn_of(block, seen, linears) if experts is None else ({}, experts.act_fn)
    ffn = {module for module, _ in where.values()}
    where |= attention_of(model, block, {name: m for name, m in linears.items() if m not in ffn})
    weights = {name: [(matrix(m), rows)] for name, (m, rows) in where.items()}
    biases = {name: [(m.bias.data, rows)] for name, (m, rows) in where.items() if m.bias is not None}
    if experts is not None:
        (router,) = [m for m in block.modules() if type(m).__name__.endswith("TopKRouter")]
        weights |= experts_in(experts) | {"router": [(router.weight.data, slice(None))]}
    return weights, biases, activation


def experts_of(block) -> nn.Module | None:
    """The module that holds a layer's experts as parameters with three dimensions; None of a dense layer."""
    return next((m for m in block.modules() if any(p.dim() == 3 for p in m.parameters(recurse=False))), None)


def experts_in(experts) -> dict[str, list[View]]:
    """Gate, up and down of every expert; the gate is the half whose outputs arrive at the activation."""
    fused, width = experts.gate_up_proj.data, experts.gate_up_proj.shape[1] // 2
    token, arrived = torch.linspace(-1, 1, fused.shape[2])[None], []
    handle = experts.act_fn.register_forward_pre_hook(lambda _module, args: arrived.append(args[0]))
    with torch.no_grad():
        experts(token, torch.tensor([[2]]), torch.ones(1, 1))
    handle.remove()
    halves = [slice(0, width), slice(width, 2 * width)]
    feeds = [any(torch.allclose(x, token @ fused[2][rows].T, atol=1e-6) for x in torch.cat(arrived)) for rows in halves]
    assert feeds.count(True) == 1
    halves.sort(key=lambda rows: not feeds[rows.start > 0])
    return {
        "gate_proj": [(expert, halves[0]) for expert in fused],
        "up_proj": [(expert, halves[1]) for expert in fused],
        "down_proj": [(expert, slice(None)) for expert in experts.down_proj.data],
    }


# --- the tests ---


def test_parts_are_what_the_model_computes_with(case):
    """Of every projection, expert and router, weight and bias: the on-disk part is the found one, bit for bit."""
    model, disk = case.models[1], read_tensors(case.target)
    arch, config = case.arch, model.config.to_dict()
    for layer in range(LAYERS):
        weights, biases, activation = found_in(model, layer)
        assert arch.activation_module(model, layer) is activation
        assert set(weights) == {*arch.projections(config), *(["router"] if arch.has_router(config, layer) else [])}
        for projection, views in weights.items():
            parts = arch.parts(config, layer, projection, disk)
            for role, found in (("weight", views), ("bias", biases.get(projection, []))):
                taken = [part.take(disk[part.tensor]) for part in parts if part.role == role]
                taken = [t.T if arch.transposed and role == "weight" else t for t in taken]
                assert len(taken) == len(found), (layer, projection, role)
                for mine, (tensor, rows) in zip(taken, found, strict=True):
                    assert torch.equal(mine, tensor[rows]), (layer, projection, role)
        units = weights["gate_proj"] if "gate_proj" in weights else weights["up_proj"]
        assert arch.ffn_width(config, layer) == sum(len(tensor[rows]) for tensor, rows in units)
        assert arch.experts(config, layer) == (len(units) if arch.has_router(config, layer) else 0)
    assert arch.ffn_width(config) == max(arch.ffn_width(config, layer) for layer in range(LAYERS))


def test_every_tensor_on_disk_has_its_place(case):
    model, disk = case.models[1], read_tensors(case.target)
    state, covered = model.state_dict(), {}
    for name, place in case.arch.module_places(disk, model).items():
        own = state[place.name] if place.index is None else state[place.name][place.index]
        assert torch.equal(own, disk[name]), name
        covered[place.name] = covered.get(place.name, 0) + own.numel()
    tied = {"lm_head.weight"} - set(disk)
    assert {name: tensor.numel() for name, tensor in state.items() if name not in tied} == {
        name: count for name, count in covered.items() if name not in tied
    }
    layers = [case.arch.layer_tensors(disk, layer) for layer in range(LAYERS)]
    for found, block in zip(layers, blocks_of(model), strict=True):
        assert sum(disk[name].numel() for name in found) == sum(t.numel() for t in block.state_dict().values())
    outside = set(disk) - {name for found in layers for name in found}
    embedded = {disk[name].data_ptr(): name for name in case.arch.embedding_tensors(disk)}
    assert set(embedded.values()) <= outside
    wanted = [model.get_input_embeddings().weight] + ([] if tied else list(model.get_output_embeddings().parameters()))
    assert all(any(torch.equal(disk[name], tensor) for name in embedded.values()) for tensor in wanted)
    assert not [name for name in outside - set(embedded.values()) if "embed_pos" in name or "wpe" in name]


def test_weight_change(case):
    """Sums over float64 differences of the loaded models, expert by expert."""
    base, target = case.models
    found = compare.changes(refs.model(case.base), [refs.model(case.target)])
    (found,) = found.values()
    for layer in range(LAYERS):
        before, after = found_in(base, layer)[0], found_in(target, layer)[0]
        assert set(found[layer]) == set(before)
        for projection, change in found[layer].items():
            ours, theirs = (
                torch.cat([tensor[rows].double().flatten() for tensor, rows in side[projection]])
                for side in (before, after)
            )
            assert change.n == ours.numel()
            assert change.mean_abs == pytest.approx(float((theirs - ours).abs().mean()), rel=1e-6)
            assert change.relative == pytest.approx(float((theirs - ours).norm() / ours.norm()), rel=1e-6)


@pytest.mark.parametrize("what", ["layer", "attention", "ffn"])
def test_surgery(case, what, tmp_path):
    """Layer 2 of the base or a component of it."""
    base, slow = case.models[0], load(case.target)
    with surgery.Pair(case.base, case.target) as pair:
        if what == "layer":
            blocks_of(slow)[2].load_state_dict(blocks_of(base)[2].state_dict())
            recipe = surgery.layers_from_base(pair, [2])
        else:
            projections = archs.ATTENTION if what == "attention" else archs.FFN
            copy_by_hand(base, slow, 2, projections)
            recipe = surgery.parts_from_base(pair, projections, [2])
        check_swap(case, pair, recipe, slow, tmp_path / "out")


@pytest.mark.parametrize("case", MIXTURES, indirect=True)
@pytest.mark.parametrize("what", ["router", "one expert's gate", "one expert's up", "one expert's down"])
def test_surgery_of_experts(case, what, tmp_path):
    """Single tensors on disk, of which several are one in memory."""
    base, slow = case.models[0], load(case.target)
    name = "router" if what == "router" else f"{what.rpartition(' ')[2]}_proj"
    with surgery.Pair(case.base, case.target) as pair:
        parts = pair.arch.parts(pair.config, 2, name, pair.target.names())
        copy_by_hand(base, slow, 2, [name], only=0 if what == "router" else 3)
        recipe = surgery.tensors_from_base(pair, [parts[0 if what == "router" else 3].tensor])
        if what != "router":
            with pytest.raises(InputError, match=r"is a part of .*mlp\.experts\.\w+_proj in the loaded model"):
                pair.arch.module_names([edit.tensor for edit in recipe.edits], slow)
        check_swap(case, pair, recipe, slow, tmp_path / "out")


def copy_by_hand(base, slow, layer, projections, only=None) -> None:
    """Weights and biases of the base into the loaded model `slow`; of experts all, or `only` one."""
    with torch.no_grad():
        for theirs, ours in zip(found_in(base, layer)[:2], found_in(slow, layer)[:2], strict=True):
            for projection in set(projections) & set(ours):
                chosen = slice(None) if only is None else slice(only, only + 1)
                pairs = zip(theirs[projection][chosen], ours[projection][chosen], strict=True)
                for (values, rows), (view, _) in pairs:
                    view[rows] = values[rows]


def check_swap(case, pair, recipe, slow, out) -> None:
    """Written and loaded = in memory = `slow`, in logits and in every bit of the state; then all is as before."""
    own = case.models[1]
    surgery.write_model(pair, recipe, out)
    written, expected = load(out), {name: bits(tensor) for name, tensor in slow.state_dict().items()}
    before = {name: bits(tensor).clone() for name, tensor in own.state_dict().items()}
    assert all(torch.equal(bits(tensor), expected[name]) for name, tensor in written.state_dict().items())
    with torch.no_grad():
        logits = slow(IDS).logits
        # Equal in every bit but for where the tensors begin in memory, which may choose another kernel.
        torch.testing.assert_close(written(IDS).logits, logits, rtol=1e-5, atol=1e-5)
        swapper = surgery.Swapper(own, pair)
        for _ in range(2):  # the second time from the cache
            with swapper.applied(recipe):
                assert all(torch.equal(bits(tensor), expected[name]) for name, tensor in own.state_dict().items())
                torch.testing.assert_close(own(IDS).logits, logits, rtol=1e-5, atol=1e-5)
            assert all(torch.equal(bits(tensor), before[name]) for name, tensor in own.state_dict().items())
        assert not torch.allclose(own(IDS).logits, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states(case, side):
    """Pooled states of a padded batch = means over `output_hidden_states`, one sentence at a time."""
    model, sentences = case.models[1], [[5, 9, 17, 40, 3], [7, 8], [30, 31, 32, 33, 34, 35]]
    pooled = pooled_states(model, case.arch, *padded(sentences, pad=0, side=side))
    assert pooled.shape == (LAYERS + 1, len(sentences), 32)
    for i, ids in enumerate(sentences):
        with torch.inference_mode():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        slow = torch.stack([state[0].mean(0) for state in states])
        torch.testing.assert_close(pooled[:, i], slow, rtol=1e-4, atol=1e-5)


def test_counts(case):
    """Tokens with an activation above zero, token by token; far from zero, where xIELU is positive on both sides."""
    model, ids = load(case.target), torch.arange(4, 100).view(3, 32)
    found = [found_in(model, layer) for layer in range(LAYERS)]
    for weights, _, _ in found:
        for view, rows in weights.get("gate_proj", weights["up_proj"]):
            view[rows] *= 8
    counter = Counter(model, case.arch)
    counter.add(ids[:2])
    counter.add(ids[2:])
    for layer, (weights, _, activation) in enumerate(found):
        width, experts = case.arch.ffn_width(model.config, layer), case.arch.experts(model.config, layer)
        slow, routed = torch.zeros(width, dtype=torch.long), torch.zeros(experts, dtype=torch.long)
        with torch.no_grad():
            if experts:
                for token, chosen in tokens_of_experts(model, blocks_of(model)[layer], ids):
                    for expert in chosen:
                        view, rows = weights["gate_proj"][expert]
                        slow.view(experts, -1)[expert] += activation(view[rows] @ token) > 0
                        routed[expert] += 1
                assert torch.equal(counter.routed[layer], routed)
            else:
                kept = []
                handle = activation.register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out))
                model(ids)
                handle.remove()
                for token in torch.cat([out.reshape(-1, width) for out in kept]):
                    slow += token > 0
        assert torch.equal(counter.counts[layer][:width], slow), layer
        assert not counter.counts[layer][width:].any()


def tokens_of_experts(model, block, ids):
    """(hidden state, its experts) of every token, as the layer's experts get them."""
    got = []
    handle = experts_of(block).register_forward_pre_hook(lambda _module, args: got.append(args))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return [(token, chosen.tolist()) for args in got for token, chosen in zip(args[0], args[1], strict=True)]


# --- single ones ---


def test_falcon_counts_its_kv_heads_by_its_flags():
    falcon, sizes = archs.ARCHS["falcon"], {"hidden_size": 64, "num_attention_heads": 8, "num_kv_heads": 4}
    old, one = {"new_decoder_architecture": False, "multi_query": False}, {"multi_query": True}
    assert falcon.heads(sizes | {"new_decoder_architecture": True, "multi_query": True}) == (8, 4, 8)
    assert falcon.heads(sizes | old) == (8, 8, 8)
    assert falcon.heads(sizes | one) == (8, 1, 8)


def test_opt_without_a_final_norm(tmp_path):
    """opt-350m: its embeddings are narrower than its layers, and no norm ends them. Weights yes, hidden states no."""
    folder = save_tiny("opt", tmp_path / "opt", word_embed_proj_dim=16, do_layer_norm_before=False)
    model = load(folder)
    arch = archs.for_config(model.config)
    assert set(arch.module_places(read_tensors(folder), model)) == set(read_tensors(folder))
    (found,) = compare.changes(refs.model(folder), [refs.model(folder)]).values()
    assert found[2]["down_proj"].mean_abs == 0
    with pytest.raises(InputError, match=r"has no module model\.decoder\.final_layer_norm"):
        pooled_states(model, arch, IDS, torch.ones_like(IDS))


def test_experts_in_one_tensor_on_disk(tmp_path):
    """Swaps of files that hold the experts as memory does are those of files with every expert on its own."""
    apart, together = [], []
    for seed, name in enumerate(("base", "target")):
        model = tiny_model("mixtral", seed=seed)
        apart.append(save_tiny("mixtral", tmp_path / "apart" / name, model=model))
        together.append(save_tiny("mixtral", tmp_path / "together" / name, model=model))
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        save_file(state, together[-1] / "model.safetensors", metadata={"format": "pt"})
    recipes = {
        "layer": lambda pair: surgery.layers_from_base(pair, [1]),
        "gate": lambda pair: surgery.parts_from_base(pair, ["gate_proj"], [1]),
        "ffn": lambda pair: surgery.parts_from_base(pair, archs.FFN, [1]),
        "router": lambda pair: surgery.tensors_from_base(
            pair, [part.tensor for part in pair.arch.parts(pair.config, 1, archs.ROUTER, pair.target.names())]
        ),
    }
    for name, recipe in recipes.items():
        found = []
        for kind, folders in (("apart", apart), ("together", together)):
            with surgery.Pair(*folders) as pair:
                surgery.write_model(pair, recipe(pair), tmp_path / f"{name} {kind}")
                own = load(folders[1])
                with surgery.apply_in_memory(own, recipe(pair), pair):
                    found.append({key: tensor.clone() for key, tensor in own.state_dict().items()})
                found.append(load(tmp_path / f"{name} {kind}").state_dict())
        for state in found:
            assert all(torch.equal(bits(tensor), bits(found[0][key])) for key, tensor in state.items())


def test_the_page_is_what_the_table_gives():
    """Once changed, the table is written out anew with `python docs/architectures.py`."""
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert page == load_script("docs/architectures.py").page()
    assert len(EVERY_ARCHITECTURE) >= 25 and all(f"| `{name}` |" in page for name in EVERY_ARCHITECTURE)
