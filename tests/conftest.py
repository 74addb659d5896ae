"""Fixtures shared by the tests."""

import sys

import pytest
import torch

from starlayers import backend
from starlayers.kernels import star_mlp_cpu


@pytest.fixture(autouse=True)
def _own_backend(monkeypatch):
    monkeypatch.delenv(backend.ENV_VAR, raising=False)


@pytest.fixture
def eligible(monkeypatch):
    """Let layers of every size run fused on a CPU, in blocks of 64 rows."""
    monkeypatch.setattr(backend, "MIN_HIDDEN_BYTES_INFERENCE", 0)
    monkeypatch.setattr(backend, "MIN_HIDDEN_BYTES_TRAINING", 0)
    monkeypatch.setattr(star_mlp_cpu, "BLOCK_BYTES", 1)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _log_of_transformers():
    """Restore transformers' log level, which examples lower and its tests read."""
    yield
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity(logging.WARNING)
        logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def _own_threads():
    """Restore the number of threads, which changes the last bits of sums."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
