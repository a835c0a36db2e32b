"""The surgery engine: every tensor equals its declared source, on disk and in memory; nothing half-written stays."""

from __future__ import annotations

import errno
import json
import os
import re

import pytest
import torch
from helpers import ARCHITECTURES, bits, killed, read_tensors, save_tiny, tiny_model
from safetensors.torch import load_file, save_file

from cpt_utils.architectures import archs
from cpt_utils.base import results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import folders, formats
from cpt_utils.interventions import in_memory, on_disk, surgery, values

IDS = torch.arange(3, 40)[None]


def load(folder, dtype=torch.float32):
    """Load as users do; anything missing, unexpected or mismatched fails the test."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(bits(one[n]), bits(other[n])) for n in one
    )


def slow_swap(base: dict, target: dict, arch, layers) -> dict:
    """Whole layers, from the definition: every tensor whose name says the layer, in the target's dtype."""
    mine = {arch.canonical(name): tensor for name, tensor in base.items()}
    found = {}
    for name, tensor in target.items():
        layer = next((int(p) for p in arch.canonical(name).split(".") if p.isdigit()), None)
        found[name] = mine[arch.canonical(name)].to(tensor.dtype) if layer in layers else tensor
    return found


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_layers_on_disk_and_in_memory(tmp_path, model_type):
    """Mixed dtypes, sharded differently: the result is its definition, loads clean, and equals the in-memory swap."""
    base = save_tiny(model_type, tmp_path / "base", seed=0, dtype="float16", shards=2)
    target = save_tiny(model_type, tmp_path / "target", seed=1, dtype="bfloat16", shards=3)
    with surgery.Pair(base, target) as pair:
        recipe = surgery.layers_from_base(pair, [0, 2])
        record = on_disk.write_model(pair, recipe, tmp_path / "out")
        assert same(
            read_tensors(tmp_path / "out"), slow_swap(read_tensors(base), read_tensors(target), pair.arch, {0, 2})
        )
        model = load(target)
        before = {name: bits(tensor).clone() for name, tensor in model.state_dict().items()}
        own, swapped = logits(model), logits(load(tmp_path / "out"))
        with in_memory.apply(model, recipe, pair):
            assert torch.equal(logits(model), swapped)
        assert not torch.equal(own, swapped)
        assert torch.equal(logits(model), own)
        assert all(torch.equal(bits(tensor), before[name]) for name, tensor in model.state_dict().items())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in target.iterdir()} | {"swap.json"}
    assert record["conversions"] == {"float16 -> bfloat16": len(recipe.edits)}
    layer = 3 * len(recipe.edits) // 2
    assert record["verification"]["tensors_read_back_and_equal"] == len(read_tensors(target)) > layer - 1


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_into_itself_and_back(tmp_path, model_type):
    """A into A changes no bit; B into C and C back into that restores C."""
    base = save_tiny(model_type, tmp_path / "base", seed=0, shards=2)
    target = save_tiny(model_type, tmp_path / "target", seed=1)
    with surgery.Pair(target, target) as pair:
        on_disk.write_model(pair, surgery.layers_from_base(pair, range(3)), tmp_path / "same")
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()
    with surgery.Pair(base, target) as pair:
        recipe = surgery.layers_from_base(pair, [1])
        on_disk.write_model(pair, recipe, tmp_path / "swapped")
    assert not same(read_tensors(tmp_path / "swapped"), read_tensors(target))
    with surgery.Pair(target, tmp_path / "swapped") as pair:
        on_disk.write_model(pair, surgery.layers_from_base(pair, [1]), tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()


@pytest.mark.parametrize("projections", [archs.ATTENTION, archs.FFN, ("k_proj",)])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "gpt_neox", "gpt2"])
def test_projections_change_only_their_slice(tmp_path, model_type, projections):
    """Entry by entry: B inside the projections' parts (biases too), C everywhere else."""
    base = save_tiny(model_type, tmp_path / "base", seed=0)
    target = save_tiny(model_type, tmp_path / "target", seed=1, dtype="bfloat16", shards=2)
    with surgery.Pair(base, target) as pair:
        recipe = surgery.parts_from_base(pair, projections, [1])
        on_disk.write_model(pair, recipe, tmp_path / "out")
        mine, theirs, made = read_tensors(target), read_tensors(base), read_tensors(tmp_path / "out")
        config, arch = pair.config, pair.arch
        expected = {name: tensor.clone() for name, tensor in mine.items()}
        touched = set()
        for projection in set(projections) & set(arch.projections(config)):
            for part in arch.parts(config, 1, projection, mine):
                new = theirs[part.tensor].to(torch.bfloat16)
                positions = range(new.shape[part.dim])
                if isinstance(part.index, slice):
                    positions = positions[part.index]
                elif part.index is not None:
                    positions = part.index.tolist()
                for i in positions:
                    expected[part.tensor].select(part.dim, i).copy_(new.select(part.dim, i))
                touched.add((part.tensor, part.role))
        assert same(made, expected)
        if model_type in ("gpt2", "gpt_neox"):
            assert {role for _, role in touched} == {"weight", "bias"}
        model = load(target)
        with in_memory.apply(model, recipe, pair):
            assert torch.equal(logits(model), logits(load(tmp_path / "out")))


