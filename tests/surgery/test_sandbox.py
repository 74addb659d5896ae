"""Copies of modules to run, and random generators that are put back."""

import random

import numpy
import pytest
import torch
from torch import nn

from starlayers.surgery.sandbox import preserved_generators, sandbox_copy, seed_generators


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
