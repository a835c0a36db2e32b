"""Hub runs against a server that speaks the few endpoints the client uses: what is fetched, what faults leave."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from helpers import ROOT, read_tensors, save_tiny

from cpt_utils.base.errors import InputError
from cpt_utils.checkpoints import formats, hub, opening, refs, tokenization

STEPS = (512, 1000, 10000)
REVISION = "stage2-ingredient1-step{}-tokens5B"


class Repository:
    """Revisions and their files; `gated` hides the files, `private` everything, `token` opens both."""

    def __init__(self, revisions: dict[str, Path], gated: bool = False, private: bool = False):
        self.gated, self.private = gated, private
        self.commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in revisions}
        self.folders = {self.commits[name]: folder for name, folder in revisions.items()}

    def commit(self, revision: str) -> str | None:
        return self.commits.get(revision, revision if revision in self.folders else None)

    def files(self, commit: str) -> dict[str, Path]:
        folder = self.folders[commit]
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


class FakeHub(ThreadingHTTPServer):
    """Serves `repositories`; `log` has (method, file, range) of every file asked for.

    `cuts`: file -> positions at which successive answers end, with the connection closed or, for a negative one, reset;
    `wall`: file -> position beyond which no byte ever comes. `stall`: a file whose answer halts after its first half.
    """

    daemon_threads = True
    token = "hf_right"

    def __init__(self, repositories: dict[str, Repository]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.log: list[tuple[str, str, str | None]] = []
        self.cuts: dict[str, list[int]] = {}
        self.wall: dict[str, int] = {}
        self.stall, self.stalled, self.over = "", threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):  # a client that stops reading is no fault of the server
        pass

    def fetched(self) -> list[str]:
        return [file for method, file, part in self.log if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def fail(self, status: int, code: str | None, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send_json(self, value) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree|refs)(?:/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not (api or file):
            return self.fail(404, None, "no such endpoint")
        repository = self.server.repositories.get((api or file)[1])
        allowed = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if repository is None or (repository.private and not allowed):
            return self.fail(401, None, "Repository not found")  # to strangers the two look the same
        if api and api[2] == "refs":
            names = [name for name in repository.commits if not name.startswith("v")]
            tags = [name for name in repository.commits if name.startswith("v")]
            ref = {"targetCommit": "0" * 40}
            return self.send_json(
                {"branches": [ref | {"name": n, "ref": f"refs/heads/{n}"} for n in names], "converts": []}
                | {"tags": [ref | {"name": n, "ref": f"refs/tags/{n}"} for n in tags]}
            )
        commit = repository.commit((api or file)[3 if api else 2])
        if commit is None:
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        if api and api[2] == "revision":
            return self.send_json({"id": api[1], "modelId": api[1], "sha": commit, "siblings": []})
        files = repository.files(commit)
        if api:
            return self.send_json(
                [{"type": "file", "path": n, "size": p.stat().st_size, "oid": etag(p)[:40]} for n, p in files.items()]
            )
        if repository.gated and not allowed:
            return self.fail(403 if self.headers.get("Authorization") else 401, "GatedRepo", "Access is restricted")
        if file[3] not in files:
            return self.fail(404, "EntryNotFound", "Entry not found")
        self.send_file(file[3], files[file[3]], commit)

    def send_file(self, name: str, path: Path, commit: str) -> None:
        asked = self.headers.get("Range")
        self.server.log.append((self.command, name, asked))
        data, start = path.read_bytes(), 0
        total, stop = len(data), len(data)
        if asked:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
            start, stop = int(first), min(total, int(last) + 1 if last else total)
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{etag(path)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(total))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if name == self.server.stall:
            self.wfile.write(data[: total // 2])
            self.server.stalled.set()
            self.server.over.wait(60)
            self.close_connection = True
            return
        cut = self.server.cuts[name].pop(0) if self.server.cuts.get(name) else self.server.wall.get(name, stop)
        self.wfile.write(data[start : min(stop, max(start, abs(cut)))])
        if abs(cut) < stop:
            self.wfile.flush()
            if cut < 0:  # a reset instead of an orderly end
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR) if cut >= 0 else self.connection.close()


def etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and a run of three checkpoints in six shards each: one shard a projection, one for all the rest."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for number, name in enumerate(["main", *(REVISION.format(step) for step in STEPS)]):
        folder = save_tiny("llama", root / name, seed=number)
        whole, weight_map = read_tensors(folder), {}
        (folder / "model.safetensors").unlink()
        for tensor in whole:
            kind = next((p for p in ("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj") if p in tensor), "rest")
            weight_map[tensor] = f"model-{kind}.safetensors"
        from safetensors.torch import save_file

        for file in set(weight_map.values()):
            save_file({t: whole[t] for t in whole if weight_map[t] == file}, folder / file, metadata={"format": "pt"})
        (folder / formats.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        found[name] = folder
    return found


@pytest.fixture
def server(models):
    run = {name: folder for name, folder in models.items() if name != "main"}
    server = FakeHub(
        {
            "org/base": Repository({"main": models["main"]}),
            "org/olmo": Repository(run | {"main": models["main"], "stage1-step512": models["main"]}),
            "org/gated": Repository({"main": models["main"]}, gated=True),
            "org/private": Repository({"main": models["main"]}, private=True),
        }
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def online(server, tmp_path, monkeypatch):
    """This process's client, led to the server with an empty cache; returns the server."""
    lead_to(server, tmp_path / "cache", monkeypatch)
    return server


