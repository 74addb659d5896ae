"""Fixtures of the reinforcement-learning tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Nets this small are many times slower on several threads of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
