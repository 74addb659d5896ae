"""Names of activations: exact over the range of float32, in all modes and dtypes."""

import pytest
import torch
from torch import nn

from starlayers.activations import ACTIVATIONS
from starlayers.surgery.verify_act import name_of_act


def fails(x):
    raise KeyError("no")


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.Identity(), "identity"),
        (nn.ReLU(), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.SiLU().to(torch.float64), "silu"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Tanh(), "tanh"),
        (nn.Softplus(), "softplus"),
        (nn.Hardswish(), "hardswish"),
        (nn.functional.silu, "silu"),
        (lambda x: x.relu().square(), "squared_relu"),
        (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu"),
        (lambda x: nn.functional.silu(x) * (1 + 1e-4), None),
        (lambda x: nn.functional.silu(x) + 1e-4, None),
        (lambda x: x.clamp(-7.9, 7.9), None),
        (nn.LeakyReLU(), None),
        (nn.PReLU(), None),
        (nn.PReLU(init=0.0), None),
        (nn.Hardtanh(0, 6), "relu6"),
        (nn.Hardtanh(0, 10), None),
        (nn.ReLU(inplace=True), "relu"),
        (lambda x: nn.functional.silu(x.clamp(max=9)), None),
        (lambda x: nn.functional.silu(x.clamp(max=1e4)), None),
        (lambda x: nn.functional.silu(x.clamp(max=1e30)), None),
        (lambda x: nn.functional.silu(x.clamp(min=-1e30)), "silu"),
        (lambda x: nn.functional.silu(x).detach(), None),
        (lambda x: nn.functional.silu(x) if x.dtype == torch.float32 else x.relu(), None),
        (lambda x: nn.functional.silu(x) if torch.is_grad_enabled() else x.relu(), None),
        (lambda x: nn.functional.silu(x) if x.shape[0] < 100 else x.relu(), None),
        (lambda x: nn.functional.silu(x) if x.abs().max() < 100 else x.relu(), None),
        (lambda x: nn.functional.silu(x.float()).to(x.dtype), "silu"),
        (lambda x: nn.functional.silu(x.bfloat16()).to(x.dtype), None),
        (lambda x: nn.functional.silu(x) * 1.0, "silu"),
        (lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), "gelu"),
        (nn.RReLU(0.1, 0.1), None),
        (nn.Dropout(0.0), None),
        (fails, None),
        (lambda x: x[:1], None),
        (lambda x: x.long(), None),
        (lambda x: None, None),
    ],
)
def test_name_of_act(act, name):
    assert name_of_act(act) == name


def test_every_row_has_its_name_and_no_number_is_drawn():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    rows = {row.name: row for row in ACTIVATIONS.values()}
    for name, row in rows.items():
        assert name_of_act(row.fn) == name
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert name_of_act(nn.functional.silu) == "silu"
    assert torch.equal(torch.rand(1), expected)
