"""Sizes and weights of linear layers, and refusals of gates."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from starlayers.surgery.linear_layers import (
    Projection,
    base_layer,
    dtype_and_device,
    gate_blocker,
    projection,
    weight_of,
)


class OtherLinear(nn.Module):
    """Linear layer of another library, which does not derive from `nn.Linear`."""

    def __init__(self, n, f):
        super().__init__()
        self.in_features, self.out_features = n, f


class Derived(nn.Linear):
    pass


class Wrapper(nn.Module):
    """Adapter around a layer, as PEFT makes it."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer


@pytest.mark.parametrize(
    ("module", "sizes"),
    [
        (nn.Linear(2, 3), (2, 3, False)),
        (Derived(2, 3), (2, 3, False)),
        (OtherLinear(2, 3), (2, 3, False)),
        (Conv1D(3, 2), (2, 3, False)),
        (nn.Conv2d(2, 3, 1), (2, 3, True)),
        (nn.Conv2d(2, 3, 1, padding="same"), (2, 3, True)),
        (nn.Conv2d(2, 3, 1, padding="valid"), (2, 3, True)),
        (Wrapper(Wrapper(nn.Linear(2, 3))), (2, 3, False)),
        (nn.Conv2d(2, 3, 1, padding=1), None),
        (nn.Conv2d(2, 3, 3), None),
        (nn.Conv2d(2, 3, (1, 3)), None),
        (nn.Conv2d(2, 3, 1, stride=2), None),
        (nn.Conv2d(2, 4, 1, groups=2), None),
        (nn.Conv1d(2, 3, 1), None),
        (OtherLinear(2, None), None),
        (OtherLinear("2", 3), None),
        (nn.Bilinear(2, 2, 3), None),
        (nn.Embedding(2, 3), None),
        (None, None),
    ],
)
def test_projection(module, sizes):
    assert projection(module) == (None if sizes is None else Projection(*sizes))


@pytest.mark.parametrize("padding", [0, (0, 0)])
def test_padding_may_be_set_as_a_number_later(padding):
    conv = nn.Conv2d(2, 3, 1)
    conv.padding = padding
    assert projection(conv) == Projection(2, 3, True)
    conv.padding = 1
    assert projection(conv) is None


def test_channels_are_last_by_default():
    assert Projection(2, 3).channels_first is False


def test_base_layer():
    layer = nn.Linear(2, 3)
    assert base_layer(Wrapper(Wrapper(layer))) is layer
    assert base_layer(layer) is layer
    assert base_layer(Wrapper("no module")).base_layer == "no module"


def test_weight_of():
    layer = nn.Linear(2, 3)
    assert weight_of(layer) is layer.weight
    assert weight_of(Wrapper(layer)) is layer.weight
    assert weight_of(nn.ReLU()) is None
    normed = parametrizations.weight_norm(nn.Linear(2, 3))
    assert weight_of(normed) is normed.parametrizations.weight.original1
    spectral = parametrizations.spectral_norm(nn.Linear(2, 3))
    assert weight_of(spectral) is spectral.parametrizations.weight.original


def test_dtype_and_device():
    layer = nn.Linear(2, 3, dtype=torch.bfloat16, device="meta")
    assert dtype_and_device(layer) == (torch.bfloat16, torch.device("meta"))


def with_weight(dtype):
    layer = nn.Linear(2, 3)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return layer


class Callable_(nn.Linear):
    """Quantised layer of torch: its weight is a method."""

    weight = None

    def __init__(self):
        nn.Module.__init__(self)


class Packed4Bit(torch.Tensor):
    pass


def subclassed():
    layer = nn.Linear(2, 3)
    del layer.weight
    layer.weight = layer.bias.new_zeros(3, 2).as_subclass(Packed4Bit)
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(2, 3), None),
        (Wrapper(nn.Linear(2, 3)), None),
        (with_weight(torch.bfloat16), None),
        (with_weight(torch.float16), None),
        (with_weight(torch.int32), "Linear holds torch.int32 weights: starify before quantising"),
        (
            with_weight(torch.float8_e4m3fn),
            "Linear holds torch.float8_e4m3fn weights: starify before quantising",
        ),
        (
            Callable_(),
            "Callable_ has no weight tensor: quantised? starify before quantising",
        ),
        (
            subclassed(),
            "Linear has a Packed4Bit for a weight: starify before quantising, after initialising",
        ),
        (
            nn.LazyLinear(3),
            "LazyLinear has a UninitializedParameter for a weight: starify before quantising, "
            "after initialising",
        ),
    ],
)
def test_gate_blocker(layer, reason):
    assert gate_blocker(layer) == reason
