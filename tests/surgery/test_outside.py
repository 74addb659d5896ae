"""State outside of tensors: found by its names, compared, and put back."""

import random
import types
from collections import OrderedDict, deque
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from starlayers.surgery.outside import Outside, untouched
from starlayers.surgery.trial_run import MismatchError

STATE = types.SimpleNamespace(n=0)
NUMBER = 0


class Slots:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


class Module(nn.Module):
    seen: ClassVar[list] = []

    def __init__(self):
        super().__init__()
        self.meter = types.SimpleNamespace(values=[], inner=types.SimpleNamespace(n=0))
        self.log, self.table, self.slots = deque([1]), OrderedDict(a=1), Slots()
        self.rng, self.numbers = random.Random(0), np.random.RandomState(0)
        self.array, self.generator = np.zeros(2), torch.Generator()

    def forward(self, kind, default=[]):  # noqa: B006
        global NUMBER
        match_kind = {
            "meter": lambda: self.meter.values.append(kind),
            "inner": lambda: setattr(self.meter.inner, "n", 1),
            "log": lambda: self.log.append(2),
            "table": lambda: self.table.update(a=2),
            "slots": lambda: setattr(self.slots, "n", 1),
            "rng": lambda: self.rng.random(),
            "numbers": lambda: self.numbers.rand(),
            "array": lambda: self.array.fill(1),
            "generator": lambda: torch.rand(1, generator=self.generator),
            "seen": lambda: self.seen.append(1),
            "STATE": lambda: setattr(STATE, "n", 1),
            "default": lambda: default.append(1),
        }
        if kind == "NUMBER":
            NUMBER = 1
        return match_kind.get(kind, lambda: None)()


KINDS = [
    *("meter", "inner", "log", "table", "slots", "rng", "numbers", "array", "generator"),
    *("seen", "STATE", "default", "NUMBER"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_named_and_undone(kind):
    module = Module()
    outside = Outside(module)
    module("nothing")
    assert outside.change() == ""
    module(kind)
    expected = {"NUMBER": "a global variable", "inner": "meter.inner"}.get(kind, kind)
    assert expected in outside.change()
    outside.restore()
    assert outside.change() == Outside(module).change() == ""
    assert (STATE.n, NUMBER, Module.seen, list(module.log)) == (0, 0, [], [1])


def test_a_plain_mlp_may_change_what_it_likes():
    module = Module()
    with untouched(module, (), forbidden=False):
        module("meter")
    assert module.meter.values == []
    with (
        pytest.raises(MismatchError, match=r"changes meter\.values"),
        untouched(module, (), forbidden=True),
    ):
        module("meter")
    assert module.meter.values == []
