"""Runs of a module by itself, on copies and with random generators put back."""

import random

import numpy
import pytest
import torch
from torch import nn

from starlayers.surgery.sandbox import preserved_generators, sandbox_copy, seed_generators
from starlayers.surgery.trial_run import (
    CallLog,
    CannotRunError,
    MismatchError,
    first_line,
    recorded,
    run,
)
from tests.surgery.small import MLP


class Needs(nn.Module):
    """Takes more than its input; records the other arguments in `seen`."""

    def __init__(self, works_with_none=True):
        super().__init__()
        self.seen = []
        self.fc = nn.Linear(8, 8)
        self.works_with_none = works_with_none

    def forward(self, x, mask, *rest, scale, flag="default", **kwargs):
        y = self.fc(x)
        self.seen.append((mask, scale, flag, rest, kwargs))
        return y if self.works_with_none else y * mask * scale


def test_required_arguments_are_none(x):
    module = Needs()
    assert torch.equal(run(module, x), module.fc(x))
    assert module.seen == [(None, None, "default", (), {})]


def test_required_arguments_are_the_input_if_none_fails(x):
    module = Needs(works_with_none=False)
    with recorded(module, ["fc"]) as log:
        y = run(module, x, log=log)
    assert torch.equal(y, module.fc(x) * x * x)
    assert len(module.seen) == 2
    assert len(log.calls) == 1  # those of the failed attempt are gone
    assert log.output is y


def test_a_module_without_further_arguments_is_tried_once(x):
    class Fails(nn.Module):
        def forward(self, x):
            calls.append(x)
            raise RuntimeError("first line\nsecond line")

    calls = []
    with pytest.raises(CannotRunError, match=r"^Fails does not run by itself: RuntimeError first"):
        run(Fails(), x)
    assert len(calls) == 1
    assert issubclass(CannotRunError, MismatchError)


def test_the_first_error_is_told(x):
    class Fails(nn.Module):
        def forward(self, x, mask):
            raise ValueError("mask is None" if mask is None else "mask is a tensor")

    with pytest.raises(CannotRunError, match="ValueError mask is None"):
        run(Fails(), x)


def test_modes_seeds_and_input(x):
    class InPlace(nn.Dropout):
        def forward(self, x):
            return super().forward(x.add_(1))

    module, before = InPlace(0.5), x.clone()
    assert torch.equal(run(module, x), before + 1)
    assert not module.training
    trained = run(module, x, train=True)
    assert module.training
    assert not torch.equal(trained, before + 1)
    torch.manual_seed(77)
    assert torch.equal(run(module, x, train=True), trained)
    assert torch.equal(x, before)


def test_buffers_are_restored_after_errors_too(x):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("none", None)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x, fail=False):
            self.count += 1
            self.norm(x)
            if self.fail:
                raise RuntimeError
            return x

    module = Counts()
    for module.fail in (False, True):
        try:
            run(module, x, train=True)
        except CannotRunError:
            assert module.fail
        assert module.count == 0
        assert module.norm.num_batches_tracked == 0
        assert torch.equal(module.norm.running_mean, torch.zeros(8))


def test_recorded_calls(x):
    mlp = MLP(act=nn.ReLU(inplace=True))
    with recorded(mlp, ["fc1", "act", "fc2"]) as log:
        y = run(mlp, x, log=log)
    assert [call.name for call in log.calls] == ["fc1", "act", "fc2"]
    h = mlp.fc1(x)
    (act,) = log.of("act")
    assert torch.equal(act.input, h)  # as it was before the call changed it in place
    assert torch.equal(act.output, h.relu())
    assert torch.equal(log.of("fc2")[0].output, y)
    assert log.of("drop") == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in mlp.modules())
    mlp(x)
    assert len(log.calls) == 3


def test_recorded_functions(x):
    mlp = MLP(act=nn.functional.gelu)
    with recorded(mlp, ["act"]) as log:
        mlp(x)
    (call,) = log.calls
    assert torch.equal(call.input, mlp.fc1(x))
    assert torch.equal(call.output, nn.functional.gelu(mlp.fc1(x)))
    assert mlp.act is nn.functional.gelu


def test_what_is_no_tensor_is_recorded_as_empty(x):
    class Inner(nn.Module):
        def forward(self, x=None, other=None):
            return (other,)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            self.inner(other=x)
            return self.inner([x], other=x)[0]

    with recorded(Outer(), ["inner"]) as log:
        pass
    assert log.calls == []
    outer = Outer()
    with recorded(outer, ["inner"]) as log:
        outer(x)
    assert [(call.input.shape, call.output.shape) for call in log.calls] == [((0,), (0,))] * 2


