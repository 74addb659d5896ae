"""MLPs that no recipe claims: what is listed, with which reason, and what is not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from starlayers import starify
from starlayers.surgery import report
from starlayers.surgery.overlooked import overlooked


def two(forward, first=None, last=None, **parts):
    """Return a module of two linear layers with a forward."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = first or nn.Linear(8, 16), last or nn.Linear(16, 8)
            for name, part in parts.items():
                setattr(self, name, part)

    Two.forward = forward
    return Two()


class Wrapped(nn.Module):
    def __init__(self, n, f):
        super().__init__()
        self.linear, self.norm = nn.Linear(n, f), nn.BatchNorm1d(f)

    def forward(self, x):
        return self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2)


def glu(self, x):
    a, b = self.fc1(x).chunk(2, -1)
    return self.fc2(a * b.sigmoid() * self.scale)


def mixes(self, x):
    h = F.gelu(self.fc1(x))
    return self.fc2(torch.bmm(h, h.transpose(1, 2)) @ h)


def with_state(self, x, state=None):
    return self.fc2(torch.relu(self.fc1(x))), state


def with_norm(self, x):
    return self.fc2(F.gelu(self.norm(self.fc1(x))))


@pytest.mark.parametrize(
    ("module", "name", "form", "reason"),
    [
        (
            two(lambda self, x: self.fc2(F.relu(self.fc1(x)).square())),
            "fc1",
            "plain",
            "its activation square(relu(x)) is written into the forward of Two",
        ),
        (
            two(with_norm, norm=nn.LayerNorm(16)),
            "fc1",
            "plain",
            "its hidden layer is more than one activation: LayerNorm 'norm', gelu after 'fc1'",
        ),
        (
            two(lambda self, x: self.fc2(self.fc1(x))),
            "fc1",
            "plain",
            "no activation is between 'fc1' and 'fc2'",
        ),
        (
            two(lambda self, x: self.fc2(F.relu(self.fc1(x))) + self.fc2(self.fc1(x))),
            "fc1",
            "plain",
            "one run calls 'fc1' 2 times and 'fc2' 2",
        ),
        (
            two(with_state),
            "fc1",
            "plain",
            "the forward of Two calls relu itself; its forward does not return one tensor made of "
            "its input",
        ),
        (
            two(
                lambda self, x: self.fc2(F.gelu(self.fc1(x))),
                nn.Conv2d(8, 16, 1),
                nn.Conv2d(16, 8, 1),
            ),
            "fc1",
            "plain",
            "its activation gelu(x) is written into the forward of Two",
        ),
        (
            two(glu, nn.Linear(8, 32), scale=nn.Parameter(torch.ones(16))),
            "fc1",
            "packed",
            "its hidden layer is more than one activation: chunk, getitem, sigmoid, mul after "
            "'fc1'",
        ),
        (
            two(
                lambda self, x: self.fc2(F.glu(self.fc1(x).chunk(1, 1)[0], 1)),
                nn.Conv2d(8, 32, 1),
                nn.Conv2d(16, 8, 1),
            ),
            "fc1",
            "packed",
            "'fc1' is a convolution, and stars of two branches take linear layers",
        ),
    ],
)
def test_reasons(module, name, form, reason):
    assert overlooked(module, ()) == {name: (form, reason)}
    assert overlooked(module, [name]) == {}
    if form == "plain" and module.fc1.__class__ is nn.Linear and reason.startswith("its act"):
        (row,) = report(module).rows
        assert (row.name, row.state, row.form, row.detail) == (name, "skipped", form, reason)
        with pytest.raises(ValueError, match=r"fc1: its activation square\(relu\(x\)\)"):
            starify(module)


def test_layers_inside_of_children_are_seen():
    module = two(lambda self, x: self.fc2(F.hardswish(self.fc1(x))), Wrapped(8, 16), Wrapped(16, 8))
    ((name, (form, reason)),) = overlooked(module, ()).items()
    assert (name, form) == ("fc1.linear", "plain")
    assert "BatchNorm1d 'fc1.norm'" in reason
    assert "hardswish" in reason


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.o(F.relu(self.q(x)))


@pytest.mark.parametrize(
    "module",
    [
        SelfAttention(),
        two(mixes),
        two(lambda self, x: self.fc2(x.repeat(1, 1, 2)) + self.fc1(x)[..., :8]),  # not in a row
        two(lambda self, x: F.relu(self.fc1(x))),  # the second layer is not called
        two(with_state, nn.Linear(8, 4), nn.Linear(4, 8)),  # narrows first
        two(lambda self, x: self.fc2(F.relu(self.fc1(x))), nn.Linear(8, 8), nn.Linear(8, 8)),
        two(lambda self, x: self.fc2(F.relu(self.fc1(x))), last=nn.Linear(16, 3)),  # a head
        nn.Sequential(),
        nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)]),
        starify(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))),
    ],
)
def test_what_is_no_mlp_is_not_listed(module):
    listed = [row.name for row in report(module).rows if row.state != "skipped"]
    assert overlooked(module, listed) == {}


def test_nothing_is_changed():
    module = two(with_norm, norm=nn.BatchNorm1d(16)).train()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    overlooked(module, ())
    assert module.training
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_the_meta_device():
    with torch.device("meta"):
        module = two(lambda self, x: self.fc2(F.gelu(self.fc1(x))))
        (reason,) = overlooked(module, ()).values()
    assert reason == ("plain", "its activation gelu(x) is written into the forward of Two")
