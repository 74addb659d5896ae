"""Questions of tensors and layers: which are answered by a graph, and who asks."""

import pytest
import torch
from torch import nn

from starlayers.surgery.questions import (
    LayerProbe,
    Questions,
    answered,
    require_answered,
    require_no_types,
)
from starlayers.surgery.trial_run import MismatchError


def test_sizes_and_dtypes_are_answered():
    x = torch.ones(2, 3)
    with Questions() as questions:
        x.shape, x.dtype, x.ndim, len(x), x.size(0), x.chunk(2), x.float(), x.device
    assert questions.first == ""
    with pytest.raises(MismatchError, match="asks a tensor for 'is_leaf'"):
        answered(lambda x: x if x.is_leaf else 2 * x)(x)


def test_a_call_asks_a_layer_for_nothing():
    probe = LayerProbe(nn.Linear(2, 3), "down")
    probe.forget()
    assert probe(torch.ones(1, 2)).shape == (1, 3)
    assert not require_answered(probe, last=True)
    assert probe.weight.dtype == torch.float32
    assert require_answered(probe, last=True)
    with pytest.raises(MismatchError, match="'weight' of 'down'"):
        require_answered(probe, last=False)
    probe.forget()
    assert probe.out_features == 3
    with pytest.raises(MismatchError, match="'out_features' of 'down'"):
        require_answered(probe, last=True)
    probe.forget()
    assert not isinstance(probe, nn.Linear)
    with pytest.raises(MismatchError, match="the class of 'down'"):
        require_answered(probe, last=True)


class Own(nn.Module):
    limit = 1

    def forward(self, x):
        return type(self).limit * x


class Other(nn.Module):
    def forward(self, x):
        return x if type(x) is torch.Tensor else 2 * x


def test_types():
    require_no_types(Own)
    with pytest.raises(MismatchError, match=r"Other\.forward asks for the type of a part"):
        require_no_types(Other)