def lead_to(server: FakeHub, cache: Path, monkeypatch) -> None:
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # of 10 MB: what it has of a file, in such pieces
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    for name in ("HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    forget()
    close_session()


def forget() -> None:
    """What a new process would not know."""
    hub._revisions.clear()
    hub._before.clear()


def weights(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("snapshots/*/*.safetensors"))


# --- runs ---


def test_a_pattern_of_revisions_is_a_run(online):
    run = refs.run("org/olmo@stage2-*")
    assert [ref.spec for ref in run] == [f"org/olmo@{REVISION.format(step)}" for step in STEPS]
    assert [ref.step for ref in refs.models(["org/base", "org/olmo@stage2-*"], steps=[512])] == [None, 512]
    with pytest.raises(InputError, match="step 512 appears twice in the run: org/olmo@stage1-step512, org/olmo@stage2"):
        refs.run("org/olmo@*")
    with pytest.raises(InputError, match="no branch or tag that matches the pattern and has a step"):
        refs.run("org/olmo@ma*")
    with pytest.raises(InputError, match="pattern of revisions or folders, that is, a run; name one model"):
        refs.model("org/olmo@stage2-*").config()
    with pytest.raises(InputError, match="neither a folder here nor a repository"):
        refs.run("org/none@step*")


@pytest.fixture
def nested(server, models, tmp_path):
    """A repository as a Trainer leaves that pushes: a final model, its checkpoints as folders; and named branches."""
    top = shutil.copytree(models["main"], tmp_path / "pushed")
    for number, step in enumerate(STEPS):
        folder = shutil.copytree(models[REVISION.format(step)], top / f"checkpoint-{step}")
        (folder / "trainer_state.json").write_text("{}")
        if number:  # the tokenizer stands once, at the top
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name).unlink()
    branches = {f"run-{run}/step{step}": models[REVISION.format(step)] for run in "ab" for step in STEPS[:2]}
    server.repositories["org/cpt"] = Repository({"main": top} | branches)
    return top