# Where unit 1 of layer 1 is in the tiny models (heads of 8; llama's and olmo2's unit is two heads with one KV head, an
# fused head of GPT-NeoX 24 rows, a third of GPT-2's matrix [in, out] all queries): what is behind `self_attn.` or the
# like, the dimension and the ranges.
UNIT = {
    "llama": {"q_proj.weight": (0, 16, 32), "k_proj.weight": (0, 8, 16), "v_proj.weight": (0, 8, 16)}
    | {"o_proj.weight": (1, 16, 32)},
    "gpt_neox": {"query_key_value.weight": (0, 24, 48), "query_key_value.bias": (0, 24, 48)}
    | {"dense.weight": (1, 8, 16)},
    "gpt2": {"c_attn.weight": (1, 8, 16, 40, 48, 72, 80), "c_attn.bias": (0, 8, 16, 40, 48, 72, 80)}
    | {"c_proj.weight": (0, 8, 16)},
}
UNIT["olmo2"] = UNIT["llama"] | {"q_norm.weight": (0, 16, 32), "k_norm.weight": (0, 8, 16)}


@pytest.mark.parametrize("model_type", UNIT)
def test_units_of_heads_change_only_their_own(tmp_path, model_type):
    """Entry by entry: B in the unit's ranges, C everywhere else; written = in memory."""
    base = save_tiny(model_type, tmp_path / "base", seed=0)
    target = save_tiny(model_type, tmp_path / "target", seed=1, dtype="bfloat16", shards=2)
    expected, theirs = read_tensors(target), read_tensors(base)
    for end, (dim, *ends) in UNIT[model_type].items():
        (name,) = [name for name in expected if re.search(rf"\.1\.(\w*attn|attention)\.{re.escape(end)}$", name)]
        for start, stop in zip(ends[::2], ends[1::2], strict=True):
            new = theirs[name].to(torch.bfloat16).narrow(dim, start, stop - start)
            expected[name].narrow(dim, start, stop - start).copy_(new)
    with surgery.Pair(base, target) as pair:
        recipe = surgery.heads_from_base(pair, {1: [1, 1]})
        on_disk.write_model(pair, recipe, tmp_path / "out")
        model = load(target)
        with in_memory.apply(model, recipe, pair):
            assert torch.equal(logits(model), logits(load(tmp_path / "out")))
    assert same(read_tensors(tmp_path / "out"), expected)


