"""Reads of attributes, recorded without a trace."""

import torch

from starlayers.surgery.adopted import star_class
from starlayers.surgery.gated import GatedMLP
from starlayers.surgery.reads import recorded_reads
from tests.surgery.edited import SwiGLU

KNOWN = []


class Registered(SwiGLU):
    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        KNOWN.append(cls)


def test_a_class_that_registers_its_subclasses_is_told_of_none():
    mlp = Registered()
    with recorded_reads(mlp) as reads:
        mlp(torch.ones(2, 16))
    assert ("act_fn", "inplace") in reads
    assert ("", "_modules") in reads
    assert issubclass(star_class(Registered, GatedMLP), Registered)
    assert type(mlp) is Registered
    assert KNOWN == []