def test_folders_of_a_repository_are_a_run(online, nested, models):
    run = refs.run("org/cpt")
    assert [ref.spec for ref in run] == [f"org/cpt/checkpoint-{step}" for step in sorted(STEPS)]
    assert [ref.spec for ref in refs.run("org/cpt/checkpoint-*")] == [ref.spec for ref in run]
    assert refs.models(["org/cpt/checkpoint-512@main"])[0].step == 512
    last = run[-1]
    assert (last.repository, last.subfolder, last.model_id) == (
        "org/cpt", f"checkpoint-{max(STEPS)}", f"org__cpt__checkpoint-{max(STEPS)}",
    )  # fmt: skip
    assert last.resolved_revision() == hashlib.sha1(b"main").hexdigest()
    name = "model.layers.1.self_attn.q_proj.weight"
    with opening.open_folder(last, lazy=True) as stored:
        assert stored.get(name).equal(read_tensors(models[REVISION.format(max(STEPS))])[name])
    assert [file for file in online.fetched() if file.endswith(".safetensors")] == [
        f"checkpoint-{max(STEPS)}/model-q_proj.safetensors"
    ]
    assert not any("trainer_state" in file for file in online.fetched() if file.count("/") > 1)
    assert tokenization.tokenizer_folder(last).name == last.resolved_revision()  # that of the repository
    with pytest.raises(InputError, match=r"org/cpt has no folder checkpoint-7; it has checkpoint-"):
        refs.model("org/cpt/checkpoint-7").config()
    with pytest.raises(InputError, match="has no folder that matches the pattern and has a step"):
        refs.run("org/cpt/epoch-*")


def test_the_top_of_a_repository_is_read_without_its_folders(online, nested):
    refs.model("org/cpt").side_files()
    assert online.fetched() and not any("/" in file for file in online.fetched())


def test_branches_with_a_slash_are_a_run(online, nested):
    run = refs.run("org/cpt@run-a/step*")
    assert [ref.step for ref in run] == sorted(STEPS[:2])
    assert run[0].revision == f"run-a/step{min(STEPS[:2])}" and "/" not in run[0].model_id
    assert run[0].config()["model_type"] == "llama"
    with pytest.raises(InputError, match="appears twice in the run"):
        refs.run("org/cpt@run-*")


def test_dropping_a_folder_leaves_the_others(online, nested, tmp_path):
    one, other, _ = refs.run("org/cpt")
    for ref in (one, other):
        ref.folder(("model-q_proj.safetensors",))
    one.drop()
    assert [path.parent.name for path in (tmp_path / "cache").rglob("snapshots/*/*/*.safetensors")] == [
        f"checkpoint-{other.step}"
    ]


def test_offline_a_pattern_means_the_revisions_in_the_cache(online, tmp_path, monkeypatch):
    from huggingface_hub import constants

    for step in STEPS[:2]:
        refs.model(f"org/olmo@{REVISION.format(step)}").folder()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget()
    run = refs.run("org/olmo@stage2-*")
    assert [ref.step for ref in run] == list(STEPS[:2])
    with opening.open_folder(run[0]) as stored:
        assert len(stored.names()) == len(stored.header("model-rest.safetensors").entries) + 5 * 3
    missing = run[0].folder() / "model-rest.safetensors"
    missing.unlink()
    with opening.open_folder(run[0], lazy=True) as stored, pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        stored.shape("model.norm.weight")
    forget()
    with pytest.raises(InputError, match="only a part is in the hub cache, and the hub cannot be reached"):
        opening.open_folder(run[0])
    with pytest.raises(InputError, match=r"not in the hub cache, and the hub cannot be reached .HF_HUB_OFFLINE is set"):
        refs.model(f"org/olmo@{REVISION.format(STEPS[2])}").config()


