"""Nothing that is loaded runs code: model folders, pickles, results, studies; and no file reaches out of its folder."""

from __future__ import annotations

import json
import os
import pickle
import struct

import harness
import pytest
import torch
from safetensors.torch import load_file

LOADERS: tuple[str, ...] = ("retrieval", "layer_swap", "counts")
READERS: tuple[str, ...] = ("int_and_sem",)
if harness.LONG:
    LOADERS += ("int_and_sem", "deactivate", "train", "lm_eval", "gate_lsn", "token_ids")
    READERS += ("layer_swap", "retrieval", "attn_controls")


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def marker(bench):
    return bench.case / "executed"


def survived(bench, name, outcome, tally, kind, refused=None):
    assert not marker(bench).exists(), (kind, outcome.output[-1500:])
    assert not outcome.timed_out, (kind, outcome.output[-1500:])
    assert "Traceback" not in outcome.output, (kind, outcome.output[-1500:])
    if outcome.code:
        assert not outcome.refused(), (kind, outcome.refused(), outcome.output[-1500:])
    if refused is not None:
        assert bool(outcome.code) == refused, (kind, outcome.output[-1500:])
    tally[kind] += 1


def edit(path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values))


@pytest.mark.parametrize(
    "name", LOADERS if harness.LONG else ("retrieval", "int_and_sem", "layer_swap", "counts", "train")
)
@pytest.mark.parametrize("unknown", [False, True], ids=["known type", "own type"])
def test_code_in_a_model_folder(bench, tally, name, unknown):
    bench.put(name)
    for folder in [path.parent for path in bench.case.glob("models/**/config.json")]:
        classes = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
        (folder / "evil.py").write_text(
            f"open({str(marker(bench))!r}, 'w').close()\nclass Config: ...\nModel = Config\n"
        )
        edit(folder / "config.json", auto_map=classes, **({"model_type": "evil"} if unknown else {}))
        auto = {"AutoTokenizer": ["evil.Config", "evil.Config"]}
        edit(
            folder / "tokenizer_config.json",
            auto_map=auto,
            tokenizer_class="Config" if unknown else "TokenizersBackend",
        )
    survived(bench, name, bench.run(name), tally, "code in a model folder (auto_map)")


@pytest.mark.parametrize("name", ("retrieval", "int_and_sem", "layer_swap"))
def test_a_pickle_for_weights(bench, tally, name):
    bench.put(name)
    for folder in [path.parent for path in bench.case.glob("models/**/config.json")]:
        tensors = {}
        for file in folder.glob("*.safetensors*"):
            tensors |= load_file(file) if file.suffix == ".safetensors" else {}
            file.unlink()
        torch.save({**tensors, "evil": Payload(marker(bench))}, folder / "pytorch_model.bin")
    survived(bench, name, bench.run(name), tally, "code in a pickle of weights", refused=True)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("layers", "results/sentence-retrieval/**/*.pt"), ("identify", "results/lsn/activation_count/*.pt"),
     ("counts", "tokens/*.tiny"), ("deactivate", "tokens/*.tiny"), ("claims", "results/**/*.pt"),
     ("lsn_activation", "tokens/*.tiny")],
)  # fmt: skip
@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_result_with_code(bench, tally, name, pattern, protocol):
    bench.put(name)
    paths = list(bench.case.glob(pattern))
    assert paths
    for path in paths:
        if protocol == "torch":
            torch.save({"hits": Payload(marker(bench))}, path)
        else:
            path.write_bytes(pickle.dumps(Payload(marker(bench))))
    survived(bench, name, bench.run(name), tally, "code in a result or in token ids", refused=True)


@pytest.mark.parametrize(("name", "file"), [("layers", "study.yaml"), ("train", "study.yaml"), ("train", "cpt.yaml")])
def test_a_study_with_code(bench, tally, name, file):
    bench.put(name)
    with (bench.case / file).open("a") as study:
        study.write(f"\nevil: !!python/object/apply:os.system ['touch {marker(bench)}']\n")
    survived(bench, name, bench.run(name), tally, "code in a study file", refused=True)


# ---------------------------------------------------------------- files that lie


def header_of(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path, header, data, length=None):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def _beyond(header, entry, data):
    entry["data_offsets"][1] += 1 << 40


def _more(header, entry, data):
    entry["shape"] = [1 << 40, *entry["shape"][1:]]


def _negative(header, entry, data):
    entry["data_offsets"][0] = -8


def _overlap(header, entry, data):
    length = entry["data_offsets"][1] - entry["data_offsets"][0]
    entry["data_offsets"] = [0, length]


def _text(header, entry, data):
    entry["shape"] = "many"


LIES = {
    "ends beyond the file": _beyond, "a shape larger than its bytes": _more, "a negative place": _negative,
    "tensors that overlap": _overlap, "a shape that is none": _text, "a header longer than the file": 1 << 60,
    "a header cut short": 9,
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("name", READERS)
def test_a_header_that_lies(bench, tally, name, lie):
    bench.put(name)
    path = sorted((bench.case / "models" / "base").glob("*.safetensors"))[0]
    header, data = header_of(path)
    change = LIES[lie]
    if callable(change):
        last = max((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
        change(header, header[last], data)
        write_header(path, header, data)
    else:
        write_header(path, header, data, change)
    survived(bench, name, bench.run(name), tally, "a safetensors header that lies", refused=True)


@pytest.mark.parametrize("place", ["../../secret.safetensors", "{absolute}", "sub/../../../secret.safetensors"])
@pytest.mark.parametrize("name", READERS)
def test_an_index_that_reaches_out_of_its_folder(bench, tally, name, place):
    bench.put(name)
    base = bench.case / "models" / "base"
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = sorted(set(content["weight_map"].values()))[0]
    secret = bench.case / "secret.safetensors"
    os.replace(base / shard, secret)
    named = place.format(absolute=secret)
    content["weight_map"] = {key: named if file == shard else file for key, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    before = secret.read_bytes()
    survived(bench, name, bench.run(name), tally, "an index that names files elsewhere", refused=True)
    assert secret.read_bytes() == before
