"""One runner for whatever is done to a model: records by the whole key, requests that hold a function's parameters."""

from __future__ import annotations

import contextlib
import functools
import json
from dataclasses import dataclass

import pytest
import torch
from helpers import read_tensors, save_tiny, tiny_model

from cpt_utils.architectures import archs
from cpt_utils.base import processes, results
from cpt_utils.base.errors import InputError
from cpt_utils.interventions import activations, in_memory, on_disk, surgery
from cpt_utils.interventions.condition import Condition, function_facts
from cpt_utils.measures import conditions

IDS = torch.arange(3, 40)[None]
DOWN = "model.layers.1.mlp.down_proj.weight"


def truncated(base: torch.Tensor, target: torch.Tensor, rank: int) -> torch.Tensor:
    """The target, with the best approximation of rank `rank` of what was added to the base."""
    u, s, v = torch.linalg.svd((target - base).double(), full_matrices=False)
    return (base.double() + u[:, :rank] * s[:rank] @ v[:rank]).to(target.dtype)


def low_rank(pair: surgery.Pair, rank: int) -> surgery.Recipe:
    edit = pair.edit(DOWN, function=functools.partial(truncated, rank=rank))
    return surgery.Recipe("an update of low rank", {"layers": [1]}, (edit,))


def run(path, found: list[Condition], model, request: dict | None = None, calls: list | None = None, **flags) -> dict:
    """`path` with the sum of the logits under every condition; `calls` gets the conditions that were measured."""

    def measured(model, condition: Condition) -> dict:
        if calls is not None:
            calls.append(condition)
        with torch.no_grad():
            return {"sum": float(model(IDS).logits.double().sum())}

    def write(records: list[dict], request: dict) -> None:
        results.write_json(path, {"sets": records}, results.header("toy", request=request))

    process = processes.Process("cpu")
    conditions.measure(path, "toy", request or {}, found, lambda _of: model, measured, write, process, **flags)
    return results.read_json(path, "toy")[0]


@pytest.fixture
def pair(tmp_path):
    with surgery.Pair(save_tiny("llama", tmp_path / "base", 0), save_tiny("llama", tmp_path / "target", 1)) as found:
        yield found


def test_three_recipes_of_one_name_and_one_layer_are_three_records(tmp_path, pair):
    swapper, model = in_memory.Swapper(pair), tiny_model("llama", 1)
    recipes = [
        surgery.layers_from_base(pair, [1]),
        surgery.parts_from_base(pair, archs.ATTENTION, [1]),
        low_rank(pair, 1),
    ]
    calls: list = []
    found = [swapper.condition("random", recipe, layers=[1]) for recipe in recipes]
    sets = run(tmp_path / "out.json", found, model, calls=calls)["sets"]
    assert [(row["name"], row["layers"]) for row in sets] == [("random", [1])] * 3 and len(calls) == 3
    for row, recipe in zip(sets, recipes, strict=True):
        with in_memory.apply(model, recipe, pair), torch.no_grad():
            assert row["sum"] == float(model(IDS).logits.double().sum())
    assert len({row["sum"] for row in sets}) == 3
    with pytest.raises(ValueError, match="the same name and key"):
        run(tmp_path / "twice.json", [*found, found[1]], model)


def test_rank_1_and_rank_4_are_two_requests(tmp_path, pair):
    model, calls = tiny_model("llama", 1), []
    of_rank = {
        rank: [in_memory.Swapper(pair).condition("truncated", low_rank(pair, rank), layers=[1])] for rank in (1, 4)
    }
    path = tmp_path / "out.json"
    one = run(path, of_rank[1], model, calls=calls)
    assert run(path, of_rank[1], model, calls=calls) == one and len(calls) == 1  # kept
    with pytest.raises(InputError, match="another request"):
        run(path, of_rank[4], model)
    assert run(path, of_rank[4], model, overwrite=True) != one
    on_disk.write_model(pair, low_rank(pair, 1), tmp_path / "swapped")
    on_disk.write_model(pair, low_rank(pair, 1), tmp_path / "swapped")
    with pytest.raises(InputError, match="another swap"):
        on_disk.write_model(pair, low_rank(pair, 4), tmp_path / "swapped")
    base, target, made = (read_tensors(tmp_path / name)[DOWN] for name in ("base", "target", "swapped"))
    torch.testing.assert_close(made, truncated(base, target, 1), rtol=0, atol=1e-6)


def test_a_condition_without_a_base_and_a_run_that_goes_on(tmp_path):
    """An ablation needs one model; a run that was cut off measures what is left, by name and key."""
    model = tiny_model("llama", 1)
    arch = archs.for_config(model.config)

    def without(mask: dict) -> Condition:
        apply = functools.partial(activations.silenced, arch=arch, mask=mask)
        return Condition("random", {"neurons": mask}, apply, {"layers": sorted(mask)})

    found = [Condition("none", {}), *(without({1: [at, at + 1]}) for at in range(4))]
    whole, calls = run(tmp_path / "whole.json", found, model), []

    @contextlib.contextmanager
    def cut_off(_model):
        raise KeyboardInterrupt
        yield

    path = tmp_path / "out.json"
    broken = [*found[:3], Condition("random", found[3].key, cut_off, found[3].facts), found[4]]
    with pytest.raises(KeyboardInterrupt):
        run(path, broken, model, calls=calls)
    assert not path.exists() and len(calls) == 3
    assert run(path, found, model, calls=calls) == whole and [c.id for c in calls] == [c.id for c in found]
    assert len({row["sum"] for row in whole["sets"]}) == 5 and not list(tmp_path.glob("*.partial*"))


