"""Settings every test shares: no network, one thread, no window, quiet libraries."""

from __future__ import annotations

import os

import pytest

# Before torch, transformers or matplotlib is imported: all of them read these once.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(name, value)
# Whatever the caller's setting: tests fork, and a forked child of a process with several OpenMP threads hangs.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _nothing_said_before():
    """What a script says once is said again in the next test."""
    from cpt_utils.base import cli

    cli._said.clear()