def test_a_revision_stays_one_commit(online, models):
    """A branch that moves while a script runs: what is fetched later belongs to what was fetched first."""
    name, olmo = REVISION.format(512), online.repositories["org/olmo"]
    ref = refs.model(f"org/olmo@{name}")
    first = ref.resolved_revision()
    olmo.commits[name], olmo.folders["f" * 40] = "f" * 40, models["main"]
    with opening.open_folder(refs.model(ref.spec)) as stored:
        assert stored.path.name == first
        assert torch.equal(stored.get("model.norm.weight"), read_tensors(models[name])["model.norm.weight"])
    assert refs.model(ref.spec).describe()["revision"] == first
    forget()
    assert ref.describe()["revision"] == "f" * 40


# --- only what is needed ---


def test_only_the_shards_of_the_tensors_asked_for_are_fetched(online, models):
    ref = refs.model(f"org/olmo@{REVISION.format(512)}")
    truth = read_tensors(models[REVISION.format(512)])
    with opening.open_folder(ref, lazy=True) as stored:
        assert set(stored.names()) == set(truth)
        assert sorted(set(online.fetched())) == ["config.json", formats.INDEX]
        for name in truth:
            assert stored.shape(name) == tuple(truth[name].shape) and stored.dtype(name) == truth[name].dtype
        assert all(part == "bytes=0-131071" for method, file, part in online.log if file.startswith("model-"))
        assert not weights(stored.path.parent.parent)  # shapes come from headers, which are asked for alone
        online.log.clear()
        wanted = [name for name in truth if "q_proj" in name or "k_proj" in name]
        stored.fetch(wanted)
        assert sorted(online.fetched()) == ["model-k_proj.safetensors", "model-q_proj.safetensors"]
        for name in wanted:
            assert torch.equal(stored.get(name), truth[name])
        assert len(online.fetched()) == 2
        name = "model.layers.1.mlp.gate_proj.weight"  # without `fetch`: when it is first read
        assert torch.equal(stored.rows(name, 3, 9), truth[name][3:9])
        assert online.fetched()[2:] == ["model-gate_proj.safetensors"]
    with opening.open_folder(ref) as stored:  # not lazy: the files may be read by whoever opens them
        assert weights(stored.path.parent.parent) == sorted(stored.files)


def test_the_next_model_is_fetched_meanwhile(online, models):
    from cpt_utils.models import loading

    ref = refs.model(f"org/olmo@{REVISION.format(1000)}")
    thread = loading.prefetch(ref)
    thread.join(20)
    fetched = len(online.log)
    opening.open_folder(ref).close()
    assert any(file.endswith(".safetensors") for file in online.fetched()) and len(online.log) == fetched
    thread = loading.prefetch(refs.ModelRef("org/none"))  # the load says it
    thread.join(20)
    assert thread.daemon and not thread.is_alive()


def test_a_comparison_of_some_projections_fetches_their_shards(online, models):
    from cpt_utils.measures import compare

    base, run = refs.model("org/base"), refs.run("org/olmo@stage2-*")[:2]
    found = compare.changes(base, run, projections=("q_proj", "up_proj"))
    assert sorted(set(weights(hub._storage("org/base").parent))) == [
        "model-q_proj.safetensors",
        "model-up_proj.safetensors",
    ]
    ours, theirs = (
        read_tensors(models[name])["model.layers.2.mlp.up_proj.weight"] for name in ("main", REVISION.format(512))
    )
    assert found[512][2]["up_proj"].mean_abs == pytest.approx(float((ours - theirs).abs().double().mean()), rel=1e-6)


def test_an_adapter_on_the_hub_and_its_base(online, tmp_path, models):
    from test_adapters import merged, save_adapter

    adapter = save_adapter(models["main"], tmp_path / "adapter", base_model_name_or_path="org/base")
    (adapter / "README.md").write_text("an adapter")
    online.repositories["org/lora"] = Repository({"main": adapter, "step7": adapter})
    ref = refs.model("org/lora@step7")
    assert ref.is_adapter and ref.step == 7 and ref.config() == refs.model(models["main"]).config()
    assert ref.describe()["adapter_of"]["revision"] == online.repositories["org/base"].commit("main")
    with opening.open_folder(ref, lazy=True) as stored:
        name = "model.layers.2.mlp.gate_proj.weight"
        assert torch.equal(stored.get(name), merged(models["main"], adapter)[name])
    fetched = {file for file, part in ((f, p) for m, f, p in online.log if m == "GET") if part is None}
    assert fetched == {
        "adapter_config.json", "adapter_model.safetensors", "config.json", formats.INDEX, "model-gate_proj.safetensors"
    }  # fmt: skip


