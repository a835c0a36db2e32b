"""The benchmarks at a tiny size: every way runs, agrees with the obvious one, and stands in the file and the table."""

from __future__ import annotations

import contextlib
import io
import json
import sys

import pytest
import torch
from helpers import load_script

from cpt_utils.base import cli, results
from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import refs
from cpt_utils.measures import compare

bench = load_script("benchmarks/bench.py")
scaling = load_script("benchmarks/scaling.py")
measure, obvious = bench.measure, cli.sibling("benchmarks/obvious.py")
TINY = measure.Shape(32, 48, 4, 2, 64)


@pytest.fixture
def inside(monkeypatch):
    """Commands run in this process: starting Python takes seconds."""

    def watch(command, sample):
        output = io.StringIO()
        if command[1] != "-c":
            with contextlib.redirect_stdout(output):
                load_script(command[1]).main(command[2:])
        last = (output.getvalue().strip().splitlines() or [""])[-1]
        return {"seconds": 1.0, "peak_anonymous_bytes": 5, "peak_rss_bytes": 6, "last_line": last}

    monkeypatch.setattr(measure, "watch", watch)


def test_the_whole_bench_and_what_it_predicts(tmp_path, inside, monkeypatch, capsys):
    monkeypatch.setattr(measure, "shape_of", lambda gigabytes: TINY)
    monkeypatch.setattr(bench.folders, "refuse_full_disk", lambda *_: None)
    for name, marker in (("README.md", "benchmarks"), ("scaling.md", "scaling")):
        (tmp_path / name).write_text(f"before\n<!-- {marker} -->\nold\n<!-- /{marker} -->\nafter\n")
    file, readme, folder = tmp_path / "b.json", tmp_path / "README.md", tmp_path / "scratch"
    words = ["-o", str(file), "--readme", str(readme), "--folder", str(folder), "--repeats", "1", "--device", "cpu"]
    bench.main(["--sizes", "0.02,0.01", "--forward", "0.01", *words])
    payload, head = results.read_json(file, "benchmark")
    areas = {target.area for target in bench.TARGETS}
    assert {row["area"] for row in payload["rows"].values()} == areas and len(payload["rows"]) == 2 * 5 + 5
    for row in payload["rows"].values():
        for name, way in row["ways"].items():
            assert "user_seconds" in way or row["area"] not in bench.AREAS
            assert len(way["seconds"]) == 1 and way["seconds"][0] > 0 and way["peak_anonymous_bytes"] > 0, name
    (machine,) = payload["machines"].values()
    assert machine["torch"] == torch.__version__ and "node" not in json.dumps(machine)
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmarks -->\n**") and text.endswith("<!-- /benchmarks -->\nafter\n")
    assert "old" not in text and "{" not in text
    assert sum(line.startswith(f"| {t.area}: {t.words} |") for t in bench.TARGETS for line in text.splitlines()) == 14
    assert not any(folder.iterdir())

    # An interrupted run is gone on with: what is there is not measured again, and the table is of everything.
    del payload["rows"][next(key for key in payload["rows"] if key.startswith("layer swap 0.02"))]
    file.write_text(json.dumps({"_header": head, **payload}))
    dates = {key: row["date"] for key, row in payload["rows"].items()}
    done = []
    monkeypatch.setattr(bench, "say", done.append)
    bench.main(["--sizes", "0.02,0.01", "--forward", "0.01", "--go-on", *words])
    rows = ["comparison itself on cpu", "comparison, whole process on cpu", "spectra on cpu"]
    assert done[:-1] == ["a pair of 0.02 GB each", *rows, "layer swap", "component swap"]
    again = results.read_json(file, "benchmark")[0]["rows"]
    assert set(dates) < set(again) and len(again) == 15

    scaling.main(["--input", str(file), "--doc", str(tmp_path / "scaling.md")])
    text = (tmp_path / "scaling.md").read_text()
    assert "| layer swap | 0.01 to 0.02 GB |" in text and "70B x 20, read from disk" in text and "old" not in text
    capsys.readouterr()


