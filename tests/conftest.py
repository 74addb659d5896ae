"""Fixtures shared by the tests."""

import gc
import sys

import pytest
import torch

from starlayers import backend, dispatch, plans
from starlayers.kernels import star_mlp_cpu


@pytest.fixture(autouse=True)
def _own_backend(monkeypatch):
    """Start without a forced backend; forget plans, which a test's own thresholds may have made."""
    monkeypatch.delenv(backend.ENV_VAR, raising=False)
    dispatch.forget_plans()
    yield
    dispatch.forget_plans()


@pytest.fixture
def fuse_everything(monkeypatch):
    """Let the fused op take activations of any size."""
    monkeypatch.setattr(plans, "MIN_HIDDEN_BYTES_INFERENCE", 0)
    monkeypatch.setattr(plans, "MIN_HIDDEN_BYTES_TRAINING", 0)
    monkeypatch.setattr(plans, "MAX_CHANNELS_TRAINING", 10**9)
    monkeypatch.setattr(plans, "HIDDEN_BYTES_A_CHANNEL", 0)


@pytest.fixture
def eligible(fuse_everything, monkeypatch):
    """Let layers of every size run fused on a CPU, in blocks of 64 rows."""
    monkeypatch.setattr(star_mlp_cpu, "BLOCK_BYTES", 1)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def frozen_heap():
    """Keep imported modules out of the collections with which accelerate begins every training."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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