def test_a_new_log_is_empty():
    log = CallLog()
    assert (log.calls, log.output) == ([], None)


def test_first_line():
    assert first_line(ValueError("\n  one \n two")) == "ValueError one "
    assert first_line(KeyError()) == "KeyError "
    assert first_line(None) == "NoneType None"
    assert first_line(RuntimeError("x" * 500)) == "RuntimeError " + "x" * 120


# --- copies of modules to run, and random generators that are put back


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.twin = self.fc
        self.missing = None
        self.fc2 = nn.Linear(3, 4)
        self.fc2.weight = self.fc.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("nothing", None)
        self.register_module("none", None)
        self.lists = {"a": [torch.ones(1), {2, 3}], "b": (1, 2)}
        self.generator = torch.Generator().manual_seed(3)
        self.config = object()
        self.own_hooks = [4, 5]


def test_tensors_containers_and_children_are_copies():
    module = Holder()
    copy = sandbox_copy(module)
    assert type(copy) is Holder
    assert copy.fc is not module.fc
    assert torch.equal(copy.fc.weight, module.fc.weight)
    assert copy.fc.weight is not module.fc.weight
    assert isinstance(copy.fc.weight, nn.Parameter)
    assert (copy.fc.weight.requires_grad, copy.frozen.requires_grad) == (True, False)
    copy.count += 1
    copy.lists["a"][0] += 1
    copy.lists["a"][1].add(5)
    torch.rand(1, generator=copy.generator)
    assert (module.count, module.lists["a"][0], module.lists["a"][1]) == (0, 1, {2, 3})
    assert torch.equal(module.generator.get_state(), torch.Generator().manual_seed(3).get_state())
    assert copy.nothing is copy.none is copy.missing is None
    assert copy.config is module.config
    assert copy.own_hooks == [4, 5]  # no dict of hooks, whatever its name


def test_what_is_shared_in_the_module_is_shared_in_the_copy():
    copy = sandbox_copy(Holder())
    assert copy.twin is copy.fc
    assert copy.fc2.weight is copy.fc.weight
    assert copy.fc2.bias is not copy.fc.bias


def test_share_keeps_the_parameters_but_not_the_buffers():
    module = Holder()
    copy = sandbox_copy(module, share=True)
    assert copy.fc.weight is module.fc.weight
    assert copy.frozen is module.frozen
    assert copy.count is not module.count


def test_hooks_are_left_out():
    module = nn.Sequential(nn.Linear(2, 2))
    for m in (module, module[0]):
        m.register_forward_hook(lambda *_: pytest.fail("forward hook"))
        m.register_forward_pre_hook(lambda *_: pytest.fail("forward pre-hook"))
        m.register_full_backward_hook(lambda *_: pytest.fail("backward hook"))
        m.register_state_dict_pre_hook(lambda *_: pytest.fail("state dict hook"))
    copy = sandbox_copy(module)
    copy(torch.ones(1, 2)).sum().backward()
    assert list(copy.state_dict()) == ["0.weight", "0.bias"]
    assert len(module._forward_hooks) == 1


def test_meta_tensors_become_random_ones_of_usual_size():
    with torch.device("meta"):
        module = nn.Linear(400, 100, dtype=torch.bfloat16)
    torch.manual_seed(0)
    copy = sandbox_copy(module)
    assert (copy.weight.device.type, copy.weight.dtype) == ("cpu", torch.bfloat16)
    assert copy.weight.requires_grad
    assert float(copy.weight.float().std()) == pytest.approx(400**-0.5, rel=0.02)
    assert float(copy.bias.float().std()) == pytest.approx(1.0, rel=0.25)


def drawn():
    return random.random(), numpy.random.rand(), torch.rand(1).item()


def test_generators_are_preserved():
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    expected = drawn()
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    with preserved_generators(torch.device("cpu")):
        drawn()
    with pytest.raises(KeyError, match="inside"), preserved_generators(torch.device("cpu")):  # noqa: PT012
        drawn()
        raise KeyError("inside")
    assert drawn() == expected


def test_seeds_are_the_same_every_time():
    with preserved_generators(torch.device("cpu")):
        numbers = []
        for _ in range(2):
            seed_generators(torch.device("cpu"))
            numbers.append((random.random(), torch.rand(1).item()))
        torch.manual_seed(0x57A4)
        assert torch.rand(1).item() == numbers[0][1]
        assert random.Random(0x57A4).random() == numbers[0][0]
    assert numbers[0] == numbers[1]
