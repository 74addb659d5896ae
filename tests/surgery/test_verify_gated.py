"""Verification of gated MLPs by graph and by value: contexts, stand-ins, tolerances."""

import pytest
import torch
from torch import nn

from starlayers.surgery import verify_gated as module
from starlayers.surgery.site import Site
from starlayers.surgery.trial_run import MismatchError
from starlayers.surgery.verify_gated import verify_gated
from tests.surgery.small import Gated, Packed

SITE = Site("gated", "gated", "gate", None, "down", up="up")


def test_a_verdict():
    formula, act_name, casts = verify_gated(Gated("up"), SITE)
    assert (formula.site.act, act_name, formula.act) == ("act", "silu", "silu(x)")
    assert not casts


def test_the_stand_in_has_small_plain_layers_and_nothing_else_of_the_module():
    mlp = Gated().to("meta")
    mlp.gate.register_forward_hook(lambda *_: pytest.fail("a hook of the model"))
    body = module._stand_in(mlp, SITE, module.random_tensor, module.SMALL)
    assert type(body) is Gated
    assert (body.gate.weight.shape, body.down.weight.shape) == ((10, 6), (6, 10))
    assert body.gate.bias is None
    assert body(torch.ones(2, 6)).shape == (2, 6)
    packed = module._stand_in(
        Packed(), Site("p", "packed", "both", None, "down"), module.random_tensor, module.SMALL
    )
    assert packed.both.weight.shape == (20, 6)


def test_a_forward_that_knows_its_sizes_is_run_at_them():
    class Knows(Gated):
        def forward(self, x):
            assert x.shape[-1] == 8
            return super().forward(x)

    assert verify_gated(Knows(), SITE)[1] == "silu"


def test_differences_beyond_roundings_are_told():
    a = {"": torch.ones(2, 3), "gate.weight": torch.ones(3)}
    near = {"": torch.ones(2, 3) * (1 + 1e-4), "gate.weight": torch.ones(3)}
    module.require_close(a, near, 1e-3, "here")
    with pytest.raises(MismatchError, match=r"its output differs by 0.0001 here"):
        module.require_close(a, near, 1e-8, "here")
    other = {"": torch.ones(2, 3), "gate.weight": torch.tensor([1.0, 1.0, float("nan")])}
    with pytest.raises(MismatchError, match=r"the gradient of 'gate\.weight' differs by inf"):
        module.require_close(a, other, 1e-4, "here")
    infinite = {"": torch.full((2, 3), torch.inf), "gate.weight": torch.ones(3)}
    module.require_close(infinite, a, 1e-4, "here")  # counts where the first is finite
    with pytest.raises(MismatchError, match=r"torch.float64 \(2, 3\)"):
        module.require_close(a, {**a, "": torch.ones(2, 3).double()}, 1e-4, "here")


def test_no_parameter_or_random_number_of_the_user_is_touched():
    mlp = Gated()
    state = {k: v.clone() for k, v in mlp.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    from starlayers.surgery.verify import verify

    assert verify(mlp, SITE).reason is None
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(state[k], v) for k, v in mlp.state_dict().items())
    assert all(isinstance(p, nn.Parameter) and p.grad is None for p in mlp.parameters())
