"""Settings every test shares: no network, one thread, no window, quiet libraries."""

from __future__ import annotations

import functools
import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest

# Before torch, transformers or matplotlib is imported: all of them read these once.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "CPT_FIGURES": "pass over",  # what forks do with theirs (figure_faults.py)
}.items():
    os.environ.setdefault(name, value)
# No test cuts the power: what is written need not reach the disk, for which each file waits milliseconds.
os.fsync = lambda _file: None
# Whatever the caller's setting: tests fork, and a forked child of a process with several OpenMP threads hangs.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config):
    """A folder for one warm process of all workers (launch.py): it lives until nobody holds `alive` open."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="cpt-warm-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["CPT_WARM"] = folder.name
        os.mkfifo(f"{folder.name}/alive")
        config.add_cleanup(functools.partial(os.close, os.open(f"{folder.name}/alive", os.O_RDWR)))


# Modules and tests are a million objects, and each collection of garbage, of which a training asks for one, would look
# through all of them for half a second: none while they are made, and afterwards they are passed over.
def pytest_collectstart():
    gc.disable()


def pytest_collection_finish():
    """transformers writes every config out for a message that nobody asked for: an eighth of the time of loading."""
    if module := sys.modules.get("transformers.configuration_utils"):
        module.PreTrainedConfig.__repr__ = object.__repr__
    gc.enable()


def pytest_runtest_setup():
    if len(sys.modules) > passed_over["modules"] + 50:
        gc.collect()
        gc.freeze()
        passed_over["modules"] = len(sys.modules)


passed_over = {"modules": 0}


# What takes longest is begun first.
LONG = ("architectures", "end_to_end", "lora", "sr_experiment", "cpt_train", "published_readme")
FIRST = ("tests/faults/", *(f"tests/test_{name}.py" for name in LONG))


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: [not item.nodeid.startswith(name) for name in FIRST])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """--dist loadfile, but files begin in the order in which they stand, and the fault tests share one bench."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "faults" if nodeid.startswith("tests/faults/") else super()._split_scope(nodeid)

    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def train():
    from helpers import load_script

    return load_script("cpt/train.py")


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """For short trainings (short_training.py)."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("\n".join(f"the {word} runs home at {word}" for word in ["red", "dog", "cat", "night", "sun"] * 6))
    return path


@pytest.fixture(autouse=True)
def _nothing_said_before():
    """What a script says once is said again in the next test."""
    from cpt_utils.base import cli

    cli._said.clear()


@pytest.fixture(autouse=True)
def _figures(request, monkeypatch):
    """Tests marked `figures` draw theirs and look for faults, all others go through a few (figure_faults.py)."""
    from cpt_utils.base import figures

    def save(figure, path) -> None:
        from figure_faults import saving

        wish = "look" if request.node.get_closest_marker("figures") else "go through"
        saving(wish, own)(figure, path)

    own = figures.save
    monkeypatch.setattr(figures, "save", save)
