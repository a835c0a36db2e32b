"""Every type of the table: weight change, surgery, hidden states and counts against slow references.

The references never ask the table where something is. They find it by running the loaded model: which rows of a fused
projection reach the attention as queries, which matrix feeds the activation, which half of the experts' parameter.
"""

from __future__ import annotations

import contextlib
import copy
import re
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import pytest
import torch
from attending import Attention, changed, marked, positions
from helpers import EVERY_ARCHITECTURE, ROOT, bits, load_script, read_tensors, save_tiny, tiny_model
from looking import Found, at_the_same_place, experts_of, found_in
from safetensors.torch import save_file
from test_freezing import entries, frozen_in
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from cpt_utils.architectures import arch_table, archs
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.interventions import in_memory, on_disk, surgery
from cpt_utils.interventions.activations import silenced
from cpt_utils.measures import compare, layer_sets
from cpt_utils.models import loading, scoring
from cpt_utils.models.batching import padded
from cpt_utils.models.states import pooled_states

Counter = load_script("lsn/activation.py").Counter
Activations = load_script("lsn/lsn_activation_cpt.py").Activations

# Other layouts of the same type, by config.
VARIANTS = {
    "falcon, groups": ("falcon", {"new_decoder_architecture": True}),
    "falcon, all heads": ("falcon", {"multi_query": False, "num_kv_heads": 4, "bias": True, "parallel_attn": False}),
    "gpt_bigcode, all heads": ("gpt_bigcode", {"multi_query": False}),
    "codegen, two heads in a group": ("codegen", {"n_head": 8}),
    "cohere, norms on q and k": ("cohere", {"use_qk_norm": True}),
    "stablelm, norms on q and k": ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True}),
}
CASES = {name: (name, {}) for name in EVERY_ARCHITECTURE} | VARIANTS
# Types with image towers differ from their language models in names only: what their layers compute is tested once.
LAYERS_OF_THEIR_OWN = [name for name in CASES if name not in arch_table.TOWERS]
EXPERTS = [
    name
    for name in EVERY_ARCHITECTURE
    if (at := archs.ARCHS[name].experts_at)
    and (name not in arch_table.TOWERS or at != archs.ARCHS[arch_table.TOWERS[name].text].experts_at)
]
TOWER = re.compile("vision|visual|image_|video_|audio|projector|connector|merger|aligner")
IDS = torch.arange(3, 40)[None]
KEEPS = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "olmo2",
    "phi3",
    "opt",
    "bloom",
)
# A neuron's gate and up reach others there: a norm inside the FFN, a bar that is the activations' own quantile.
TOGETHER = ("bitnet", "gemma3n_text", "gemma3n")


def load(folder) -> nn.Module:
    config = AutoConfig.from_pretrained(folder)
    kind = loading.auto_class(config)
    model, report = kind.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def blocks_of(model) -> nn.ModuleList:
    """The decoder's layers: the largest list of modules outside other towers."""
    lists = [m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and not TOWER.search(name)]
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


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
    def layers(self) -> tuple[list[Found], list[Found]]:
        """What every layer of both has, as views of their parameters: found in the target, at the same place in the
        base."""
        base, target = self.models
        found = [found_in(target, block) for block in blocks_of(target)]
        return [at_the_same_place(layer, target, base) for layer in found], found

    @contextlib.contextmanager
    def changing(self):
        """The target, to be changed in place until the block ends."""
        model, _ = self.models[1], self.layers  # seen before anything is changed
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            try:
                yield model
            finally:
                for name, tensor in model.state_dict().items():
                    tensor.copy_(before[name])

    @cached_property
    def arch(self):
        return archs.for_config(refs.model(self.target).config())

    @cached_property
    def config(self) -> dict:
        return self.models[1].config.to_dict()


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory) -> Case:
    model_type, config = CASES[request.param]
    folder = tmp_path_factory.mktemp("architecture")
    made = [
        save_tiny(model_type, folder / name, seed=seed, dtype=dtype, **config)
        for seed, (name, dtype) in enumerate((("base", "float16"), ("target", "float32")))
    ]
    return Case(request.param, *made)