def test_heads_that_are_not_there(tmp_path, two):
    hybrid = [save_tiny("bamba", tmp_path / f"bamba {seed}", seed=seed) for seed in (0, 1)]
    larger = save_tiny("llama", tmp_path / "larger", num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    with surgery.Pair(*two) as pair:
        recipe = surgery.heads_from_base(pair, {2: [3, 0], 0: [1]}, by_query=True)
        assert recipe.words == "query head 1 of the base in layer 0; query heads 0, 3 of the base in layer 2"
        assert recipe.facts["heads"] == {"0": [1], "2": [0, 3]} and recipe.facts["of"] == "query heads"
        assert {edit.tensor[-13:] for edit in recipe.edits} == {"q_proj.weight", "o_proj.weight"}
        with pytest.raises(InputError, match="unit 2 of layer 1 does not exist: the layer has units 0 to 1"):
            surgery.heads_from_base(pair, {0: [1], 1: [0, 2]})
        with pytest.raises(InputError, match="layer 3 does not exist"):
            surgery.heads_from_base(pair, {3: [0]})
    with surgery.Pair(*hybrid) as pair, pytest.raises(InputError, match="the layer has no attention"):
        surgery.heads_from_base(pair, {0: [0]})
    with (
        surgery.Pair(larger, two[1]) as pair,
        pytest.raises(InputError, match=r"2 query heads in 1 units in .*larger, 4 in 2 in"),
    ):
        surgery.heads_from_base(pair, {0: [0]})


@pytest.fixture
def two(tmp_path):
    return save_tiny("llama", tmp_path / "base", seed=0), save_tiny("llama", tmp_path / "target", seed=1, shards=3)


def interpolated(base, target):
    return target + 0.25 * (base.float() - target.float())


@pytest.mark.parametrize("by_rows", [True, False])
def test_functions_of_both(tmp_path, two, by_rows, monkeypatch):
    """A source may be a function, of a whole tensor or of scattered rows, in blocks or at once."""
    monkeypatch.setattr(values, "BLOCK", 512)
    rows = torch.tensor([0, 3, 4, 31])
    with surgery.Pair(*two) as pair:
        q, o, down = (f"model.layers.1.{n}.weight" for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))
        edits = (
            pair.edit(q, function=interpolated, by_rows=by_rows),
            pair.edit(o, 0, rows, interpolated, by_rows),
            pair.edit(down, 1, slice(5, 9), interpolated, by_rows),
        )
        recipe = surgery.Recipe("a quarter of the way back", {"alpha": 0.25}, edits)
        on_disk.write_model(pair, recipe, tmp_path / "out")
        b, c, made = read_tensors(two[0]), read_tensors(two[1]), read_tensors(tmp_path / "out")
        mixed = {name: interpolated(b[name], c[name]) for name in (q, o, down)}
        expected = dict(c) | {q: mixed[q], o: c[o].clone(), down: c[down].clone()}
        expected[o][rows] = mixed[o][rows]
        expected[down][:, 5:9] = mixed[down][:, 5:9]
        assert same(made, expected)
        model = load(two[1])
        with in_memory.apply(model, recipe, pair):
            assert torch.equal(logits(model), logits(load(tmp_path / "out")))


def test_many_sets_share_what_was_converted(two):
    """Switching between sets, with and without room in the cache, gives the numbers of a fresh swap every time."""
    with surgery.Pair(*two) as pair:
        model = load(two[1])
        own = logits(model)
        for room in (1 << 30, 9000, 0):
            swapper = in_memory.Swapper(pair, cache_bytes=room)
            for layers in ([0], [0, 1], [2], [0], [1, 2], [0, 1, 2]):
                recipe = surgery.layers_from_base(pair, layers)
                with swapper.applied(model, recipe):
                    found = logits(model)
                with in_memory.apply(load(two[1]), recipe, pair) as fresh:
                    assert torch.equal(found, logits(fresh))
                assert torch.equal(logits(model), own)
            assert sum(held.nbytes for held in swapper._cache.values()) <= room


def test_an_exception_restores_the_model(two):
    with surgery.Pair(*two) as pair:
        model = load(two[1])
        own, places = logits(model), [p.data_ptr() for p in model.parameters()]
        with (
            pytest.raises(RuntimeError, match="stop"),
            in_memory.apply(model, surgery.layers_from_base(pair, [0, 1]), pair),
        ):
            raise RuntimeError("stop")
        assert torch.equal(logits(model), own)
        assert places == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_extended_vocabulary(tmp_path, capsys, model_type):
    """C has more tokens: layers swap, embeddings stay C's and are named, tied heads stay off the disk."""
    base = save_tiny(model_type, tmp_path / "base", seed=0)
    target = save_tiny(model_type, tmp_path / "target", seed=1, vocab_size=288)
    with surgery.Pair(base, target) as pair:
        recipe = surgery.layers_from_base(pair, [0, 1])
        record = on_disk.write_model(pair, recipe, tmp_path / "out")
        assert "the target's are kept" in capsys.readouterr().out
        embedding = pair.arch.embedding_tensors(pair.target.names())[0]
        assert record["kept_though_unlike"][embedding].startswith("[272, 32] in the base, [288, 32]")
        made, c = read_tensors(tmp_path / "out"), read_tensors(target)
        assert made.keys() == c.keys() and torch.equal(made[embedding], c[embedding])
        assert load(tmp_path / "out").get_input_embeddings().weight.shape[0] == 288
        with pytest.raises(InputError, match=r"has shape \[272, 32\].*must agree in shape"):
            pair.edit(embedding)
        shared = surgery.Recipe("rows", {}, (pair.edit(embedding, 0, slice(0, 272)),))
        on_disk.write_model(pair, shared, tmp_path / "rows")
        rows = read_tensors(tmp_path / "rows")[embedding]
        assert torch.equal(rows[:272], read_tensors(base)[embedding]) and torch.equal(rows[272:], c[embedding][272:])
        model = load(target)
        with in_memory.apply(model, shared, pair):
            assert torch.equal(logits(model), logits(load(tmp_path / "rows")))