def test_one_format_of_several_is_fetched(online, tmp_path, models):
    both = save_tiny("llama", tmp_path / "both")
    torch.save(read_tensors(both), both / "pytorch_model.bin")
    (both / "model.fp16.safetensors").write_bytes(b"another variant")
    (both / "consolidated.safetensors").write_bytes(b"another layout")
    online.repositories["org/both"] = Repository({"main": both})
    with opening.open_folder(refs.model("org/both")) as stored:
        assert stored.kind == "safetensors" and stored.files == ["model.safetensors"]
    assert sorted(set(online.fetched())) == ["config.json", "model.safetensors"]


def test_shapes_of_a_single_file_are_read_without_it(online, tmp_path):
    one = save_tiny("llama", tmp_path / "one")
    online.repositories["org/one"] = Repository({"main": one})
    truth = read_tensors(one)
    with opening.open_folder(refs.model("org/one"), lazy=True) as stored:
        assert {name: stored.shape(name) for name in stored.names()} == {n: tuple(t.shape) for n, t in truth.items()}
        assert not weights(tmp_path / "cache")
        assert torch.equal(stored.get("model.norm.weight"), truth["model.norm.weight"])
    assert weights(tmp_path / "cache") == ["model.safetensors"]


def test_an_index_that_names_a_shard_the_repository_lacks(online, tmp_path, models):
    broken = shutil.copytree(models["main"], tmp_path / "broken")
    (broken / "model-rest.safetensors").unlink()
    online.repositories["org/broken"] = Repository({"main": broken})
    for lazy in (True, False):
        with pytest.raises(InputError, match=r"names the shard model-rest.safetensors, which is not there"):
            opening.open_folder(refs.model("org/broken"), lazy=lazy)


@pytest.mark.parametrize("stated", [True, False])
def test_quantised_weights_are_refused_before_they_are_fetched(online, tmp_path, models, stated):
    """By config.json or the names in the index; else by the headers, which are read alone."""
    from safetensors.torch import load_file, save_file

    from cpt_utils.checkpoints import formats
    from cpt_utils.measures import compare

    folder = shutil.copytree(models["main"], tmp_path / "codes")
    file = folder / "model-q_proj.safetensors"
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    if stated:
        config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
        (folder / "config.json").write_text(json.dumps(config))
    online.repositories["org/model-FP8"] = Repository({"step9": folder})
    ref = refs.model("org/model-FP8@step9")
    if stated:
        with pytest.raises(
            formats.Quantised, match=r"org/model-FP8@step9 is quantised \(fp8\).*by its name org/model\)"
        ):
            opening.open_folder(ref, lazy=True)
    for base, other in ((refs.model("org/base"), ref), (ref, refs.model("org/olmo@stage1-step512"))):
        with pytest.raises(formats.Quantised, match=r"q_proj.weight is stored as F8_E4M3"):
            compare.changes(base, [other])
    assert not weights(tmp_path / "cache")


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["x-Q8_0.gguf"], "org/odd holds x-Q8_0.gguf, the format of llama.cpp"),
        (["consolidated.safetensors", "params.json"], "org/odd holds consolidated.safetensors, the format of Mistral"),
        (["hf/model.safetensors"], "in its folder hf: give org/odd/hf"),
    ],
)
def test_repositories_of_other_formats(online, tmp_path, models, names, match):
    folder = tmp_path / "odd"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    shutil.copyfile(models["main"] / "config.json", folder / "config.json")
    online.repositories["org/odd"] = Repository({"main": folder, "v2": folder})
    for lazy in (True, False):
        with pytest.raises(InputError, match=match):
            opening.open_folder(refs.model("org/odd"), lazy=lazy)
    with pytest.raises(InputError, match=match.replace("org/odd holds", "org/odd@v2 holds").replace("/hf", "/hf@v2")):
        opening.open_folder(refs.model("org/odd@v2"))


