"""The table of all numbers: its values are those of the JSON, none is left out, what is missing gives no row."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, load_script
from test_claims import STEPS, L
from test_report_figures import Illustrated

from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError
from cpt_utils.base.study import Study

rows = cli.sibling("report/rows.py")
script = load_script("report/export.py")
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


def test_of_retrieval_alone_the_study_says_which_model_is_which(finished, table, tmp_path):
    shutil.copytree(finished.results / "sentence-retrieval", tmp_path / "sentence-retrieval")
    swapped = {"spec": "results/layer-swap/random", "model_id": "layer-swap__random", "step": None}
    folder = tmp_path / "sentence-retrieval/eng_Latn-gle_Latn"
    payload, header = results.read_json(folder / f"{finished.base['model_id']}.json")
    results.write_json(folder / "layer-swap__random.json", payload, header | {"models": {"model": swapped}})
    study = Study.find(finished.study)
    study.values |= {"results": str(tmp_path)}
    found = rows.rows(study)
    of = {(row["step"], row["condition"]) for row in found}
    assert of == {(0, None), (None, "untrained"), (None, "layer-swap/random"), *((step, None) for step in STEPS)}
    names = ("step", "hidden_state", "measure", "value", "condition")
    before = {tuple(row[key] for key in names) for row in table if row["result"] == "retrieval"}
    assert before == {tuple(row[key] for key in names) for row in found if row["condition"] != "layer-swap/random"}


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
    path.write_text("{}")  # by hand: no header, no rows
    assert {row["result"] for row in rows.rows(study)} == {"attn_vs_ffn"}
    results.write_json(path, {"heads": [1]}, header | {"schema": "cogsym"})
    with pytest.raises(InputError, match=r"int_and_sem.json is not as its step writes it .*; run that step again"):
        rows.rows(study)


def test_a_new_kind_of_result_keeps_its_keys_as_names():
    header = {"schema": "new", "models": {"target": {"step": 7}}, "target_lang": "gle_Latn"}
    payload = {"depth": {"mean": 2.5, "ci_low": 2.0, "ci_high": None, "n": 9}, "by": [[0, 0.5], [3, 0.25]], "ok": True}
    found = list(rows.of_file(payload, header))
    assert [(row["measure"], row["value"], row["step"]) for row in found] == [
        ("depth", 2.5, 7), ("by/0", 0.5, 7), ("by/3", 0.25, 7)
    ]  # fmt: skip
    assert (found[0]["ci_low"], found[0]["ci_high"], found[0]["n"]) == (2.0, None, 9)


# ---------------------------------------------------------------- report/export.py


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    script.main(["--study", str(finished.study), "--output", str(folder)])
    return folder


def test_csv_and_parquet_are_the_rows_and_missing_is_empty(exported, table):
    from pyarrow import parquet

    assert parquet.read_table(exported / "numbers.parquet").to_pylist() == table
    with open(exported / "numbers.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    as_text = [{key: "" if value is None else str(value) for key, value in row.items()} for row in table]
    assert lines == as_text and any(line["layer"] == "" for line in lines)


def test_the_order_of_files_on_disk_changes_nothing(exported, finished, monkeypatch, tmp_path):
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: reversed(list(listed(path, pattern))))
    script.main(["--study", str(finished.study), "--output", str(tmp_path)])
    for path in sorted(exported.rglob("*.*")):
        assert path.read_bytes() == (tmp_path / path.relative_to(exported)).read_bytes(), path


def test_tables_are_as_wide_as_a_column_and_hold_the_numbers(exported, finished):
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    def points(text, size):  # in Times, as LaTeX sets it but for kerning
        text = re.sub(r"[${}\\]", "", text.replace(r"\pm", "±").replace("h_", "h"))
        return TextPath((0, 0), text, size=size, prop=FontProperties("STIXGeneral")).get_extents().width if text else 0

    def width(cell):
        first, _, small = cell.partition(r"\scriptsize")
        return points(first.strip(), 8) + (2 if small else 0) + points(small, 7)

    for path in exported.glob("tables/*.tex"):
        lines = [line.removesuffix(r" \\").split(" & ") for line in path.read_text().splitlines() if " & " in line]
        columns = [max(map(width, column)) for column in itertools.zip_longest(*lines, fillvalue="")]
        assert sum(columns) + 12 * len(columns) < 3.25 * 72.27 + 12, (path.name, columns)
        assert len(lines) <= 12 and len({len(line) for line in lines}) == 1, path
    swaps = json.loads((finished.results / "layer-swap/controls.json").read_text())["sets"]
    cost = next(row for row in swaps if row["name"] == "semantic_hub")["change"]["nll_per_byte"]["mean"]
    hub = next(line for line in (exported / "tables/swaps.tex").read_text().splitlines() if line.startswith("hub"))
    assert f"{cost:.3f}".replace("0.", ".") in hub


def test_numbers_are_written_as_they_are():
    told = [script._number(value) for value in (10.489, -0.25, 0.0, 37.0, 1.0, -3.1256, 0.9996)]
    assert told == ["10.489", "$-$.250", ".000", "37", "1", "$-$3.126", "1.000"]


def test_a_row_has_the_seed_that_its_result_was_made_with(tmp_path):
    results.write_json(tmp_path / "arms.json", {"x": 1}, {"schema": "arms", "seed": 3})
    results.write_json(tmp_path / "spectral/heads.json", {"x": 1}, {"schema": "heads"})
    (tmp_path / "study.yaml").write_text(f"results: {tmp_path}\nseed: 8\n")
    every = rows.rows(Study.find(tmp_path / "study.yaml"))
    assert {row["result"]: row["seed"] for row in every} == {"arms": 3, "heads": 8}


def test_a_mean_over_some_of_the_seeds_says_how_many():
    def row(seed, value, measure="acc"):
        return {"seed": seed, "value": value, "measure": measure, "ci_low": 0.0, "ci_high": 1.0}

    every = [row(1, 0.2), row(2, 0.4), row(3, 7.0, "other")]
    assert script.told(every, measure="acc") == r".300$^{2}$ \scriptsize$\pm$ .141"
    assert script.told(every, measure="other") == r"7$^{1}$" and script.told(every[:2], ends=False) == ".300"
    assert script.told(every[:1]) == r".200 \scriptsize[.000, 1]"


def test_retrieval_between_other_languages_is_in_the_numbers_and_not_in_the_table(exported, finished, tmp_path):
    shutil.copytree(finished.results / "sentence-retrieval", tmp_path / "results/sentence-retrieval")
    pair = tmp_path / "results/sentence-retrieval/eng_Latn-gle_Latn"
    shutil.copytree(pair, pair.with_name("eng_Latn-fra_Latn"))
    for file in pair.with_name("eng_Latn-fra_Latn").glob("*.json"):
        whole = json.loads(file.read_text())
        whole |= {"layer_accuracy": [[i, 0.9] for i, _ in whole["layer_accuracy"]]}
        whole["_header"]["target_lang"] = "fra_Latn"
        file.write_text(json.dumps(whole))
    study = tmp_path / "study.yaml"
    text = finished.study.read_text()
    study.write_text(re.sub(r"results: .*", f"results: {tmp_path}/results", text))
    script.main(["--study", str(study), "--output", str(tmp_path)])
    lines = csv.DictReader((tmp_path / "numbers.csv").read_text().splitlines())
    assert {line["language"] for line in lines} == {"gle_Latn", "fra_Latn"}
    assert (tmp_path / "tables/retrieval.tex").read_text() == (exported / "tables/retrieval.tex").read_text()


def test_losses_are_told_apart_by_language_and_pairs_of_runs_by_name(tmp_path):
    header = {"schema": "rewind", "heldout": {"documents": 9}, "heldout_others": {"fra_Latn": {"documents": 4}}}
    ends = {"ci_low": 0.0, "ci_high": 9.0}
    losses = {"nll_per_byte": {"at": {"value": 1.0} | ends}, "nll_per_byte:fra_Latn": {"at": {"value": 2.0} | ends}}
    payload = {"sets": [{"name": "base", "values": {"nll_per_byte": 1.0, "nll_per_byte:fra_Latn": 2.0}}],
               "beyond": {"a:energy": {"random:energy": losses}}}  # fmt: skip
    results.write_json(tmp_path / "spectral/rewind.json", payload, header)
    (tmp_path / "study.yaml").write_text(f"results: {tmp_path}\nlanguages: {{base: eng_Latn, target: gle_Latn}}\n")
    every = rows.rows(Study.find(tmp_path / "study.yaml"))
    told = [(row["language"], row["measure"], row["value"], row["n"]) for row in every]
    assert told == [
        ("gle_Latn", "nll_per_byte", 1.0, 9), ("fra_Latn", "nll_per_byte", 2.0, 4),
        ("gle_Latn", "beyond/random:energy/nll_per_byte/at", 1.0, None),
        ("fra_Latn", "beyond/random:energy/nll_per_byte/at", 2.0, None),
    ]  # fmt: skip
    pairs = {"runs": {"pairs": [{"runs": ["one", "two"], "shared": 3}]}}
    assert [row["measure"] for row in rows.of_file(pairs, {"schema": "heads"})] == ["runs/pairs/one and two/shared"]


def test_seeds_stand_below_one_another_and_tables_have_mean_and_spread(finished, tmp_path):
    results_of = tmp_path / "results"
    for seed in (1, 2):
        shutil.copytree(finished.results / "weight-diff", results_of / str(seed) / "weight-diff")
        for file in (results_of / str(seed)).rglob("*.json"):
            payload, header = results.read_json(file)
            results.write_json(file, payload, header | {"seed": seed})
    path = results_of / "2/weight-diff/int_and_sem.json"
    payload, header = results.read_json(path)
    for row in payload["checkpoints"].values():
        row["interface_avg"] += 0.002
    results.write_json(path, payload, header)
    study = tmp_path / "study.yaml"
    study.write_text(f"name: made\nresults: {results_of}/{{seed}}\n")
    out = tmp_path / "out"
    script.main(["--study", str(study), "--seeds", "1,2", "--output", str(out)])
    lines = list(csv.DictReader((out / "numbers.csv").read_text().splitlines()))
    seeds = {line["seed"] for line in lines}, {line["file"].split("/")[-3] for line in lines}
    assert seeds == ({"1", "2"}, {"1", "2"})
    last = payload["checkpoints"][str(LAST)]["interface_avg"]
    line = (out / "tables/change.tex").read_text().splitlines()[-3]
    assert line.split(" & ")[1] == rf"{1000 * (last - 0.001):.3f} \scriptsize$\pm$ 1.414"
    with pytest.raises(InputError, match="several seeds or studies need --output FOLDER"):
        script.main(["--study", str(study), "--seeds", "1,2"])
    study.write_text(f"name: made\nresults: {results_of}/1\n")
    with pytest.raises(InputError, match=r"the seeds share .*results/1.*must hold {seed}"):
        script.main(["--study", str(study), "--seeds", "1,2", "--output", str(out)])


def test_what_cannot_be_exported_is_one_line(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="give --study FILE"):
        script.main([])
    empty = tmp_path / "empty.yaml"
    empty.write_text("name: empty\nresults: nowhere\n")
    with pytest.raises(InputError, match="nowhere holds no result; run the steps of the README first"):
        script.main(["--study", str(empty)])
    with pytest.raises(InputError, match=r"study.yaml and .* are both called made; rename one"):
        script.main([str(finished.study), str(finished.study), "--output", "out"])
    assert list(tmp_path.iterdir()) == [empty]


def test_the_notebook_draws_its_two_figures_from_the_table(exported, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    notebook = json.loads((ROOT / "docs/plot_your_own.ipynb").read_text())
    assert notebook["nbformat"] == 4 and not any(cell.get("outputs") for cell in notebook["cells"])
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names, table = {}, re.search(r'TABLE = "(.*?)"', code[0])[1]
    assert table == "results/demo/report/numbers.parquet"
    for cell in code:
        exec(cell.replace(table, str(exported / "numbers.parquet")), names)
    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    assert len(figures) == 2
    lines = figures[0].axes[0].get_lines()
    assert len(lines) == len(STEPS) + 2 and all(len(line.get_xdata()) == L + 1 for line in lines)
    assert figures[1].axes[0].images[0].get_array().shape == (7, L)
    pyplot.close("all")