def test_bin_folders_become_safetensors(tmp_path):
    base = save_tiny("qwen2", tmp_path / "base", seed=0, format="bin")
    target = save_tiny("qwen2", tmp_path / "target", seed=1, format="bin", shards=2, dtype="bfloat16")
    one = save_tiny("qwen2", tmp_path / "one", seed=1, dtype="bfloat16")
    for name, folder in (("sharded", target), ("single", one)):
        with surgery.Pair(base, folder) as pair:
            on_disk.write_model(pair, surgery.layers_from_base(pair, [1]), tmp_path / name)
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    assert not list((tmp_path / "sharded").glob("*.bin*"))
    assert same(read_tensors(tmp_path / "sharded"), read_tensors(tmp_path / "single"))
    assert torch.equal(logits(load(tmp_path / "sharded")), logits(load(tmp_path / "single")))


def test_adapters_are_merged(tmp_path):
    """An adapter as the target, as the base, and as both: the bytes of the same swap on the merged models."""
    from test_adapters import save_adapter, save_merged

    base = save_tiny("llama", tmp_path / "base", seed=0, shards=2)
    rows = {"model.embed_tokens.weight": (280, 32), "lm_head.weight": (280, 32)}
    one = save_adapter(base, tmp_path / "run" / "checkpoint-1", targets=("q_proj", "up_proj"), whole=rows)
    two = save_adapter(base, tmp_path / "run" / "checkpoint-2", targets=("v_proj", "down_proj"), seed=1)
    (one / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    whole = [save_merged(base, adapter, tmp_path / "merged" / adapter.name) for adapter in (one, two)]
    for number, (b, c, merged_b, merged_c) in enumerate(
        ((base, one, base, whole[0]), (two, base, whole[1], base), (two, one, *whole[::-1]))
    ):
        for kind in ("layers", "half"):
            made = []
            for name, pair in (("adapter", surgery.Pair(b, c)), ("merged", surgery.Pair(merged_b, merged_c))):
                recipe = surgery.layers_from_base(pair, [1])
                if kind == "half":
                    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
                    edits = [pair.edit(n, function=interpolated, by_rows=True) for n in names]
                    recipe = surgery.Recipe("a quarter of the way back", {}, tuple(edits))
                on_disk.write_model(pair, recipe, tmp_path / f"{number}-{kind}-{name}")
                made.append(tmp_path / f"{number}-{kind}-{name}")
            assert same(*(read_tensors(folder) for folder in made))
            assert torch.equal(*(logits(load(folder)) for folder in made))
            config = json.loads((made[0] / "config.json").read_text())
            assert (
                config["vocab_size"]
                == read_tensors(made[0])["lm_head.weight"].shape[0]
                == (280 if number != 1 else 272)
            )


def test_gpt2_with_and_without_prefix(tmp_path):
    base = save_tiny("gpt2", tmp_path / "base", seed=0)
    target = save_tiny("gpt2", tmp_path / "target", seed=1)
    bare = {name.removeprefix("transformer."): t for name, t in load_file(base / "model.safetensors").items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    with surgery.Pair(base, target) as pair:
        on_disk.write_model(pair, surgery.layers_from_base(pair, [0]), tmp_path / "out")
    made = read_tensors(tmp_path / "out")
    assert made.keys() == read_tensors(target).keys()
    assert torch.equal(made["transformer.h.0.attn.c_attn.weight"], bare["h.0.attn.c_attn.weight"])


def test_tokenizer_of_the_run_or_of_the_base(tmp_path, capsys):
    base = save_tiny("llama", tmp_path / "base", seed=0)
    target = save_tiny("llama", tmp_path / "run" / "checkpoint-15", seed=1, tokenizer=False)
    (target / "optimizer.pt").write_bytes(b"states")
    (target / "trainer_state.json").write_text("{}")
    with surgery.Pair(base, target) as pair:
        recipe = surgery.layers_from_base(pair, [0])
        on_disk.write_model(pair, recipe, tmp_path / "a")
        assert "using those of the base" in capsys.readouterr().out
        (tmp_path / "run" / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
        on_disk.write_model(pair, recipe, tmp_path / "b")
        assert "using those of run/" in capsys.readouterr().out
    assert (tmp_path / "a" / "tokenizer_config.json").is_file() and (tmp_path / "b" / "tokenizer.json").is_file()
    for out in ("a", "b"):
        assert not {p.name for p in (tmp_path / out).iterdir()} & {"optimizer.pt", "trainer_state.json"}


# --- what is refused, and what stays behind ---


def entries(folder):
    return sorted(p.name for p in folder.iterdir())


def test_finished_swaps_are_kept_or_refused(tmp_path, two, capsys):
    out = tmp_path / "out"
    with surgery.Pair(*two) as pair:
        recipe, other = surgery.layers_from_base(pair, [0]), surgery.layers_from_base(pair, [1])
        on_disk.write_model(pair, recipe, out)
        stamp = (out / "swap.json").stat().st_mtime_ns
        assert on_disk.write_model(pair, recipe, out)["recipe"] == "layers 0 of the base"
        assert (out / "swap.json").stat().st_mtime_ns == stamp and "kept" in capsys.readouterr().out
        with pytest.raises(InputError, match=r"holds another swap \(layers 0 of the base"):
            on_disk.write_model(pair, other, out)
        on_disk.write_model(pair, other, out, overwrite=True)
        assert json.loads((out / "swap.json").read_text())["recipe"] == "layers 1 of the base"
        assert torch.equal(
            read_tensors(out)["model.layers.1.mlp.up_proj.weight"],
            read_tensors(two[0])["model.layers.1.mlp.up_proj.weight"],
        )
        (out / "config.json").write_text("{}")
        with pytest.raises(InputError, match=r"config\.json was changed"):
            on_disk.write_model(pair, other, out)
    assert entries(tmp_path) == ["base", "out", "target"]


def test_foreign_content_is_refused(tmp_path, two):
    with surgery.Pair(*two) as pair:
        recipe = surgery.layers_from_base(pair, [0])
        for overwrite in (False, True):
            with pytest.raises(InputError, match="did not write"):
                on_disk.write_model(pair, recipe, two[1], overwrite=overwrite)
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "thesis.tex").write_text("years of work")
        with pytest.raises(InputError, match=r"out\.partial is in the way"):
            on_disk.write_model(pair, recipe, tmp_path / "out")
        (tmp_path / "file").write_text("x")
        with pytest.raises(InputError, match="did not write"):
            on_disk.write_model(pair, recipe, tmp_path / "file")
        (tmp_path / "empty").mkdir()
        on_disk.write_model(pair, recipe, tmp_path / "empty")
    assert (tmp_path / "out.partial" / "thesis.tex").is_file() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("write_file", 0),
        ("write_file", 2),
        ("_copy_range", 3),
        ("verify_file", 1),
        ("_lock", 0),
        ("_finish", 0),
        ("_sync", 7),
    ],
)
def test_killed_and_run_again(tmp_path, two, name, after):
    """Nothing that looks finished; the same call then gives the bytes of an unbroken one."""
    out = tmp_path / "out"
    with surgery.Pair(*two) as pair:
        recipe = surgery.layers_from_base(pair, [0, 2])
        on_disk.write_model(pair, recipe, tmp_path / "unbroken")
        killed(lambda: on_disk.write_model(pair, recipe, out), folders, name, after)
        assert not out.exists() and (tmp_path / "out.partial").is_dir()
        on_disk.write_model(pair, recipe, out)
    assert entries(tmp_path) == ["base", "out", "target", "unbroken"]
    assert entries(out) == entries(tmp_path / "unbroken")
    for file in out.iterdir():
        if file.name != "swap.json":
            assert file.read_bytes() == (tmp_path / "unbroken" / file.name).read_bytes()
    assert results.read_json(out / "swap.json")[0] == results.read_json(tmp_path / "unbroken" / "swap.json")[0]


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_killed_while_an_old_swap_is_replaced(tmp_path, two, after):
    """At every rename and removal of an overwrite, one complete folder or the other is there after a rerun."""
    out = tmp_path / "out"
    with surgery.Pair(*two) as pair:
        old, new = surgery.layers_from_base(pair, [0]), surgery.layers_from_base(pair, [1])
        on_disk.write_model(pair, old, out)
        module, name = ((os, "rename"), (os, "rename"), (folders, "_discard"), (folders, "_sync"))[after]
        calls = (0, 1, 0, 9)[after]
        killed(lambda: on_disk.write_model(pair, new, out, overwrite=True), module, name, calls)
        on_disk.write_model(pair, new, out, overwrite=True)
        assert json.loads((out / "swap.json").read_text())["recipe"] == "layers 1 of the base"
    assert entries(tmp_path) == ["base", "out", "target"]