def test_branches_with_the_same_weights_are_said(online, tmp_path, models, capsys, monkeypatch):
    """Branches that were made before their training went on (allenai/OLMo#915); nothing is fetched to know it."""
    first, last = (models[REVISION.format(step)] for step in STEPS[:2])
    online.repositories["org/early"] = Repository({"step100": first, "step200": first, "step300": last, "step99": last})
    opening.look_over(refs.run("org/early@step*"))
    said = capsys.readouterr().out
    assert "the checkpoints of steps 100, 200 hold the same weights" in said and "of steps 99, 300 hold" in said
    assert not weights(tmp_path / "cache")
    opening.look_over(refs.run("org/olmo@stage2-*"))
    assert capsys.readouterr().out.count("hold the same weights") == 0


# --- faults of the line ---


def test_a_connection_that_ends_in_the_middle_goes_on_from_there(online, models):
    name = "model-rest.safetensors"
    online.cuts[name] = [5000, 9000]
    folder = refs.model("org/base").folder(formats.WEIGHT_PATTERNS)
    assert (folder / name).read_bytes() == (models["main"] / name).read_bytes()
    assert [part for _, file, part in online.log if file == name] == [None, None, "bytes=5000-", "bytes=9000-"]


def test_a_connection_that_is_reset_is_tried_again(online, models, monkeypatch, capsys):
    monkeypatch.setattr(hub, "PAUSE", 0)
    name = "model-rest.safetensors"
    online.cuts[name] = [-5000]
    folder = refs.model("org/base").folder(formats.WEIGHT_PATTERNS)
    assert (folder / name).read_bytes() == (models["main"] / name).read_bytes()
    assert "trying again" in capsys.readouterr().err
    others = [file for file in online.fetched() if file != name]
    assert len(others) == len(set(others))  # what was whole is not fetched twice


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_that_never_holds_leaves_nothing_that_looks_finished(online, tmp_path, monkeypatch, reset):
    monkeypatch.setattr(hub, "PAUSE", 0)
    name = "model-rest.safetensors"
    online.wall[name] = -5000 if reset else 5000
    with pytest.raises(InputError, match=r"org/base could not be fetched \(.+\); run the same command again") as caught:
        opening.open_folder(refs.model("org/base"))
    assert "\n" not in str(caught.value)
    assert name not in weights(tmp_path / "cache")
    sizes = {path.stat().st_size for path in (tmp_path / "cache").rglob("blobs/*")}
    whole = {path.stat().st_size for path in online.repositories["org/base"].files(folder_commit(online)).values()}
    assert sizes <= whole
    online.wall.clear()
    forget()
    with opening.open_folder(refs.model("org/base")) as stored:
        assert name in stored.files and stored.get("model.norm.weight").shape == (32,)


def test_a_process_that_is_killed_while_fetching(server, tmp_path, models):
    server.stall = "model-rest.safetensors"
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE" and not k.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    code = "from cpt_utils.checkpoints import opening, refs\nopening.open_folder(refs.model('org/base'))\nprint('done')"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        assert server.stalled.wait(60)
        process.kill()
    server.over.set()
    assert server.stall not in weights(tmp_path) and list(tmp_path.rglob("blobs/*.incomplete"))
    server.stall = ""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr
    found = next(tmp_path.rglob("snapshots/*/model-rest.safetensors"))
    assert found.read_bytes() == (models["main"] / found.name).read_bytes()


