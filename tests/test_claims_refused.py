"""What claims refuse: results that are damaged, chosen from, or not about the same thing as the others."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_claims import ATTENTION, CHANGE, FFN, LAST, LAYER_SWAP, PARTS, STRENGTH, TASK, UNTRAINED, calibrate, edit, run
from test_claims import finished as finished
from test_claims import made as made
from test_claims import no_figure as no_figure

from cpt_utils.base import results
from cpt_utils.base.errors import InputError


def first(sets, name):
    return next(row for row in sets if row["name"] == name)


def header(**facts):
    return lambda t: t["_header"].update(facts)


def data(sha):
    return lambda t: t["_header"]["data"].update(pairs_sha256=sha)


def value(place, name, key, to):
    return place, lambda t: first(t["sets"], name)["values"].__setitem__(key, to)


def alike_layers(t):
    for row in t["sets"]:
        if row["name"] == "random":
            row["layers"] = [0, 1, 2, 3]


def one_layer(t):
    for row in t["sets"]:
        if row["name"] == "random":
            row |= {"layers": [0], "component": "ffn"}


def changed_layers(t):
    t["interface_layers"] = [0, 1]


def other_model(role):
    return lambda t: t["_header"]["models"][role].update(weights_sample="0" * 16)


def chosen_steps(t):
    t["values"] = {step: t["values"][step] for step in ("30", "180", "600")}


NAN = float("nan")
DAMAGED = {  # what is done to the results -> the line that refuses them
    "own value NaN": ([value(LAYER_SWAP, "semantic_hub", "nll_per_byte", NAN)], "not finite, at sets.2.values.nll_per"),
    "own value null": ([value(LAYER_SWAP, "semantic_hub", "task_accuracy", None)], "has no values.task_accuracy"),
    "random value infinite": ([value(ATTENTION, "random", "nll_per_byte", float("inf"))], "not finite"),
    "accuracy null": ([(LAST, lambda t: t["layer_accuracy"][2].__setitem__(1, None))], "do not belong together"),
    "no accuracy": ([(LAST, lambda t: t.pop("layer_accuracy"))], "lack layer_accuracy"),
    "change null": ([(PARTS, lambda t: t["pooled"]["600"].update(ffn=None))], "has no pooled.600.ffn"),
    "change NaN": ([(PARTS, lambda t: t["checkpoints"]["30"]["layers"]["layer_0"].update(ffn_max=NAN))], "not finite"),
    "curve null": ([(STRENGTH, lambda t: t["series"]["gate"].__setitem__(2, None))], "has no 2"),
    "curve NaN": ([(STRENGTH, lambda t: t["series"]["attention"].__setitem__(2, NAN))], "not finite"),
    "no curves": ([(STRENGTH, lambda t: t.update(series=None))], "is not as its step writes it"),
    "task NaN": ([(TASK, lambda t: t["values"]["30"].update(acc=NAN))], "not finite"),
    "task null": ([(TASK, lambda t: t["values"]["30"].update(acc=None))], "has no values.30.acc"),
    "task True": ([(TASK, lambda t: t["values"]["30"].update(acc=True))], "has True as values.30.acc"),
    "arm NaN": ([("arms.json", lambda t: t["models"]["plain"]["values"].update(task_accuracy=NAN))], "not finite"),
    "arm null": ([("arms.json", lambda t: t["models"]["plain"]["values"].update(task_accuracy=None))], "has no models"),
    "no sets": ([(LAYER_SWAP, lambda t: t.update(sets=None))], "has no sets"),
    "no own set": ([(ATTENTION, lambda t: t["sets"].remove(first(t["sets"], "ffn_interface")))], "has no set ffn"),
    "swap of other sentences": ([(LAYER_SWAP, data("others"))], "made with different sentences"),
    "both component swaps of others": ([(ATTENTION, data("x")), (FFN, data("x"))], "made with different sentences"),
    "other held-out text": ([(LAYER_SWAP, header(heldout={"sha256": "x"}))], "made with different held-out text"),
    "untrained by another margin": ([(UNTRAINED, header(margin_variant="absolute"))], "is not the untrained twin"),
    "untrained of another model": (
        [(UNTRAINED, header(models={"untrained_like": {"model_type": "gpt2"}}))], "is not the untrained twin"
    ),
    "another seed": ([(LAYER_SWAP, header(seed=99))], "made with different seed"),
    "another dtype": ([(LAYER_SWAP, header(dtype="bfloat16"))], "made with different dtype"),
    "one side in another dtype": ([(ATTENTION, header(dtype="bfloat16"))], "made with different dtype"),
    "layers by another measure": ([("layer-specialize/layers.json", header(measure="unit"))], "splits layers by unit"),
    "swap by another measure": ([("layer-specialize/layers.json", header(measure="published")),
                                 (LAYER_SWAP, header(measure="unit"))], "different measure of retrieval"),
    "task of another language": ([(TASK, lambda t: t.update(task="sib200_eng_Latn"))], "is about sib200_eng_Latn, not"),
    "curves of another language": ([(STRENGTH, header(language="eus_Latn"))], "is about eus_Latn, not gle_Latn"),
    "swap of another language": ([(ATTENTION, header(target_lang="eus_Latn"))], "target_lang eus_Latn"),
    "a part of the run": ([(TASK, header(n_used=3, n_available=6))], "is about only a part of the run"),
    "every third checkpoint": ([(TASK, header(checkpoint_stride=3))], "is about only a part of the run"),
    "chosen steps": ([(TASK, chosen_steps)], "is about steps [30, 180, 600], but the run has"),
    "steps missing": ([(CHANGE, lambda t: t["checkpoints"].pop("30"))], "is about steps [10, 80"),
    "limited": ([(TASK, header(limit=3))], "--limit 3"),
    "other layers since": ([("layer-specialize/layers.json", changed_layers)], "but"),
    "no layers said": ([(STRENGTH, lambda t: t["_header"].pop("interface_layers"))], "does not say which interface"),
    "no header": ([(LAYER_SWAP, lambda t: t.pop("_header"))], "does not say which models"),
    "another schema": ([(PARTS, header(schema="else"))], "holds 'else'"),
    "sets all alike": ([(LAYER_SWAP, alike_layers)], "twice, or of a size"),
    "sets of one layer": ([(ATTENTION, one_layer)], "twice, or of a size"),
    "another hub": ([(LAYER_SWAP, lambda t: t["sets"][2].update(layers=[0, 1, 2, 4]))], "is about layers"),
    "another checkpoint": ([(LAST, other_model("model"))], "another model"),
    "another base": ([(FFN, other_model("base"))], "another model"),
    "another plain run": ([("arms.json", other_model("plain"))], "another model"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_damaged_or_mixed_is_refused_in_one_line(what, made, no_figure):
    changes, words = DAMAGED[what]
    for place, change in changes:
        edit(made, place, change)
    with pytest.raises(InputError) as error:
        run(made)
    told = str(error.value)
    assert "\n" not in told and words in told and str(made.results) in told
    assert not (made.results / "report").exists()


def test_tensors_of_another_file_are_refused(made, no_figure):
    pt = made.results / LAST.replace(".json", ".pt")
    tensors = results.read_tensors(pt)
    order = torch.randperm(calibrate.SENTENCES, generator=torch.Generator().manual_seed(0))
    results.write_tensors(pt, tensors | {"hits": tensors["hits"][:, order]})
    with pytest.raises(InputError, match="do not belong together"):
        run(made)
    results.write_tensors(pt, tensors)
    shutil.copy(made.results / LAYER_SWAP.replace(".json", ".pt"), made.results / FFN.replace(".json", ".pt"))
    with pytest.raises(InputError, match="do not belong together"):
        run(made)


def test_an_arm_of_layers_from_before_is_refused(made, no_figure):
    """Whatever else was measured again since step 2 chose them."""

    def trained(layers):
        return lambda t: t["models"]["interface_frozen"].update(layers=layers)

    edit(made, "arms.json", trained(list(calibrate.DEMO["interface"])))
    run(made)
    edit(made, "arms.json", trained([0, 2, 3, 7]))
    with pytest.raises(InputError, match=r"arms.json is about layers \[0, 2, 3, 7\], but .*json says \[0, 1, 3, 7\]"):
        run(made)


def test_an_arm_that_was_trained_again_is_refused(made, finished, tmp_path, no_figure):
    """The plain run is what it was: only the arm's own weights tell."""
    shutil.copytree(finished.folder / "models", tmp_path / "models")
    text = made.study.read_text().replace(str(finished.folder), str(tmp_path))
    made.study.write_text(text + "arms: {hub_frozen: {freeze: hub}, interface_frozen: {freeze: interface}}\n")
    arm = tmp_path / f"models/{made.seed}/arms/interface_frozen/run/checkpoint-{calibrate.STEPS[-1]}"
    now, before = calibrate.write_model(arm, 1.0), calibrate.write_model(tmp_path / "before", 2.0)
    edit(made, "arms.json", lambda t: t["_header"]["models"].update(interface_frozen=now))
    run(made)
    edit(made, "arms.json", lambda t: t["_header"]["models"].update(interface_frozen=before))
    with pytest.raises(InputError, match=r"arms.json is about another interface_frozen than .* trained again"):
        run(made)


def test_a_gain_that_may_be_nothing_has_no_share(made, no_figure):
    """Base and checkpoint alike, or apart by noise: nothing that a swap could lose."""
    path = made.results / LAYER_SWAP
    payload, head = results.read_json(path)
    tensors = results.read_tensors(path.with_suffix(".pt"))
    tensors["nll_per_byte"][0] = tensors["nll_per_byte"][1] + torch.linspace(-0.1, 0.1001, calibrate.UNITS)
    payload["sets"][0]["values"]["nll_per_byte"] = float(tensors["nll_per_byte"][0].mean())
    results.write_json(path, payload, head)
    results.write_tensors(path.with_suffix(".pt"), tensors)
    row = run(made)["C2a"]
    assert row["numbers"][0]["value"] is None and "CPT's gain in loss is not clear" in row["reason"]


def test_an_older_list_of_layers_is_refused(made, no_figure):
    made.write("lsn/result/made.layers.json", {"layers": [1, 2, 3]}, "lsn-layers")
    with pytest.raises(InputError, match=r"attn_int_swap.controls.json is about layers \[1, 4, 5, 6\]"):
        run(made)