def test_two_writers_of_one_folder(tmp_path, two):
    with surgery.Pair(*two) as pair:
        recipe = surgery.layers_from_base(pair, [0])
        with folders.new_folder(tmp_path / "out") as partial:
            with pytest.raises(InputError, match="another process is writing"):
                on_disk.write_model(pair, recipe, tmp_path / "out")
            assert partial.is_dir()
            (partial / folders.RECORD).write_text("{}")
    assert entries(tmp_path / "out") == ["swap.json"]


def test_full_disk_before_the_first_byte(tmp_path, two, monkeypatch):
    monkeypatch.setattr(folders, "free_bytes", lambda folder: 1000)
    with surgery.Pair(*two) as pair, pytest.raises(InputError, match=r"not enough disk space .*0\.00 GB free"):
        on_disk.write_model(pair, surgery.layers_from_base(pair, [0]), tmp_path / "deep" / "out")
    assert entries(tmp_path) == ["base", "target"]


@pytest.mark.parametrize("call", ["copy_file_range", "pwrite"])
def test_full_disk_in_the_middle(tmp_path, two, monkeypatch, call):
    if call == "pwrite":  # a file system where the kernel does not copy
        monkeypatch.setattr(os, "copy_file_range", _raising(errno.EOPNOTSUPP))
    own, left = getattr(os, call), iter([True] * 3 + [False] * 99)

    def full(*args):
        if next(left):
            return own(*args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with surgery.Pair(*two) as pair, pytest.raises(InputError, match="the disk is full"):
        on_disk.write_model(pair, surgery.layers_from_base(pair, [0]), tmp_path / "out")
    assert entries(tmp_path) == ["base", "target"]


def _raising(number):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


def test_without_kernel_copies_the_bytes_are_the_same(tmp_path, two, monkeypatch):
    with surgery.Pair(*two) as pair:
        recipe = surgery.layers_from_base(pair, [1])
        on_disk.write_model(pair, recipe, tmp_path / "kernel")
        monkeypatch.setattr(os, "copy_file_range", _raising(errno.EXDEV))
        on_disk.write_model(pair, recipe, tmp_path / "buffer")
    for file in (tmp_path / "kernel").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "buffer" / file.name).read_bytes()