def folder_commit(server: FakeHub) -> str:
    return server.repositories["org/base"].commit("main")


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("org/gated", "org/gated is gated: accept its terms at https://huggingface.co/org/gated, then run `hf auth"),
        ("org/private", "org/private: neither a folder here nor a repository .* private one run `hf auth login`"),
        ("org/none", "org/none: neither a folder here nor a repository on the hub"),
        ("org/olmo@step7", "org/olmo has no revision step7"),
    ],
)
def test_what_the_hub_refuses(online, tmp_path, spec, match):
    ref = refs.model(spec)
    for ask in (ref.config, lambda: opening.open_folder(ref), lambda: ref.describe()):
        with pytest.raises(InputError, match=match) as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert not weights(tmp_path / "cache")


def test_with_a_token_gated_and_private_models_are_read(online, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", online.token)
    for spec in ("org/gated", "org/private"):
        assert refs.model(spec).config()["model_type"] == "llama"
    forget()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")  # a gated model in the cache stays readable; others are refused
    assert refs.model("org/gated").config()["model_type"] == "llama"


def test_an_unreachable_hub(online, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="not in the hub cache, and the hub cannot be reached"):
        refs.model("org/base").config()


# --- disk ---


def test_dropping_leaves_what_was_there_before(online, tmp_path):
    cache = tmp_path / "cache"
    run = refs.run("org/olmo@stage2-*")
    kept = run[1].folder(formats.WEIGHT_PATTERNS)  # fetched by an earlier process
    forget()
    most = 0
    for group in refs.one_at_a_time(run, drop=True):
        for ref in group:
            with opening.open_folder(ref) as stored:
                assert len(stored.get("model.norm.weight")) == 32
        most = max(most, len(weights(cache)))
    assert most == 2 * len(weights(cache)) == 12
    assert {path.parent for path in cache.rglob("snapshots/*/*.safetensors")} == {kept}
    blobs = {path.resolve() for path in cache.rglob("snapshots/*/*")}
    assert blobs == {path for path in cache.rglob("blobs/*") if path.is_file()}  # nothing without a name is left
    assert all(ref.config()["vocab_size"] for ref in run)  # the small files stay
    run[0].folder(formats.WEIGHT_PATTERNS)  # and it can be fetched again
    assert len(weights(cache)) == 12


def test_a_comparison_one_checkpoint_at_a_time(online, tmp_path):
    from cpt_utils.measures import compare

    base, run, cache = refs.model("org/base"), refs.run("org/olmo@stage2-*"), tmp_path / "cache"
    found, most = {}, 0
    for group in refs.one_at_a_time(run, True, base):
        found |= compare.changes(base, group)
        most = max(most, len({path.parent for path in cache.rglob("models--org--olmo/snapshots/*/*.safetensors")}))
    assert most == 1 and len({path.parent for path in cache.rglob("snapshots/*/*.safetensors")}) == 1
    together = compare.changes(base, run)
    assert {step: found[step][2]["up_proj"].mean_abs for step in STEPS} == {
        step: together[step][2]["up_proj"].mean_abs for step in STEPS
    }


def test_dropping_spares_the_base_and_what_others_use(online, tmp_path, models):
    cache, base = tmp_path / "cache", refs.model("org/olmo@main")
    twin = refs.model("org/olmo@stage1-step512")  # the base's own files
    for ref in (base, twin):
        ref.folder(formats.WEIGHT_PATTERNS)
    assert len(list(refs.one_at_a_time([base], True, base))) == 1 and len(weights(cache)) == 12
    twin.drop()
    assert len(weights(cache)) == 6
    with opening.open_folder(base) as stored:
        assert torch.equal(stored.get("model.norm.weight"), read_tensors(models["main"])["model.norm.weight"])
    assert [len(group) for group in refs.one_at_a_time([base, twin], drop=False)] == [2]
    refs.model(models["main"]).drop()
    assert models["main"].is_dir() and (models["main"] / "model-rest.safetensors").is_file()


# --- whole scripts ---


HASTY = """
import runpy, sys, time
own = time.sleep
time.sleep = lambda seconds: own(seconds / 50)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def script(server: FakeHub, home: Path, *command: str) -> subprocess.CompletedProcess:
    """A script in a process of its own that sees the server as the hub, and does not wait before it tries again."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE" and not k.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-c", HASTY, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_weight_change_of_a_hub_run_equals_that_of_folders(online, tmp_path, models, monkeypatch):
    from helpers import load_script
    from huggingface_hub import constants

    run = tmp_path / "run"
    for step in STEPS:
        shutil.copytree(models[REVISION.format(step)], run / f"checkpoint-{step}")
    main = load_script("weight-diff/attn_vs_ffn.py").main
    hub_run = ["--base-model", "org/base", "--ckpt-model", "org/olmo@stage2-*"]
    main(["--output", str(tmp_path / "hub.json"), *hub_run])
    main(["--output", str(tmp_path / "local.json"), "--base-model", str(models["main"]), "--ckpt-model", str(run)])
    ours, truth = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("hub", "local"))
    assert ours["checkpoints"] == truth["checkpoints"]
    described = ours["_header"]["models"]["checkpoints"]["1000"]
    assert described["revision"] == online.repositories["org/olmo"].commit(REVISION.format(1000))
    # The same again, without a network.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "")
    forget()
    main(["--output", str(tmp_path / "off.json"), *hub_run])
    assert json.loads((tmp_path / "off.json").read_text())["checkpoints"] == truth["checkpoints"]