def test_ours_and_obvious_weights_agree(tmp_path):
    """The two comparisons give the same numbers, and the two swaps the same tensors."""
    from helpers import read_tensors

    from cpt_utils.interventions import on_disk, surgery

    measure.write_model(tmp_path / "base", TINY, 0, "1GB")
    measure.write_model(tmp_path / "target", TINY, 1, "20KB")
    found = compare.changes(refs.model(tmp_path / "base"), refs.run(str(tmp_path / "target")))[0]
    slow = obvious.compare(str(tmp_path / "base"), str(tmp_path / "target"))
    assert len(slow) == 2 * 7
    for name, row in slow.items():
        change = found[int(name.split(".")[2])][name.split(".")[4]]
        assert change.mean_abs == pytest.approx(row["mean_abs"], rel=1e-6)
        assert change.max_abs == pytest.approx(row["max_abs"], rel=1e-6)
        assert change.sum_sq**0.5 == pytest.approx(row["norm"], rel=1e-6)
    for kind in ("layers", "ffn"):
        obvious.swap(str(tmp_path / "base"), str(tmp_path / "target"), str(tmp_path / f"{kind}-slow"), kind, [1])
        with surgery.Pair(tmp_path / "base", tmp_path / "target") as pair:
            whole = kind == "layers"
            recipe = (
                surgery.layers_from_base(pair, [1])
                if whole
                else surgery.parts_from_base(pair, ("gate_proj", "up_proj", "down_proj"), [1])
            )
            on_disk.write_model(pair, recipe, tmp_path / kind)
        one, other = read_tensors(tmp_path / kind), read_tensors(tmp_path / f"{kind}-slow")
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_memory_and_time_of_a_process():
    """A process that holds 200 MB for half a second, in a child of its own: both are seen."""
    work = "import time; held = bytearray(b'x') * 200_000_000; time.sleep(0.5); print('done')"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}], check=True)"
    found = measure.watch([sys.executable, "-c", outer])
    assert 200e6 < found["peak_anonymous_bytes"] < 300e6 and found["peak_rss_bytes"] > found["peak_anonymous_bytes"]
    assert found["seconds"] > 0.5 and found["last_line"] == "done"
    with pytest.raises(InputError, match="failed: ZeroDivisionError"):
        measure.watch([sys.executable, "-c", "1 / 0"])


def test_rounds_take_turns_and_ratios_are_medians():
    order = []
    ways = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = measure.interleaved(ways, {"a": 3, "b": 2}, lambda: order.append("-"))
    assert "".join(order) == "-a-b" * 3 + "-a"  # the first round is for the memory
    assert [len(found[name]["seconds"]) for name in "ab"] == [3, 2]
    assert all(found[name][key] > 0 for name in "ab" for key in measure.PEAKS)
    assert measure.ratio({"seconds": [4, 1, 9]}, {"seconds": [2, 1, 1]}) == 2
    assert measure.ratio({"seconds": [4, 2, 9]}, {"seconds": [2, 2]}) == 1.5


def test_targets_are_judged_by_their_rows():
    def row(gigabytes, ours):
        ways = {"ours": {"seconds": [ours]}, "floor": {"seconds": [1.0]}}
        return {"area": "counts", "gigabytes": gigabytes, "ways": ways}

    (target,) = (t for t in bench.TARGETS if t.area == "counts")
    value, at = target.worst([row(0.1, 1.05), row(2, 1.3)])
    assert (value, at["gigabytes"]) == (1.3, 2) and not target.met(value)
    lines = bench._targets([row(0.1, 1.05), row(2, 1.3)])
    assert lines[2:] == [
        "| counts: time over the bare decoder | ≤ 1.1 x | 1.3 x (2 GB) | no | the bare decoder takes 1 s, ours 1.3 s |"
    ]


@pytest.mark.parametrize(
    ("points", "wanted"),
    [
        ([(1, 3), (2, 5), (4, 9)], (1, 2)),
        ([(2, 5)], (0, 2.5)),
        ([(1, 1), (3, 9)], (0, 2.8)),
        ([(1, 5), (2, 3)], (4, 0)),
    ],
)
def test_slopes(points, wanted):
    """A line; one point through the origin; no negative start; no negative slope."""
    assert scaling.fit(points) == pytest.approx(wanted)