def test_a_write_that_went_wrong_is_noticed(tmp_path, two, monkeypatch):
    """One flipped bit on the disk between writing and reading back."""
    own = folders.write_file

    def flipping(file, parts, contents, path, bar):
        digests = own(file, parts, contents, path, bar)
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        return digests

    monkeypatch.setattr(folders, "write_file", flipping)
    with surgery.Pair(*two) as pair:
        copied = surgery.layers_from_base(pair, [0])
        edits = [pair.edit(name, function=interpolated, by_rows=True) for name in pair.target.names()]
        computed = surgery.Recipe("a quarter of the way back", {}, tuple(edits))
        for recipe in (copied, computed):
            with pytest.raises(InputError, match="differs from its source"):
                on_disk.write_model(pair, recipe, tmp_path / "out")
            assert entries(tmp_path) == ["base", "target"]


def spoil(folder, name, value):
    file = next(f for f in sorted(folder.glob("*.safetensors")) if name in load_file(f))
    held = load_file(file)
    held[name].view(-1)[7] = value
    save_file(held, file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_in_what_is_swapped(tmp_path, value, dtype):
    base = save_tiny("llama", tmp_path / "base", seed=0)
    target = save_tiny("llama", tmp_path / "target", seed=1, dtype=dtype)
    spoil(base, "model.layers.1.mlp.up_proj.weight", value)
    with surgery.Pair(base, target) as pair:
        with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
            on_disk.write_model(pair, surgery.layers_from_base(pair, [1]), tmp_path / "out")
        model = tiny_model("llama")
        with (
            pytest.raises(InputError, match="NaN"),
            in_memory.apply(model, surgery.layers_from_base(pair, [0, 1]), pair),
        ):
            pass
        assert all(torch.isfinite(p).all() for p in model.parameters())
        on_disk.write_model(pair, surgery.layers_from_base(pair, [0]), tmp_path / "fine")
    assert entries(tmp_path) == ["base", "fine", "target"]


def test_overflow_in_the_conversion(tmp_path):
    base = save_tiny("llama", tmp_path / "base", seed=0, dtype="bfloat16")
    target = save_tiny("llama", tmp_path / "target", seed=1, dtype="float16")
    spoil(base, "model.layers.0.mlp.up_proj.weight", 1e6)
    with (
        surgery.Pair(base, target) as pair,
        pytest.raises(InputError, match=r"do not fit into float16"),
    ):
        on_disk.write_model(pair, surgery.layers_from_base(pair, [0]), tmp_path / "out")
    assert entries(tmp_path) == ["base", "target"]


def test_models_that_do_not_go_together(tmp_path, two, capsys):
    deep = save_tiny("llama", tmp_path / "deep", layers=4)
    wide = save_tiny("llama", tmp_path / "wide", intermediate_size=64)
    other = save_tiny("qwen2", tmp_path / "other")
    heads = save_tiny("llama", tmp_path / "heads", rms_norm_eps=1e-3)
    with pytest.raises(InputError, match=r"deep has 4 layers and .*target 3"):
        surgery.Pair(deep, two[1])
    with pytest.raises(InputError, match=r"is a qwen2 and .* a llama"):
        surgery.Pair(other, two[1])
    with pytest.raises(InputError, match="no such folder"):
        surgery.Pair(tmp_path / "nowhere", two[1])
    with (
        surgery.Pair(wide, two[1]) as pair,
        pytest.raises(InputError, match=r"has shape \[.*wide and \[.*agree in shape"),
    ):
        surgery.layers_from_base(pair, [0])
    with surgery.Pair(heads, two[1]):
        assert "rms_norm_eps is 0.001 in the base" in capsys.readouterr().err
    with surgery.Pair(*two) as pair, pytest.raises(InputError, match="layer 3 does not exist"):
        surgery.layers_from_base(pair, [3])


def test_a_tensor_that_only_one_has(tmp_path):
    base = save_tiny("qwen2", tmp_path / "base")
    target = save_tiny("qwen2", tmp_path / "target", seed=1)
    held = load_file(base / "model.safetensors")
    del held["model.layers.1.self_attn.q_proj.bias"]
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    for pair in (surgery.Pair(base, target), surgery.Pair(target, base)):
        with pytest.raises(InputError, match=r"has no tensor model\.layers\.1\.self_attn\.q_proj\.bias"):
            surgery.layers_from_base(pair, [1])
        surgery.layers_from_base(pair, [0])


def test_the_record(tmp_path, two):
    with surgery.Pair(*two) as pair:
        recipe = surgery.parts_from_base(pair, ["q_proj"], [2, 0])
        on_disk.write_model(pair, recipe, tmp_path / "out")
        payload, head = results.read_json(tmp_path / "out" / "swap.json", schema="swap", n_layers=3)
    assert payload["recipe"] == "q_proj of the base in layers 0, 2"
    assert [edit["tensor"] for edit in payload["from_base"]] == [
        f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 2)
    ]
    assert payload["parameters_from_base"] == 2 * 32 * 32
    assert payload["parameters"] == sum(t.numel() for t in read_tensors(two[1]).values())
    assert head["models"]["base"]["spec"] == str(two[0])
    assert set(payload["files"]) == set(entries(tmp_path / "out")) - {"swap.json"}


