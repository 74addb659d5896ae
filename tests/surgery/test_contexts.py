"""Conditions under which forwards are traced, and how often that is."""

from functools import partial

import pytest
import torch

from starlayers.surgery import contexts as module
from starlayers.surgery.contexts import Context, graphs
from starlayers.surgery.sandbox import sandbox_copy
from starlayers.surgery.trial_run import MismatchError
from tests.surgery.small import Gated


def contexts_traced(mlp, reads=None):
    reads = set() if reads is None else reads
    copy = partial(sandbox_copy, mlp)
    found = graphs(
        lambda make: copy(make=make), 8, torch.device("cpu"), ["gate", "up", "down"], reads
    )
    return [context for context, _ in found]


def test_the_contexts():
    assert len(set(module.CONTEXTS)) == 72
    for train in (False, True):
        for grad in (False, True):
            some = [c for c in module.CONTEXTS if (c.train, c.grad) == (train, grad)]
            low = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
            assert {c.dtype for c in some} == low
            assert {c.ndim for c in some} == {2, 3, 4}
            assert {c.autocast for c in some} == {None, torch.bfloat16, torch.float16}
    words = str(Context(True, False, torch.float32, 3, torch.float16))
    assert words == (
        "train mode, float32, without gradients, under autocast to torch.float16, 3 dimensions"
    )


def test_a_forward_that_asks_for_nothing_is_traced_once_a_number_of_dimensions_and_autocast():
    found = contexts_traced(Gated("up"))
    assert len(found) == len({(c.ndim, c.autocast) for c in found}) == 9
    assert {(c.train, c.grad, c.dtype) for c in found} == {(False, True, torch.float32)}


class Asks(Gated):
    """Branches on something; both branches make the same calls for most sizes."""

    def forward(self, x):
        y = super().forward(x)
        return y * 2 if self.asks(x) and x.shape[0] > 10**6 else y


class Training(Asks):
    def asks(self, x):
        return self.training


class Gradients(Asks):
    def asks(self, x):
        return torch.is_grad_enabled()


class Halves(Asks):
    def asks(self, x):
        return x.dtype == torch.bfloat16


class Converts(Gated):
    def forward(self, x):
        return super().forward(x.to(self.down.weight.dtype))


class ConvertsToOne(Gated):
    def forward(self, x):
        return super().forward(x.to(torch.float32).to(self.down.weight.dtype))


@pytest.mark.parametrize(
    ("kind", "where"), [(Training, "in train mode"), (Gradients, ""), (Halves, "in eval mode, bf")]
)
def test_questions_are_seen_though_the_same_is_computed(kind, where):
    where = where.replace("bf", "bfloat16")
    with pytest.raises(MismatchError, match=f"{where}.*depends on the size of its input"):
        contexts_traced(kind("up"))


@pytest.mark.parametrize(
    ("kind", "dtypes"),
    [
        (Converts, {torch.float32}),
        # once for the dtypes that it widens, of which one is enough, and once for the widest
        (ConvertsToOne, {torch.float32, torch.bfloat16, torch.float64}),
    ],
)
def test_conversions(kind, dtypes):
    reads = set()
    assert {c.dtype for c in contexts_traced(kind("up"), reads)} == dtypes
    assert {("", "_modules"), ("act", "_forward_hooks")} <= reads


class Counts(Gated):
    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x)


class Fails(Gated):
    def forward(self, x):
        if self.training:
            raise RuntimeError("not in train mode")
        return super().forward(x)


def test_forwards_that_change_or_fail():
    with pytest.raises(MismatchError, match="'calls'"):
        contexts_traced(Counts("up"))
    with pytest.raises(MismatchError, match=r"in train mode.*: .*not in train mode"):
        contexts_traced(Fails("up"))


class SameSteps(Gated):
    """Takes other parameters in train mode, by the same functions."""

    def forward(self, x):
        first, second = (self.up, self.gate) if self.training else (self.gate, self.up)
        return self.down(self.act(first(x)) * second(x))


def test_the_tensors_of_calls_count():
    found = contexts_traced(SameSteps("up"))
    assert len(found) == 18
    assert {c.train for c in found} == {False, True}


def test_keys_of_calls():
    x, y = torch.ones(2), torch.ones(2)
    log = module._Log(torch.float32, {id(x): "x"})
    assert log.key([x, y, y, torch.float32, 1.0]) == ("x", 0, 0, "its dtype", (float, 1.0))
    assert log.key(1) != log.key(1.0) != log.key(True)
    assert log.key({"a": slice(1, None)}) == (
        ("a", ("slice", ((int, 1), (type(None), None), (type(None), None)))),
    )
    kept = {1}
    assert log.key(kept) == id(kept)
    assert kept in log.kept
