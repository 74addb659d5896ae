"""Fixtures of the language tests."""

import gc

import pytest


@pytest.fixture(scope="module")
def frozen_heap():
    """Keep imported modules out of the collections with which accelerate begins every training."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