def test_retrieval_of_a_hub_run_with_one_revision_on_disk(server, tmp_path, models, monkeypatch):
    for name in ("a", "b"):
        lines = [f"sentence {number} in language {name}\n" for number in range(12)]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    texts = ["--source", "text", "--base-file", str(tmp_path / "a.txt"), "--target-file", str(tmp_path / "b.txt")]
    texts += ["--base", "eng_Latn", "--target", "gle_Latn", "--no-untrained", "--artifact-out"]
    command = [
        "sentence-retrieval/sr_experiment.py",
        *texts,
        str(tmp_path / "hub"),
        "--model_path",
        "org/olmo@stage2-*",
    ]
    done = script(server, tmp_path / "home", *command, "--steps", "512,1000", "--drop-revisions")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("weights dropped from the hub cache") == 2 and not weights(tmp_path / "home")
    asked = {file for file in server.fetched() if file.endswith(".safetensors")}
    assert len(asked) == 6 and len([file for file in server.fetched() if file in asked]) == 2 * 6
    from helpers import load_script

    folders = [str(models[REVISION.format(step)]) for step in (512, 1000)]
    load_script(command[0]).main([*texts, str(tmp_path / "local"), "--model_path", *folders])
    for folder in folders:
        name = f"org__olmo@{Path(folder).name}.json"
        ours = json.loads((tmp_path / "hub/eng_Latn-gle_Latn" / name).read_text())
        truth = json.loads((tmp_path / "local/eng_Latn-gle_Latn" / f"{refs.local_id(folder)}.json").read_text())
        assert ours["layer_accuracy"] == truth["layer_accuracy"] and len(truth["layer_accuracy"]) == 4


def test_a_script_whose_download_never_ends_says_so_in_one_line(server, tmp_path):
    server.wall["config.json"] = 100
    command = ["weight-diff/attn_vs_ffn.py", "--base-model", "org/base", "--ckpt-model", "org/olmo@stage2-*"]
    done = script(server, tmp_path / "home", *command, "--output", str(tmp_path / "out.json"))
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1 and errors[0].startswith("error: org/") and "run the same command again" in errors[0]
    assert not (tmp_path / "out.json").exists() and not list((tmp_path / "home").rglob("snapshots/*/config.json"))
