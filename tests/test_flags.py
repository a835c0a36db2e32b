"""--run, --base and --output say the same in every script that takes a run, a base, or writes a result."""

from __future__ import annotations

import pytest
from helpers import load_script

RUN_AND_BASE = (
    "layer-swap/layer-swap.py",
    "weight-diff/int_and_sem.py",
    "weight-diff/attn_vs_ffn.py",
    "weight-diff/gate_lsn.py",
    "lsn/lsn_activation_cpt.py",
    "lsn/deactivate.py",
    "component-swap/attn_int_swap.py",
    "component-swap/ffn_lsn_swap.py",
    "lm_eval_sib200/evaluate.py",
    "language-loss/language_loss.py",
    "cpt/generate.py",
    "layer-ablation/ablation_sweep.py",
    "spectral/heads.py",
    "spectral/rewind.py",
    "spectral/truncate.py",
    "spectral/connect.py",
    "spectral/spectrum.py",
    "alignment/gradients.py",
    "alignment/bigram.py",
    "moe-routing/routing.py",
    "moe-routing/steering.py",
    "steering/steer.py",
)
# The published --base of sentence retrieval is a language.
RUN_ALONE = ("sentence-retrieval/sr_experiment.py", "lsn/activation.py", "lsn/text_scores.py")
OUTPUT = (
    "layer-specialize/layer_specialize.py",
    "downstream-correlation/downstream_correlation.py",
    "activation-correlation/activation-correlation.py",
    "lsn/identify.py",
    "lsn/lape_mask.py",
    "lsn/load_oscar.py",
    "lm_eval_sib200/generate.py",
    "cpt/train.py",
    "cpt/documents.py",
    "cpt/continuations.py",
    "cpt/compare_arms.py",
    "layer-ablation/cogsym.py",
    "layer-ablation/compare_runs.py",
    "demo/world.py",
    "report/claims.py",
    "report/figures.py",
    "report/export.py",
    "report/compare.py",
    "report/page.py",
    "studies/across_seeds.py",
)


@pytest.mark.parametrize("path", RUN_AND_BASE + RUN_ALONE + OUTPUT)
def test_every_script_knows_the_common_names(path):
    flags = load_script(path).build_parser()._option_string_actions
    assert "--output" in flags
    assert path in OUTPUT or "--run" in flags
    assert path not in RUN_AND_BASE or "--base" in flags


def test_a_name_and_a_place_are_one(tmp_path, monkeypatch, capsys):
    from cpt_utils.base import cli
    from cpt_utils.base.errors import InputError

    assert cli.named(None, None, "") is None and cli.named("a", None, "") == "a" and cli.named(None, ["b"], "") == ["b"]
    with pytest.raises(InputError, match="TARGET and --run are the same argument"):
        cli.named("a", ["b"], "TARGET and --run")
