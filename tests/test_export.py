"""The table of all numbers: its values are those of the JSON, none is left out, what is missing gives no row."""

from __future__ import annotations

import json
import shutil

import pytest
from test_claims import STEPS, L
from test_report_figures import Illustrated

from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study

rows = cli.sibling("report/rows.py")
LAST = STEPS[-1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return Illustrated(tmp_path_factory.mktemp("study")).all()


@pytest.fixture(scope="module")
def table(finished):
    return rows.rows(Study.find(finished.study))


def found(table, **columns):
    """The one row with these columns."""
    fits = [row for row in table if all(row[key] == value for key, value in columns.items())]
    assert len(fits) == 1, (len(fits), columns)
    return fits[0]


def floats(value):
    """Every number with a fraction in a payload, but in what was asked for."""
    if isinstance(value, float):
        yield value
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in below:
        if key not in rows.SETTINGS:
            yield from floats(one)


def test_values_are_those_read_by_hand(finished, table):
    def payload(place):
        return json.loads((finished.results / place).read_text())

    retrieval = payload(f"sentence-retrieval/eng_Latn-gle_Latn/{finished.run[-1]['model_id']}.json")
    for state, accuracy in retrieval["layer_accuracy"]:
        row = found(table, result="retrieval", step=LAST, hidden_state=state, measure="layer_accuracy")
        assert row["value"] == accuracy and row["layer"] is None and row["condition"] is None
        assert [row["ci_low"], row["ci_high"]] == dict(retrieval["layer_accuracy_ci"])[state]
        assert row["n"] == retrieval["_header"].get("n_used") and row["language"] == "gle_Latn"
        untrained = found(
            table, result="retrieval", condition="untrained", hidden_state=state, measure="layer_accuracy"
        )
        assert untrained["step"] is None
        assert found(table, result="retrieval", step=0, hidden_state=state, measure="layer_accuracy")
    change = payload("weight-diff/attn_vs_ffn.json")["checkpoints"][str(LAST)]["layers"]["layer_2"]
    row = {"result": "attn_vs_ffn", "step": LAST, "layer": 2}
    assert found(table, **row, component="v_proj", measure="mean_abs")["value"] == change["v_proj"]
    assert found(table, **row, component="v_proj", measure="cosine")["value"] == change["cosine"]["v_proj"]
    assert found(table, **row, component="ffn", measure="mean_abs/max")["value"] == change["ffn_max"]
    swaps = payload("layer-swap/controls.json")
    hub = next(row for row in swaps["sets"] if row["name"] == "semantic_hub")
    row = found(table, result="layer_swap", condition="semantic_hub", measure="nll_per_byte")
    assert (row["value"], row["step"]) == (hub["values"]["nll_per_byte"], LAST)
    assert [row["ci_low"], row["ci_high"]] == [hub[end]["nll_per_byte"] for end in ("ci_low", "ci_high")]
    compared = swaps["comparison"]["nll_per_byte"]
    row = found(table, result="layer_swap", measure="comparison/nll_per_byte/own_minus_random")
    assert row["controls"] == compared["n_random"] and row["ci_high"] == compared["ci_high"]
    arm = payload("arms.json")["models"]["hub_frozen"]
    row = found(table, result="arms", run="hub_frozen", measure="share/nll_per_byte")
    assert (row["value"], row["ci_low"]) == tuple(arm["share"]["nll_per_byte"][key] for key in ("value", "ci_low"))
    silenced = payload("lsn/deactivate.json")
    row = found(table, result="deactivation", condition="gle_Latn", language="eng_Latn", measure="matrix")
    assert row["value"] == silenced["matrix"]["gle_Latn"]["eng_Latn"]
    assert [row["ci_low"], row["ci_high"]] == silenced["intervals"]["gle_Latn"]["eng_Latn"]
    row = found(table, result="lsn_activation", step=0, condition="control", measure="activation/all_layers")
    assert row["value"] == pytest.approx(0.03)


def test_no_number_of_any_result_is_left_out(finished, table):
    said: dict[str, set] = {}
    for row in table:
        said.setdefault(row["file"], set()).update(row[key] for key in ("value", "ci_low", "ci_high"))
    files = [path for path in finished.results.rglob("*.json") if "_header" in path.read_text()]
    for path in files:
        payload = results.read_json(path)[0]
        assert set(floats(payload)) <= said.get(str(path), set()), path
    assert len(said) > 20 and set(said) <= set(map(str, files))


def test_no_two_rows_have_one_name(table):
    names = [tuple(row[key] for key in rows.COLUMNS if key not in ("value", "ci_low", "ci_high", "n")) for row in table]
    assert len(names) == len(set(names)) > 1000
    assert all(tuple(row) == rows.COLUMNS and row["value"] is not None for row in table)
    layers = {row["layer"] for row in table}, {row["hidden_state"] for row in table}
    assert layers == ({None, *range(L)}, {None, *range(L + 1)})


def test_a_missing_result_gives_no_row_and_a_missing_number_none(finished, table, tmp_path):
    results_copy = tmp_path / "results"
    shutil.copytree(finished.results, results_copy)
    study = tmp_path / "study.yaml"
    text = "\n".join(line for line in finished.study.read_text().splitlines() if not line.startswith("results"))
    study.write_text(f"{text}\nresults: {results_copy}\n")
    (results_copy / "arms.json").unlink()
    swaps = json.loads((results_copy / "layer-swap/controls.json").read_text())
    swaps["comparison"]["nll_per_byte"] |= {"own_minus_random": None, "ci_low": None, "ci_high": None}
    (results_copy / "layer-swap/controls.json").write_text(json.dumps(swaps))
    left = rows.rows(Study.find(study))
    assert {row["result"] for row in table} - {row["result"] for row in left} == {"arms"}
    gone = [
        row for row in table if row["result"] != "arms" and row["measure"].endswith("nll_per_byte/own_minus_random")
    ]
    still = [row["file"] for row in left if row["measure"].endswith("nll_per_byte/own_minus_random")]
    assert len(gone) - len(still) == 1 and 0 not in [row["n"] for row in left]


def test_what_was_made_with_limit_is_left_out_and_a_damaged_file_is_one_line(finished, tmp_path, capsys):
    folder = tmp_path / "results"
    shutil.copytree(finished.results / "weight-diff", folder / "weight-diff")
    study = Study({"name": "made", "results": str(folder)}, tmp_path / "study.yaml")
    path = folder / "weight-diff/int_and_sem.json"
    payload, header = results.read_json(path)
    results.write_json(path, payload, header | {"limit": 3})
    assert {row["result"] for row in rows.rows(study)} == {"attn_vs_ffn"}
    assert "int_and_sem.json was made with --limit 3 and is left out" in capsys.readouterr().err
    path.write_text(path.read_text()[:-40])
    with pytest.raises(InputError, match=r"int_and_sem.json is not valid JSON"):
        rows.rows(study)


def test_a_new_kind_of_result_keeps_its_keys_as_names():
    header = {"schema": "new", "models": {"target": {"step": 7}}, "target_lang": "gle_Latn"}
    payload = {"depth": {"mean": 2.5, "ci_low": 2.0, "ci_high": None, "n": 9}, "by": [[0, 0.5], [3, 0.25]], "ok": True}
    found = list(rows.of_file(payload, header))
    assert [(row["measure"], row["value"], row["step"]) for row in found] == [
        ("depth", 2.5, 7), ("by/0", 0.5, 7), ("by/3", 0.25, 7)
    ]  # fmt: skip
    assert (found[0]["ci_low"], found[0]["ci_high"], found[0]["n"]) == (2.0, None, 9)