def test_ranges_of_fused_heads():
    part = archs.ARCHS["gpt_neox"].parts(
        {"model_type": "gpt_neox", "num_attention_heads": 2, "hidden_size": 8},
        0, "v_proj", ["gpt_neox.layers.0.attention.query_key_value.weight"],
    )[0]  # fmt: skip
    edit = surgery.Edit(part.tensor, part.tensor, part.dim, part.index)
    assert edit.describe()["ranges"] == [[8, 12], [20, 24]]


def test_two_sets_of_weights_in_the_target(tmp_path, two):
    """A folder whose model.safetensors shadows other shards is not swapped."""
    save_file(load_file(two[0] / "model.safetensors"), two[1] / "model.safetensors")
    with pytest.raises(InputError, match=r"differ .*remove model\.safetensors"):
        surgery.Pair(*two)
    assert formats.INDEX in entries(two[1])


def test_another_configuration_or_tokenizer_is_another_request(tmp_path):
    """The same weights under another rope, or read by another tokenizer, are not the model that was swapped."""
    base, target = save_tiny("llama", tmp_path / "base", seed=0), save_tiny("llama", tmp_path / "target", seed=1)
    for number, (file, old, new) in enumerate(
        [("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03'), ("tokenizer.json", '"</s>"', '"</t>"')]
    ):
        with surgery.Pair(base, target) as pair:
            on_disk.write_model(pair, surgery.layers_from_base(pair, [0]), tmp_path / f"out{number}")
        content = (target / file).read_text()
        assert old in content
        (target / file).write_text(content.replace(old, new))
        with surgery.Pair(base, target) as pair, pytest.raises(InputError, match="holds another swap"):
            on_disk.write_model(pair, surgery.layers_from_base(pair, [0]), tmp_path / f"out{number}")


# --- embeddings and a head that are one in memory ---


def tied(folder, seed, head=None):
    """A model whose config ties the head, and, with `head`, a head on disk: that of the embeddings."""
    save_tiny("qwen2", folder, seed=seed, tie_word_embeddings=True)
    if head is not None:
        held = read_tensors(folder)
        save_file(held | {"lm_head.weight": head(held["model.embed_tokens.weight"])}, folder / "model.safetensors")
    return folder


def same_head(embeddings):
    return embeddings.clone()


def other_head(embeddings):
    return embeddings.flip(0)


@pytest.mark.parametrize("base_head", [None, same_head, other_head])
@pytest.mark.parametrize("head", [None, same_head, other_head])
@pytest.mark.parametrize("what", ["layers", "embeddings", "embeddings alone"])
def test_tied_heads_in_memory_and_in_the_folder(tmp_path, base_head, head, what):
    """A swap in memory computes what the written folder does when it is loaded, or is refused by name."""
    base, target = tied(tmp_path / "base", 0, base_head), tied(tmp_path / "target", 1, head)
    model = load(target)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with surgery.Pair(base, target) as pair:
        names = pair.arch.embedding_tensors(pair.target.names())
        recipe = {
            "layers": lambda: surgery.layers_from_base(pair, [1]),
            "embeddings": lambda: surgery.tensors_from_base(pair, names),
            "embeddings alone": lambda: surgery.tensors_from_base(pair, names[:1]),
        }[what]()
        on_disk.write_model(pair, recipe, tmp_path / "out")
        truth = logits(load(tmp_path / "out"))
        unties = head is same_head and (
            what == "embeddings alone" or (what == "embeddings" and base_head is other_head)
        )
        if unties:
            with (
                pytest.raises(InputError, match=r"lm_head.weight of .* tied to in memory; write the swap as a folder"),
                in_memory.apply(model, recipe, pair),
            ):
                pass
        else:
            with in_memory.apply(model, recipe, pair) as swapped:
                assert logits(swapped).equal(truth)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