def same_tensors(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Whether two lists hold the same tensors, in whatever order."""
    left = list(theirs)
    for one in ours:
        match = next((i for i, other in enumerate(left) if torch.equal(one, other)), None)
        if match is None:
            return False
        left.pop(match)
    return not left


# --- the tests ---


def test_parts_are_what_the_model_computes_with(case):
    """Of every projection, expert and router, weight and bias: the on-disk part is the found one, bit for bit."""
    model, disk = case.models[1], read_tensors(case.target)
    arch, config = case.arch, case.config
    for layer, found in enumerate(case.layers[1]):
        names = {*arch.projections(config, layer), *(["router"] if arch.has_router(config, layer) else [])}
        assert names == {name for name, views in found.weights.items() if views}
        for projection, views in found.weights.items():
            parts = arch.parts(config, layer, projection, disk) if views else []
            for role, wanted in (("weight", views), ("bias", found.biases.get(projection, []))):
                mine = [part for part in parts if part.role == role]
                taken = [part.take(disk[part.tensor]) for part in mine]
                taken = [t.T if part.dim else t for part, t in zip(mine, taken, strict=True)]
                wanted = [tensor[rows] for tensor, rows in wanted]
                assert same_tensors(taken, wanted), (layer, projection, role)
                if projection not in archs.ATTENTION:  # neurons and experts are numbered by their order
                    assert all(map(torch.equal, taken, wanted)), (layer, projection, role)
        if found.heads and "k_proj" in found.weights:
            assert arch.heads(config, layer)[:2] == found.heads
        check_neurons(model, case, layer, found)
    widths = [arch.ffn_width(config, layer) for layer in range(len(blocks_of(model)))]
    assert arch.ffn_width(config) == max(widths) and arch.n_layers(config) == len(widths)


def check_neurons(model, case: Case, layer: int, found: Found) -> None:
    """The numbers of a layer's neurons, and the modules that compute their activations."""
    arch, config = case.arch, case.config
    groups, units = arch.neurons(config, layer), found.weights.get(arch.neuron_projection, [])
    assert arch.ffn_width(config, layer) == sum(len(tensor[rows]) for tensor, rows in units)
    experts = 0 if found.experts is None else len(units) - bool(found.width)
    assert arch.experts(config, layer) == experts
    assert [group.experts for group in groups] == [experts] * bool(experts) + [0] * bool(found.width)
    acts = [found.expert_activation] * bool(experts) + [found.activation] * bool(found.width)
    for group, act in zip(groups, acts, strict=True):
        assert bool(group.activation) == (act is not None)
        assert act is None or arch.in_layer(model, layer, group.activation) is act


def test_every_tensor_on_disk_has_its_place(case):
    model, disk = case.models[1], read_tensors(case.target)
    state, covered = {n: t for n, t in model.state_dict().items() if not TOWER.search(n)}, {}
    for name, place in case.arch.locations(disk, model, lambda name: disk[name].shape).items():
        if place.name not in state:
            continue  # another tower's
        own = place.view(state[place.name])
        assert torch.equal(own, disk[name]), name
        covered[place.name] = covered.get(place.name, 0) + own.numel()
    tied = set(model._tied_weights_keys or ()) - set(disk)
    assert {name: tensor.numel() for name, tensor in state.items() if name not in tied} == {
        name: count for name, count in covered.items() if name not in tied
    }
    blocks = blocks_of(model)
    layers = [case.arch.layer_tensors(disk, layer) for layer in range(len(blocks))]
    for found, block in zip(layers, blocks, strict=True):
        assert sum(disk[name].numel() for name in found) == sum(t.numel() for t in block.state_dict().values())
    outside = set(disk) - {name for found in layers for name in found}
    embedded = {disk[name].data_ptr(): name for name in case.arch.embedding_tensors(disk)}
    assert set(embedded.values()) <= outside
    wanted = [model.get_input_embeddings().weight] + ([] if tied else list(model.get_output_embeddings().parameters()))
    assert all(any(torch.equal(disk[name], tensor) for name in embedded.values()) for tensor in wanted)
    left = [name for name in outside - set(embedded.values()) if not TOWER.search(name)]
    assert not [name for name in left if "embed_pos" in name or "wpe" in name]


def test_weight_change(case):
    """Sums over float64 differences of the loaded models, expert by expert, and of every neuron."""
    found = compare.changes(refs.model(case.base), [refs.model(case.target)], details=True)
    (found,) = found.values()
    for layer, (before, after) in enumerate(zip(*case.layers, strict=True)):
        assert set(found[layer]) == {name for name, views in before.weights.items() if views}
        for projection, change in found[layer].items():
            ours, theirs = (
                torch.cat([tensor[rows].double().flatten() for tensor, rows in side.weights[projection]])
                for side in (before, after)
            )
            assert change.n == ours.numel()
            assert change.mean_abs == pytest.approx(float((theirs - ours).abs().mean()), rel=1e-6)
            assert change.relative == pytest.approx(float((theirs - ours).norm() / ours.norm()), rel=1e-6)
            if projection in archs.FFN:
                pairs = zip(before.weights[projection], after.weights[projection], strict=True)
                moved = [
                    (b[r].double() - a[r].double()).abs().mean(int(projection != "down_proj"))
                    for (a, r), (b, _) in pairs
                ]
                torch.testing.assert_close(change.neurons.mean_abs, torch.cat(moved).float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("case", "what"),
    [(name, what) for name in CASES for what in ("layer", "parts")[: 2 if name in LAYERS_OF_THEIR_OWN else 1]],
    indirect=["case"],
    scope="module",
)
def test_surgery(case, what, tmp_path):
    """The base's last layer; or its last attention, and all FFNs but of that layer, if no mixture is there alone."""
    layers = range(len(case.layers[0]))
    with surgery.Pair(case.base, case.target) as pair:
        if what == "layer":
            recipe = surgery.layers_from_base(pair, [layers[-1]])
            blocks = [blocks_of(model)[-1] for model in case.models]
            check_swap(case, pair, recipe, lambda: blocks[1].load_state_dict(blocks[0].state_dict()), tmp_path / "out")
            return
        having = {
            part: [layer for layer in layers if case.arch.has(pair.config, layer, part)]
            for part in (archs.ATTENTION, archs.FFN)
        }
        at, sparse = having[archs.ATTENTION][-1], {i for i in layers if case.arch.has_router(pair.config, i)}
        others = {*having[archs.FFN]} - {at}
        chosen = {archs.ATTENTION: {at}, archs.FFN: others if others & sparse else others | sparse}
        for part, own in having.items():
            assert not surgery.parts_from_base(pair, part, {*layers} - {*own}).edits
        edits = [edit for part, own in chosen.items() for edit in surgery.parts_from_base(pair, part, own).edits]

        def by_hand():
            for part, own in chosen.items():
                for layer in own:
                    copy_by_hand(case, layer, part)

        check_swap(case, pair, surgery.Recipe("parts", {}, tuple(edits)), by_hand, tmp_path / "out")


@pytest.mark.parametrize("case", EXPERTS, indirect=True, scope="module")
def test_surgery_of_experts(case, tmp_path):
    """Router, and of each matrix another expert's: a tensor on disk or a part of one, mostly part of one in memory."""
    names = case.arch.experts_at.names
    layer = max(layer for layer in range(len(case.layers[0])) if case.arch.has_router(case.config, layer))
    chosen = {"router": 0} | {name: 3 - i for i, name in enumerate(n for n in archs.FFN if n in names)}
    with surgery.Pair(case.base, case.target) as pair:
        edits = []
        for name, number in chosen.items():
            parts = pair.arch.parts(pair.config, layer, name, pair.target.names())
            parts = [[part for part in parts if part.role == role][number:][:1] for role in ("weight", "bias")]
            own = [pair.edit(p.tensor, p.dim, p.index, expert=p.expert) for same in parts for p in same]
            edits += own
            if name != "router" and own[0].whole:
                (place,) = pair.arch.locations([own[0].tensor], case.models[0]).values()
                assert not place.whole and re.search(r"\.experts\.\w+_proj$", place.name)

        def by_hand():
            for name, number in chosen.items():
                copy_by_hand(case, layer, [name], only=number)

        check_swap(case, pair, surgery.Recipe("experts", {}, tuple(edits)), by_hand, tmp_path / "out")


def heads_of(case, layer, disk, chosen, by_query=False) -> dict[str, list[archs.WeightSlice]]:
    """What the units or query heads have of every projection."""
    config = refs.model(case.target).config()
    return {
        name: case.arch.head_parts(config, layer, name, chosen, disk, lambda tensor: disk[tensor].shape, by_query)
        for name in archs.ATTENTION
    }


def test_units_and_what_they_share_are_the_attention(case):
    """Each entry of its module once. Query heads make up the units; k and v are theirs together."""
    model, disk = case.models[1], read_tensors(case.target)
    for layer, found in enumerate(case.layers[1]):
        heads, units = case.arch.head_counts(case.config, layer)
        parts = case.arch.shared_parts(case.config, layer, disk, lambda tensor: disk[tensor].shape)
        assert bool(units) == ("o_proj" in found.weights)
        for unit in range(units):
            own, group = heads_of(case, layer, disk, [unit]), heads // units
            several = heads_of(case, layer, disk, range(unit * group, (unit + 1) * group), by_query=True)
            assert not several["k_proj"] and not several["v_proj"]
            for name in ("q_proj", "o_proj"):
                marks, same = marked(own[name], disk), marked(several[name], disk)
                assert marks.keys() == same.keys() and all(torch.equal(marks[key], same[key]) for key in marks)
            parts += [part for each in own.values() for part in each]
        marks = marked(parts, disk)
        assert all(bool((each == 1).all()) for each in marks.values()), layer
        own = Attention(model, blocks_of(model)[layer], found).module.parameters() if units else ()
        assert sum(each.numel() for each in marks.values()) == sum(parameter.numel() for parameter in own)


@pytest.mark.parametrize("case", LAYERS_OF_THEIR_OWN, indirect=True, scope="module")
def test_all_units_are_the_attention_swap(case):
    """With what they share, bit by bit; and with what is none of the four projections the base's whole module."""
    base, own = case.models
    with surgery.Pair(case.base, case.target) as pair:
        units = {layer: range(case.arch.head_counts(pair.config, layer)[1]) for layer in range(len(blocks_of(own)))}
        recipes = [
            surgery.parts_from_base(pair, archs.ATTENTION, units),
            surgery.heads_from_base(pair, units, shared=True, beside=False),
            surgery.heads_from_base(pair, units, shared=True),
        ]
        swapper, states = in_memory.Swapper(pair), []
        for recipe in recipes:
            with swapper.applied(own, recipe):
                states.append({name: bits(tensor).clone() for name, tensor in own.state_dict().items()})
    assert all(torch.equal(states[1][name], expected) for name, expected in states[0].items())
    for layer, found in enumerate(case.layers[1]):
        for name in found.weights.get("o_proj", []) and Attention(own, blocks_of(own)[layer], found).names:
            assert torch.equal(states[2].pop(name), bits(base.state_dict()[name])), name
    before = {name: bits(tensor) for name, tensor in own.state_dict().items()}
    assert all(torch.equal(left, before[name]) for name, left in states[2].items())


@pytest.mark.parametrize("case", LAYERS_OF_THEIR_OWN, indirect=True, scope="module")
def test_heads_reach_their_own_columns(case):
    """Noise on what one unit has of k and v, or one query head of q and beside the projections, moves what the output
    matrix gets in its columns of that and nowhere else; zeros in a head's columns take away what it gives. Of what is
    said to be no head's, no piece does so."""
    model, disk = case.models[1], read_tensors(case.target)
    places = case.arch.locations(disk, model, lambda tensor: disk[tensor].shape)
    seen = []
    for layer, found in enumerate(case.layers[1]):
        counts = case.arch.head_counts(case.config, layer)
        if not counts[0] or (counts, *found.weights) in seen:
            continue
        seen.append((counts, *found.weights))
        with Attention(model, blocks_of(model)[layer], found) as attention:
            width = attention.matrix.shape[1] // counts[0]
            attention.uncouple(width)
            inputs, outputs = attention()
            for n, by_query in zip(counts, (True, False), strict=True):
                for chosen in range(n):
                    own = heads_of(case, layer, disk, [chosen], by_query)
                    part = next(part for part in own["o_proj"] if part.role == "weight")
                    columns = positions(part, disk[part.tensor].shape)
                    size = width * counts[0] // n
                    assert columns.tolist() == list(range(chosen * size, (chosen + 1) * size))
                    with changed(model, places[part.tensor], part, by=0):
                        lost = outputs - attention()[1]
                    here = inputs[..., columns] @ attention.matrix[:, columns].T
                    torch.testing.assert_close(lost, here, rtol=1e-4, atol=1e-5)
                    for part in [each for name in archs.ATTENTION for each in own[name] if each is not part]:
                        with changed(model, places[part.tensor], part):
                            moved = (attention()[0] != inputs)[0].any(0)
                        # The same on all keys moves no attention: biases may do nothing. Norms may be one head's.
                        found_there = {"weight": moved[columns].all(), "bias": True}.get(part.role, moved.any())
                        assert found_there, (layer, chosen, part)
                        moved[columns] = False
                        assert not moved.any(), (layer, chosen, part)
            for part in case.arch.shared_parts(case.config, layer, disk, lambda tensor: disk[tensor].shape):
                first = replace(part, index=slice(0, max(1, len(disk[part.tensor]) // counts[0])))
                with changed(model, places[part.tensor], first):
                    moved = (attention()[0] != inputs)[0].any(0)
                assert not moved.any() or moved[width:].any(), (layer, part)


def copy_by_hand(case, layer, projections, only=None) -> None:
    """Weights and biases of the base into the loaded target; of experts all, or `only` one."""
    theirs, ours = (layers[layer] for layers in case.layers)
    for kind in ("weights", "biases"):
        for projection in projections:
            chosen = slice(None) if only is None else slice(only, only + 1)
            sides = (getattr(found, kind).get(projection, [])[chosen] for found in (theirs, ours))
            for (values, rows), (view, _) in zip(*sides, strict=True):
                view[rows] = values[rows]


def check_swap(case, pair, recipe, by_hand, out) -> None:
    """Written and loaded = in memory = done `by_hand`, in logits and every bit of the state; then all is as before."""
    own = case.models[1]

    def same(model, state) -> bool:
        return all(torch.equal(bits(tensor), state[name]) for name, tensor in model.state_dict().items())

    def state():
        return {name: bits(tensor).clone() for name, tensor in own.state_dict().items()}

    before = state()
    with case.changing():
        by_hand()
        expected, logits = state(), own(IDS).logits
    assert same(own, before)
    on_disk.write_model(pair, recipe, out)
    written = load(out)
    assert same(written, expected)
    with torch.no_grad():
        # Equal in every bit but for where the tensors begin in memory, which may choose another kernel.
        torch.testing.assert_close(written(IDS).logits, logits, rtol=1e-5, atol=1e-5)
        swapper = in_memory.Swapper(pair)
        for _ in range(2):  # the second time from the cache
            with swapper.applied(own, recipe):
                assert same(own, expected)
                found = own(IDS).logits
            assert same(own, before)
        torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(own(IDS).logits, logits, rtol=1e-3, atol=1e-3)


def test_hidden_states(case):
    """Pooled states of a padded batch = means over `output_hidden_states`, one sentence at a time."""
    model, sentences = case.models[1], [[5, 9, 17, 40, 3], [7, 8], [30, 31, 32, 33, 34, 35]]
    slow = []
    for ids in sentences:
        with torch.inference_mode():
            out = model.base_model(torch.tensor([ids]), output_hidden_states=True)
        states = list(out.hidden_states)
        if states[-1].dim() == 4:  # streams, of which the first is the hidden state until the last norm merges them
            states = [*(state[0] for state in states[:-1]), out.last_hidden_state]
        slow.append(torch.stack([state[0].mean(0) for state in states]))
    for side in ("left", "right"):
        pooled = pooled_states(model, case.arch, *padded(sentences, pad=0, side=side)).mean
        assert pooled.shape == (len(blocks_of(model)) + 1, len(sentences), 32)
        torch.testing.assert_close(pooled, torch.stack(slow, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", LAYERS_OF_THEIR_OWN, indirect=True, scope="module")
def test_what_sequences_begin_with_is_read_once_or_not_at_all(case):
    """Losses behind a beginning whose keys and values are kept are those of whole sequences, token by token."""
    model, shared = case.models[1], torch.arange(3, 40).tolist()
    sequences = [shared + end for end in ([9, 17, 40, 3], [7], [30, 31, 32, 33, 34, 35, 36])]
    wanted = [[(at - 1, ids[at]) for at in range(len(shared) + 1, len(ids))] for ids in sequences]
    wanted[1] = [(len(shared) - 1, 7)]
    kept = scoring._read_once(model, sequences, len(shared) - 1)
    assert case.name not in KEEPS or kept[0] == len(shared) - 1
    whole, behind = (scoring._losses(model, sequences, 0, wanted, before) for before in (None, kept))
    for ours, theirs in zip(behind, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", LAYERS_OF_THEIR_OWN, indirect=True, scope="module")
def test_counts_and_means(case):
    """Tokens with an activation above zero, token by token; far from zero, where xIELU is positive on both sides. Mean
    activations of the first, the middle and the last neuron of every layer."""
    layers, ids = case.layers[1], torch.arange(4, 100).view(3, 32)
    with case.changing() as model:
        for found in layers:
            for view, rows in found.weights.get(case.arch.neuron_projection, []):
                view[rows] *= 8
        mask = {layer: chosen_of(case, model, layer) for layer in range(len(layers))}
        counter, means = Counter(model, case.arch), Activations(model, case.arch, {"own": mask})
        for measured in (counter, means):
            measured.add(ids[:2])
            measured.add(ids[2:])
        for layer, found in enumerate(layers):
            values = slow_activations(model, blocks_of(model)[layer], found, case.arch.neuron_projection, ids)
            width = case.arch.ffn_width(case.config, layer)
            counts = [(own > 0).sum(0) for own in values]
            assert counter.counts[layer][:width].tolist() == [int(n) for own in counts for n in own], layer
            assert not counter.counts[layer][width:].any()
            routed = [len(own) for own in values[: case.arch.experts(case.config, layer)]]
            assert counter.routed[layer][: len(routed)].tolist() == routed
            slow = [float(own.mean(0)[i]) if len(own) else 0.0 for own in values for i in range(own.shape[1])]
            if width:
                expected = sum(slow[neuron] for neuron in mask[layer]) / len(mask[layer])
                assert means.layer_means("own")[layer] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def chosen_of(case, model, layer: int) -> list[int]:
    """The first, the middle and the last neuron of a layer; none of a layer without an FFN."""
    width = case.arch.ffn_width(case.config, layer)
    return sorted({0, width // 2, width - 1}) if width else []


def slow_activations(model, block, found: Found, projection: str, ids) -> list[torch.Tensor]:
    """Activations [tokens, I] of each expert on the tokens routed to it, then of a dense FFN on all."""
    values = []
    if found.experts is not None:
        units, biases = found.weights[projection], found.biases.get(projection) or []
        units = units[: len(units) - bool(found.width)]
        routed = [[] for _ in units]
        for token, expert in tokens_of_experts(model, block, ids):
            view, rows = units[expert]
            with torch.no_grad():
                value = view[rows] @ token + (biases[expert][0][rows] if biases else 0)
                routed[expert].append(found.expert_function(value))
        width = len(units[0][0][units[0][1]])
        values += [torch.stack(own) if own else torch.zeros(0, width) for own in routed]
    if found.width:
        values.append(torch.cat(dense_activations(model, block, found, projection, ids)).view(-1, found.width))
    return values


def dense_activations(model, block, found: Found, projection: str, ids) -> list[torch.Tensor]:
    """What comes out of the nonlinearity of a dense FFN, a pass at a time."""
    kept, at = [], found.activation
    view, rows = found.weights[projection][-1]
    if at is None:
        linears = [m for m in block.modules() if isinstance(m, nn.Linear | Conv1D)]
        (at,) = [m for m in linears if m.weight.data_ptr() == view.data_ptr()]

    def keep(_module, _args, output):
        kept.append(output if found.activation is not None else found.function(output[..., rows]))

    handle = at.register_forward_hook(keep)
    with torch.no_grad():
        model(ids)
    handle.remove()
    return kept


@pytest.mark.parametrize("case", LAYERS_OF_THEIR_OWN, indirect=True, scope="module")
def test_silenced_neurons(case):
    """As if the neurons' columns of the down projections were zero."""
    model, layers, ids = case.models[1], case.layers[1], torch.arange(4, 36).view(2, 16)
    mask = {layer: chosen_of(case, model, layer) for layer in range(len(layers))}
    with case.changing():
        whole = model(ids).logits
        with silenced(model, case.arch, mask):
            found = model(ids).logits
        assert torch.equal(model(ids).logits, whole) and not torch.allclose(found, whole)
        for layer, here in enumerate(layers):
            columns = [(view, i) for view, _ in here.weights.get("down_proj", []) for i in range(view.shape[1])]
            for neuron in mask[layer]:
                view, i = columns[neuron]
                view[:, i] = 0
        torch.testing.assert_close(model(ids).logits, found, rtol=1e-4, atol=1e-5)


def test_what_a_training_freezes(case):
    """Of a component what a swap of it changes; of neurons that without which the model is as with them silenced."""
    model, ref, config = copy.deepcopy(case.models[1]), refs.model(case.target), case.models[1].config
    arch, n = case.arch, len(blocks_of(model))

    def frozen(**part):
        model.requires_grad_(True)
        return frozen_in(model, ref, layer_sets.Part("x", **part))

    with surgery.Pair(case.base, case.target) as pair:
        units = {layer: range(of) for layer in range(n - 1) if (of := arch.head_counts(config, layer)[1])}
        recipes = {
            "attention": surgery.heads_from_base(pair, units, shared=True),
            "ffn": surgery.parts_from_base(pair, archs.FFN, range(n - 1)),
        }
        for component, recipe in recipes.items():
            if not recipe.edits:
                with pytest.raises(InputError, match="nothing is frozen"):
                    frozen(layers=tuple(range(n - 1)), component=component)
                continue
            found = frozen(layers=tuple(range(n - 1)), component=component)
            own = [parameter.detach().clone() for parameter in model.parameters()]
            with in_memory.apply(model, recipe, pair):
                for (name, parameter), before in zip(model.named_parameters(), own, strict=True):
                    assert torch.equal(parameter.detach() != before, entries(found, parameter)), (component, name)
    neurons = {layer: chosen_of(case, model, layer) for layer in range(n)}
    found = frozen(layers=tuple(range(n)), neurons=neurons)
    assert found.n_parameters - found.n_trained >= 2 * 32 * sum(map(len, neurons.values()))
    if case.name in TOGETHER:
        return
    ids = torch.arange(3, 21).view(2, 9)
    with torch.no_grad():
        with silenced(model, arch, neurons):
            wanted = model(input_ids=ids).logits
        for parameter, mask in found.parts.items():
            parameter[mask] = 0.0
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-5)


def tokens_of_experts(model, block, ids) -> list[tuple[torch.Tensor, int]]:
    """(hidden state, expert) of every token and each of its experts, as the layer's experts get them."""
    got = []
    handle = experts_of(block).register_forward_pre_hook(lambda _module, args: got.append(args))
    with torch.no_grad():
        model(ids)
    handle.remove()
    if len(got[0]) == 1:  # every expert gets every token, times its score: those that were not chosen get zeros
        experts = len(next(experts_of(block).parameters()))
        tokens = [args[0].view(experts, -1, args[0].shape[-1]) for args in got]
        return [(token, e) for all_of in tokens for e, own in enumerate(all_of) for token in own if token.any()]
    pairs = [pair for args in got for pair in zip(args[0].flatten(0, -2), args[1], strict=True)]
    return [(token, expert) for token, chosen in pairs for expert in chosen.tolist()]


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
    assert set(arch.locations(read_tensors(folder), model)) == set(read_tensors(folder))
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
                on_disk.write_model(pair, recipe(pair), tmp_path / f"{name} {kind}")
                own = load(folders[1])
                with in_memory.apply(own, recipe(pair), pair):
                    found.append({key: tensor.clone() for key, tensor in own.state_dict().items()})
                found.append(load(tmp_path / f"{name} {kind}").state_dict())
        for state in found:
            assert all(torch.equal(bits(tensor), bits(found[0][key])) for key, tensor in state.items())


def test_experts_the_other_way_round_on_disk(tmp_path):
    """Files of qwen3_vl_moe hold experts [E, in, out], as published, or [E, out, in], as transformers saves them."""
    found = {}
    for kind in ("saved", "published"):
        folders = [save_tiny("qwen3_vl_moe", tmp_path / kind / name, seed=seed) for seed, name in enumerate("bt")]
        for folder in folders if kind == "published" else ():
            held = read_tensors(folder)
            turned = {name: t.transpose(1, 2).contiguous() if "experts" in name else t for name, t in held.items()}
            assert [name for name in held if "experts" in name and turned[name].shape != held[name].shape]
            save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})
        (changes,) = compare.changes(refs.model(folders[0]), [refs.model(folders[1])]).values()
        found[kind] = [changes[1][name].mean_abs for name in archs.FFN]
        case = Case("qwen3_vl_moe", *folders)
        with surgery.Pair(*folders) as pair:
            recipe = surgery.parts_from_base(pair, archs.FFN, [1])
            check_swap(case, pair, recipe, partial(copy_by_hand, case, 1, archs.FFN), tmp_path / kind / "out")
    assert found["saved"] == pytest.approx(found["published"], rel=1e-6)


def test_the_page_is_what_the_table_gives():
    """Once changed, the table is written out anew with `python docs/architectures.py`."""
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert page == load_script("docs/architectures.py").page()
    assert len(EVERY_ARCHITECTURE) >= 25 and all(f"| `{name}` |" in page for name in EVERY_ARCHITECTURE)
