"""Copies to run without an effect on the module: what they share, and what they do not."""

import collections
import types

import torch

from starlayers.surgery.sandbox import sandbox_copy
from tests.surgery.edited import SwiGLU


class Meter:
    def __init__(self):
        self.values, self.owner = [], self


def test_objects_and_containers_are_copied_with_what_they_hold():
    mlp = SwiGLU()
    mlp.meter, mlp.calls = Meter(), collections.Counter(n=1)
    mlp.options = types.SimpleNamespace(last=None, recent=collections.deque([1], maxlen=3))
    mlp.default, mlp.update = collections.defaultdict(list, a=[1]), mlp.meter.values.append
    mlp.count, mlp.kind, mlp.device = mlp.meter.__init__, Meter, torch.device("cpu")
    copy = sandbox_copy(mlp)
    copy.meter.values.append(1)
    copy.calls["n"] += 1
    copy.options.last = 2
    copy.options.recent.append(2)
    copy.default["a"].append(2)
    copy.count()
    assert copy.meter.owner is copy.meter is copy.count.__self__
    assert (copy.kind, copy.options.recent.maxlen, copy.default["b"]) == (Meter, 3, [])
    assert mlp.meter.values == []
    assert mlp.calls == {"n": 1}
    assert mlp.default == {"a": [1]}
    assert mlp.options.last is None
    assert mlp.options.recent == collections.deque([1])
