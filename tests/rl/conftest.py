"""Fixtures of the reinforcement-learning tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Nets this small are many times slower on several threads of a busy machine."""
    torch.set_num_threads(1)  # what was set before comes back with `_own_threads`
