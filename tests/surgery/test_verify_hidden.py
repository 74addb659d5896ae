"""Which hidden layers with their activation in the forward can have a gate, and why not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from starlayers.surgery.site import Site
from starlayers.surgery.verify import verify
from tests.surgery.test_hidden import FeedForward

SITE = Site("inline", "plain", "net.0.proj", None, "net.2")


def layer(function, **attributes):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 16)
            for name, value in attributes.items():
                setattr(self, name, value())

        def forward(self, x):
            return function(self, x)

    return Layer


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda m, x: F.relu(m.proj(x)), "relu"),
        (lambda m, x: F.relu_(m.proj(x)), "relu"),
        (lambda m, x: m.proj(x).relu().square(), "squared_relu"),
        (lambda m, x: F.gelu(m.proj(x).float()).to(x.dtype), "gelu"),
        (lambda m, x: (lambda h: h * torch.sigmoid(1.702 * h))(m.proj(x)), "quick_gelu"),
        (lambda m, x: F.elu(m.proj(x), 0.3), None),
        (lambda m, x: m.proj(x).clamp(-3, 3).tanh(), None),
    ],
)
def test_element_wise_functions_of_one_linear_layer(function, name):
    verdict = verify(FeedForward(layer(function)), SITE)
    assert (verdict.reason, verdict.act_name) == (None, name)


def in_train_only(module, x):
    h = module.proj(x)
    return h.relu() if module.training else h.tanh()


def without_gradients(module, x):
    h = module.proj(x)
    return h.relu() if torch.is_grad_enabled() else h.relu() * 2


def counts(module, x):
    module.calls = getattr(module, "calls", 0) + 1
    return module.proj(x).relu()


def long_only(module, x):
    h = module.proj(x)
    return h.relu() if x.shape[-2] < 100 else h


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: F.relu(m.proj(m.proj(x)[..., :8])), "calls 'proj' 2 times"),
        (lambda m, x: F.relu(m.proj(x)) + x.sum(), "the output of its forward depends on"),
        (lambda m, x: F.relu(m.proj(x)) * x.mean(), "the output of its forward depends on"),
        (lambda m, x: F.relu(m.proj(x * 2)), "'proj' takes more than the input, or other"),
        (lambda m, x: F.relu(m.proj(x)).softmax(-1), "depends on softmax"),
        (lambda m, x: F.relu(m.proj(x)).flip(-1), "depends on flip"),
        (lambda m, x: F.dropout(F.relu(m.proj(x)), 0.1, m.training), "depends on dropout"),
        (lambda m, x: F.relu(m.proj(x)) + torch.rand(1), "depends on rand"),
        (lambda m, x: m.proj(x), "applies no activation"),
        (lambda m, x: m.proj(x) * 2 + 1, "applies no activation"),
        (lambda m, x: m.proj(x) * torch.sigmoid(m.proj(x)), "calls 'proj' 2 times"),
        (lambda m, x: torch.relu(x[..., :1] * 2).expand(*x.shape[:-1], 16), "calls 'proj' 0 times"),
        (lambda m, x: (m.proj(x).relu(), None), "does not return one tensor"),
        (lambda m, x: m.norm(m.proj(x)).relu(), "of 'norm'"),
        (in_train_only, "it computes relu"),
        (without_gradients, "otherwise"),
        (counts, "sets 'calls'"),
        (long_only, "depends on the size of its input"),
    ],
)
def test_everything_else_is_refused(function, reason):
    verdict = verify(FeedForward(layer(function, norm=lambda: nn.LayerNorm(16))), SITE)
    assert reason in verdict.reason


def test_a_forward_of_two_arguments_or_on_the_instance_is_refused():
    class Two(layer(lambda m, x: m.proj(x).relu())):
        def forward(self, x, scale):
            return self.proj(x).relu() * scale

    assert verify(FeedForward(Two), SITE).reason == (
        "its forward takes 2 arguments, not the input alone"
    )
    mlp = FeedForward()
    mlp.net[0].forward = lambda x: x
    assert verify(mlp, SITE).reason == "its forward was replaced on the instance"


def test_quantised_weights_are_refused():
    mlp = FeedForward()
    mlp.net[0].proj.weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.int8), False)
    assert "starify before quantising" in verify(mlp, SITE).reason
