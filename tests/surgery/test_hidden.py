"""Hidden layers with their activation in the forward, and their gates."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from starlayers import param_groups, starify
from starlayers.surgery import (
    apply_record,
    gate_parameters,
    gate_sizes,
    merge,
    record_of,
    report,
    reset_gates,
    revert,
)
from starlayers.surgery.hidden import GatedHidden
from tests.surgery.small import train_gates


class Widen(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 16)

    def forward(self, hidden):
        return F.gelu(self.proj(hidden), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, first=Widen):
        super().__init__()
        self.net = nn.ModuleList([first(), nn.Dropout(0.1), nn.Linear(16, 8)])

    def forward(self, x):
        for module in self.net:
            x = module(x)
        return x


@pytest.mark.parametrize("gate", ["full", "low_rank=3", "scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_gate_changes_no_bit(x, gate, dtype):
    mlp, x = FeedForward().to(dtype).eval(), x.to(dtype)
    y, keys = mlp(x), list(mlp.state_dict())
    assert starify(mlp, gate=gate) is mlp
    star = mlp.net[0]
    assert isinstance(star, Widen)
    assert isinstance(star, GatedHidden)
    assert type(star).__name__ == "StarWiden"
    assert torch.equal(mlp(x), y)
    assert [k for k in mlp.state_dict() if "star_gate" not in k] == keys
    assert {p.dtype for p in gate_parameters(mlp)} == {dtype}
    train_gates(mlp)
    a = F.gelu(star.proj(x), approximate="tanh")
    expected = mlp.net[2](a + a * star.star_gate(x))
    torch.testing.assert_close(
        mlp(x), expected, rtol=2e-2 if dtype != torch.float32 else 1e-6, atol=0.02
    )
    assert not torch.equal(mlp(x), y)


def test_gradients_are_those_of_the_formula(x):
    mlp = train_gates(starify(FeedForward())).double().eval()
    x = x.double().requires_grad_()
    star, last = mlp.net[0], mlp.net[2]
    parameters = [x, *mlp.parameters()]
    ours = torch.autograd.grad(mlp(x).square().sum(), parameters)
    a = F.gelu(star.proj(x), approximate="tanh")
    formula = last(a * (1 + star.star_gate(x)))
    theirs = torch.autograd.grad(formula.square().sum(), parameters)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other)
    starify(mlp, recompute=True)
    assert star.star.recompute
    again = torch.autograd.grad(mlp(x).square().sum(), parameters)
    assert all(map(torch.equal, again, ours))


def test_revert_gives_the_class_back_and_warns_of_lost_gates(x):
    mlp = FeedForward().eval()
    y, weight = mlp(x), mlp.net[0].proj.weight
    train_gates(starify(mlp))
    with pytest.warns(UserWarning, match="1 of 1 gates were not zero"):
        revert(mlp)
    assert type(mlp.net[0]) is Widen
    assert mlp.net[0].proj.weight is weight
    assert vars(mlp.net[0]).keys() == vars(Widen()).keys()
    assert torch.equal(mlp(x), y)


def test_the_record_repeats_it_and_state_dicts_load(x):
    mlp = train_gates(starify(FeedForward(), gate="low_rank=2")).eval()
    record = record_of(mlp)
    assert [(layer["owner"], layer["gate"]) for layer in record["layers"]] == [
        ("net.0", "low_rank=2")
    ]
    again = apply_record(FeedForward(), record).eval()
    again.load_state_dict(mlp.state_dict())
    assert torch.equal(again(x), mlp(x))

    class Doubles(Widen):
        def forward(self, hidden):
            return self.proj(hidden)

    with pytest.raises(ValueError, match="no activation"):
        apply_record(FeedForward(Doubles), record)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(x, how):
    mlp = train_gates(starify(FeedForward())).eval()
    if how == "deepcopy":
        other = copy.deepcopy(mlp)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(mlp))
    else:
        file = io.BytesIO()
        torch.save(mlp, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(other(x), mlp(x))
    nn.init.zeros_(other.net[0].star_gate.weight)
    assert not torch.equal(other(x), mlp(x))
    assert gate_sizes(mlp)["net.0.proj"] > 0


def test_sizes_groups_report_and_reset():
    mlp = starify(FeedForward())
    assert gate_sizes(mlp) == {"net.0.proj": 0.0}
    names = {g["name"]: len(g["params"]) for g in param_groups(mlp, lr=1.0)}
    assert names == {"decay": 2, "no_decay": 2, "star_gates": 2}
    (row,) = report(mlp).rows
    assert (row.name, row.recipe, row.form, row.state, row.detail) == (
        "net.0.proj",
        "inline",
        "plain",
        "star",
        "full",
    )
    assert (row.parameters, row.flops) == (8 * 16 + 16, 2 * 8 * 16 + 3 * 16)
    train_gates(mlp)
    assert gate_sizes(mlp)["net.0.proj"] > 0
    assert gate_sizes(reset_gates(mlp)) == {"net.0.proj": 0.0}
    assert len(report(starify(mlp)).rows) == 1  # again: nothing is added


def test_fusing_runs_its_own_forward_and_says_so(x):
    mlp = train_gates(starify(FeedForward())).eval()
    y = mlp(x)
    starify(mlp, mode="fuse")
    assert report(mlp).rows[0].detail == "full, its activation is written into its forward"
    assert torch.equal(mlp(x), y)


def test_merge_refuses_gates_and_takes_zero_ones_out():
    mlp = starify(FeedForward(), gate="scale")
    assert type(merge(mlp).net[0]) is Widen
    mlp = train_gates(starify(FeedForward(), gate="scale"))
    with pytest.raises(ValueError, match=r"net\.0\.proj has gate='scale' behind an activation"):
        merge(mlp)
    assert isinstance(mlp.net[0], GatedHidden)


def test_what_was_not_verified_is_an_error(x):
    mlp = train_gates(starify(FeedForward())).eval()
    star = mlp.net[0]
    assert torch.equal(star(hidden=x), star(x))
    with pytest.raises(TypeError, match=r"2 positional arguments and the keywords \[\]"):
        star(x, x)
    with pytest.raises(TypeError, match=r"the keywords \['x'\]"):
        star(x=x)
    star.option = 3  # an attribute that nothing read
    star(x)
    del star.option
    kept, Widen.forward = Widen.forward, lambda self, hidden: self.proj(hidden)
    try:
        with pytest.raises(RuntimeError, match="the forward of its class was replaced"):
            star(x)
    finally:
        Widen.forward = kept
    star(x)


def test_hooks_and_other_layers_stay_in_effect(x):
    mlp = train_gates(starify(FeedForward())).eval()
    star = mlp.net[0]
    y = star(x)
    handle = star.proj.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    assert not star(x).any()
    handle.remove()
    assert torch.equal(star(x), y)
    star.proj = nn.Linear(8, 16)  # as an adapter or a quantiser would
    assert not torch.equal(star(x), y)


def test_it_compiles_and_exports(x):
    mlp = train_gates(starify(FeedForward())).eval()
    y = mlp(x)
    torch.testing.assert_close(torch.compile(mlp, backend="eager", fullgraph=True)(x), y)
    torch.testing.assert_close(torch.export.export(mlp, (x,), strict=False).module()(x), y)


def test_on_the_meta_device():
    with torch.device("meta"):
        mlp = starify(FeedForward())
    assert all(p.is_meta for p in mlp.parameters())
    mlp = reset_gates(mlp.to_empty(device="cpu"))
    assert gate_sizes(mlp) == {"net.0.proj": 0.0}


def test_a_replaced_forward_is_refused():
    mlp = starify(FeedForward())
    mlp.net[0].forward = lambda x: x
    with pytest.raises(ValueError, match="so the star does not run and its gate is lost"):
        starify(mlp)
    assert report(mlp).rows[0].detail.startswith("does not run")