def test_a_result_of_before_is_kept(tmp_path):
    """Requests of earlier versions say nothing of their conditions beside what their scripts put there."""
    model, calls = tiny_model("llama", 1), []
    results.write_json(tmp_path / "a.json", {"sets": []}, results.header("toy", request={"model": "m"}))
    results.write_json(tmp_path / "b.json", {"sets": [], "request": {"model": "m"}}, results.header("toy"))
    for name in ("a.json", "b.json"):
        assert run(tmp_path / name, [Condition("none", {})], model, {"model": "m"}, calls)["sets"] == []
        with pytest.raises(InputError, match="model: n asked for, m in the file"):
            run(tmp_path / name, [Condition("none", {})], model, {"model": "n"})
    assert not calls


def test_each_model_is_loaded_once_and_only_one_is_held(tmp_path):
    loaded: list = []
    found = [Condition("a", {}, of="base"), Condition("b", {"x": 1}), Condition("b", {"x": 2})]

    def load(of: str) -> str:
        loaded.append(of)
        return of

    def write(records: list, request: dict) -> None:
        results.write_json(tmp_path / "out.json", {"sets": records}, results.header("toy", request=request))

    def measured(model: str, _condition) -> dict:
        return {"on": model}

    conditions.measure(
        tmp_path / "out.json", "toy", {}, found, load, measured, write, processes.Process("cpu")
    )  # fmt: skip
    payload, _ = results.read_json(tmp_path / "out.json")
    assert loaded == ["base", "target"] and [row["on"] for row in payload["sets"]] == ["base", "target", "target"]


def interpolated(alpha: float):
    def between(base, target):
        return base + alpha * (target - base)

    return between


def extrapolated(alpha: float):
    def between(base, target):
        return target + alpha * (target - base)

    return between


@dataclass(frozen=True)
class Scaled:
    factor: float

    def __call__(self, base, target):
        return self.factor * target

    def of_base(self, base, target):
        return self.factor * base


def test_what_tells_functions_apart():
    functions = (
        interpolated(0.1), interpolated(0.2), extrapolated(0.1), Scaled(2.0), Scaled(3.0), Scaled(2.0).of_base,
        Scaled(3.0).of_base, torch.add,
    )  # fmt: skip
    facts = [function_facts(function) for function in functions]
    assert facts[:4] == [
        {"function": "interpolated.between", "parameters": {"alpha": 0.1}},
        {"function": "interpolated.between", "parameters": {"alpha": 0.2}},
        {"function": "extrapolated.between", "parameters": {"alpha": 0.1}},
        {"function": "Scaled", "parameters": {"factor": 2.0}},
    ]
    assert facts[5] == {"function": "Scaled.of_base", "parameters": {"factor": 2.0}}
    assert len({json.dumps(f) for f in facts}) == len(functions)
    assert function_facts(functools.partial(truncated, rank=4)) == {"function": "truncated", "parameters": {"rank": 4}}
    assert function_facts(truncated) == {"function": "truncated"}
    with pytest.raises(ValueError, match="lambda"):
        function_facts(lambda base, target: base)
    with pytest.raises(ValueError, match="JSON cannot hold"):
        function_facts(functools.partial(truncated, rank=torch.tensor(4)))


def test_the_time_of_all_is_said_after_the_first(tmp_path, monkeypatch, capsys):
    """By a clock of which a measurement takes 3 seconds, loading a model a minute: which comes twice at most."""
    clock = [0.0]
    monkeypatch.setattr(conditions.time, "perf_counter", lambda: clock[0])

    def take(seconds: float) -> dict:
        clock[0] += seconds
        return {}

    found = [Condition(name, {}, of=role) for name, role in zip("abcdefgh", ("base", *["target"] * 7), strict=True)]
    request = {"a": 1}, found, lambda _of: take(60), lambda *_: take(3)
    process = processes.Process("cpu")
    stop = {"at": 2}

    def killed(model, condition):
        if condition.name == "c" and stop.pop("at", None):
            raise KeyboardInterrupt
        return take(3)

    with pytest.raises(KeyboardInterrupt):
        conditions.measure(tmp_path / "out.json", "toy", *request[:3], killed, lambda *_: None, process, estimate=True)
    assert "8 models to measure, 3.00 s each: about 24.0 s (0 min) in all" in capsys.readouterr().out
    conditions.measure(tmp_path / "out.json", "toy", *request, lambda *_: None, process, estimate=True)
    assert "6 models to measure, 3.00 s each: about 18.0 s" in capsys.readouterr().out
    conditions.measure(tmp_path / "more.json", "toy", *request, lambda *_: None, process)
    assert "models to measure" not in capsys.readouterr().out
