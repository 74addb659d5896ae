"""What the surgery tests share."""

import pytest
import torch


@pytest.fixture
def x():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
