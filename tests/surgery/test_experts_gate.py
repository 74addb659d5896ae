"""Gates of experts: which are stars, and why others are not."""

import functools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from starlayers.surgery import experts_gate as module
from starlayers.surgery.experts_gate import cached_verification, verify_gate
from tests.surgery.moe import causal, experts_of


def experts(gate=None, act=None, **attributes):
    """Experts of 24 hidden channels with a gate or an activation of one's own."""
    found = experts_of(causal("Mixtral", num_hidden_layers=1))[0]
    if gate is not None:
        found.__class__ = type("MyExperts", (MixtralExperts,), {"_apply_gate": gate})
    if act is not None:
        del found.act_fn
        found.act_fn = act
    for name, value in attributes.items():
        setattr(found, name, value)
    return found


# stars


@pytest.mark.parametrize(
    ("name", "act_name"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("relu6", "relu6"),
        ("quick_gelu", "quick_gelu"),
        ("sigmoid", "sigmoid"),
        ("tanh", "tanh"),
        ("hardswish", "hardswish"),
        ("linear", "identity"),
        ("relu2", "squared_relu"),
    ],
)
def test_activations_of_the_table(name, act_name):
    gate = verify_gate(experts(act=ACT2FN[name]))
    assert gate == (act_name, None, ("act_fn",), True, 0)


@pytest.mark.parametrize("name", ["mish", "gelu_new", "gelu_fast", "leaky_relu", "laplace"])
def test_activations_outside_of_the_table(name):
    gate = verify_gate(experts(act=ACT2FN[name]))
    assert gate.act_name == ""
    assert gate.reason.startswith("it computes mul(")


def test_autocast_changes_softplus():
    assert verify_gate(experts(act=nn.Softplus())).autocast is False


def up_first(self, h):
    gate, up = h.chunk(2, -1)
    return up * self.act_fn(gate)


def by_split(self, h):
    gate, up = torch.split(h, h.shape[-1] // 2, dim=-1)
    return self.act_fn(gate) * up


def by_sizes(self, h):
    gate, up = h.split([24, 24], dim=1)
    return self.act_fn(gate) * up


def by_slices(self, h):
    return self.act_fn(h[:, :24]) * h[..., 24:]


def by_negative_slices(self, h):
    return self.act_fn(h[..., :-24]) * h[:, -24:]


def in_float32(self, h):
    gate, up = h.chunk(2, -1)
    return (self.act_fn(gate.float()) * up.float()).to(h.dtype)


def activated_in_float32(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate.float()).to(h.dtype) * up


def contiguous(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate.contiguous()) * up.clone()


def inline(self, h):
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize(
    "gate",
    [
        up_first,
        by_split,
        by_sizes,
        by_slices,
        by_negative_slices,
        in_float32,
        activated_in_float32,
        contiguous,
        inline,
    ],
)
def test_ways_to_write_a_star(gate):
    found = verify_gate(experts(gate))
    reads = () if gate is inline else ("act_fn",)
    width = 48 if gate in (by_split, by_sizes, by_slices, by_negative_slices) else 0
    assert found == ("silu", None, reads, True, width)


# no stars


def interleaved(self, h):
    return self.act_fn(h[..., ::2]) * h[..., 1::2]


def second_activated(self, h):
    up, gate = h.chunk(2, -1)
    return self.act_fn(gate) * up


def clamped(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate.clamp(max=1e7)) * up


def minimum(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(torch.minimum(gate, torch.full_like(gate, 1e7))) * up


def scaled(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * up * 1.0


def shifted(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * (up + 1e-9)


def of_itself(self, h):
    gate, _ = h.chunk(2, -1)
    return self.act_fn(gate) * gate


def both_activated(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * self.act_fn(up)


def twice(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(self.act_fn(gate)) * up


def detached(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * up.detach()


def no_grad(self, h):
    gate, up = h.chunk(2, -1)
    with torch.no_grad():
        a = self.act_fn(gate)
    return a * up


def dropped(self, h):
    gate, up = h.chunk(2, -1)
    return F.dropout(self.act_fn(gate) * up, 0.1, self.training)


def in_training(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * (up.clamp(-100, 100) if self.training else up)


def without_gradients(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * (up if torch.is_grad_enabled() else up.clamp(-100, 100))


def half_guard(self, h):
    gate, up = h.chunk(2, -1)
    y = self.act_fn(gate) * up
    return y.clamp(-60000, 60000) if h.dtype == torch.float16 else y


def bfloat16_guard(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate.half()).to(h.dtype) * up


def long_batches(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * up if len(h) < 100 else torch.relu(gate) * up


def single_rows(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * up if len(h) > 1 else gate


def no_rows(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * up if len(h) else h


def narrow(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * up if h.shape[-1] > 40 else up


def large_values(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * up if h.abs().max() < 1e30 else up


def by_max_of_batch(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate / gate.abs().amax().clamp(min=1)) * up


def in_place(self, h):
    h.mul_(2)
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * up


def in_place_at_the_end(self, h):
    gate, up = h.chunk(2, -1)
    return (self.act_fn(gate) * up).mul_(2)


def with_a_weight(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * up * self.weight


def with_a_norm(self, h):
    gate, up = h.chunk(2, -1)
    return F.layer_norm(self.act_fn(gate) * up, (24,))


def of_three(self, h):
    gate, up, _ = h.chunk(3, -1)
    return self.act_fn(gate) * up


def two_results(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate), up


def by_config(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * (up if self.config.hidden_act == "silu" else -up)


def by_list(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * (up if not self.limits else up.clamp(*self.limits))


def by_tensor(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * (up if self.table.numel() else -up)


def fails(self, h):
    raise RuntimeError("no kernel\nfor this")


def rolled(self, h):
    gate, up = h.roll(1, -1).chunk(2, -1)
    return self.act_fn(gate) * up


def along_rows(self, h):
    gate, up = h.chunk(2, 0)
    return torch.cat([self.act_fn(gate), up])


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        (interleaved, r"not two halves side by side: it computes mul\(s.*slice\(h, 1, 0, "),
        (second_activated, r"it computes mul\(gate, silu\(up\)\), not act\(gate\) \* up"),
        (clamped, r"clamped: it computes mul\(up, silu\(clamp\(gate, None, 10000000.0\)\)\)"),
        (minimum, "clamped: it computes"),
        (scaled, "it computes mul"),
        (shifted, r"it computes mul\(add\(up, 1e-09\), silu\(gate\)\)"),
        (of_itself, r"it computes mul\(gate, silu\(gate\)\)"),
        (both_activated, r"it computes mul\(silu\(gate\), silu\(up\)\)"),
        (twice, r"it computes mul\(up, silu\(silu\(gate\)\)\)"),
        (detached, "it computes|gradient of its gate differs"),
        (no_grad, "no plain operation|it computes|gradient of its gate differs"),
        (dropped, "depends on dtype, mode or gradients"),
        (in_training, "depends on dtype, mode or gradients: .* training=True"),
        (without_gradients, "depends on dtype, mode or gradients: .* gradients=False"),
        (half_guard, r"depends on dtype, mode or gradients: .* torch.float16"),
        (bfloat16_guard, "to_float16"),
        (long_batches, "no graph that holds for all values and any number of rows"),
        (single_rows, "no graph that holds|value of its gate differs by .* 1 rows"),
        (no_rows, r"no graph that holds|its gate returns torch.float32 of shape \(0, 48\)"),
        (large_values, "no graph that holds for all values and any number of rows"),
        (by_max_of_batch, "it computes mul"),
        (in_place, "works in place, by mul_"),
        (in_place_at_the_end, "works in place, by mul_"),
        (with_a_weight, "cannot be tried|has no graph"),
        (with_a_norm, "it computes layer_norm"),
        (of_three, "it computes mul"),
        (two_results, "returns more than one tensor"),
        (by_config, "reads 'config', whose contents may change"),
        (by_list, "reads 'limits', whose contents may change"),
        (by_tensor, "reads the tensor 'table'"),
        (fails, "RuntimeError no kernel"),
        (rolled, "it computes mul"),
        (along_rows, "it computes cat|no graph"),
    ],
)
def test_what_is_no_star(gate, reason):
    attributes = {"limits": [], "table": torch.ones(2)}
    given = {k: v for k, v in attributes.items() if k in gate.__code__.co_names}
    found = verify_gate(experts(gate, **given))
    assert found.act_name == ""
    assert re.search(reason, found.reason), found.reason


def test_gates_that_ask_about_their_width():
    found = verify_gate(experts(narrow))
    assert (found.act_name, found.width) == ("silu", 48)


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx, g):
        return g


class Straight(nn.Module):
    def forward(self, x):
        return WrongBackward.apply(x)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.limits = []

    def forward(self, x):
        return F.silu(x)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.SiLU()

    def forward(self, x):
        return self.inner(x)


def closure():
    scale = 1

    def act(x):
        return F.silu(x) if scale else x

    return act


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (Straight(), "gradient of its gate differs by .* from that of silu"),
        (nn.PReLU(), "cannot be tried|depends on tensors other than its input"),
        (nn.RReLU(), "it computes|depends on dtype, mode"),
        (nn.SiLU(inplace=True), "works in place, by silu_"),
        (Listed(), "reads 'act_fn.limits', whose contents may change"),
        (Deep(), "'act_fn' has modules or tensors inside"),
        (closure(), "reads 'act_fn', whose contents may change"),
        (lambda x: F.silu(x, inplace=False) * math.pi / math.pi, "it computes"),
    ],
)
def test_activations_that_are_no_activations(act, reason):
    found = verify_gate(experts(act=act))
    assert found.act_name == ""
    assert re.search(reason, found.reason), found.reason


def test_functions_serve_as_activations():
    assert verify_gate(experts(act=F.silu)).act_name == "silu"
    act = functools.partial(F.gelu, approximate="tanh")
    assert verify_gate(experts(act=act)).act_name == "gelu_tanh"


def test_options_of_the_interface():
    assert verify_gate(experts(has_gate=False)).reason == (
        "its experts are plain, act(x W1) W2: they have no second branch"
    )
    assert "interleaved" in verify_gate(experts(is_concatenated=False)).reason
    assert verify_gate(experts(_apply_gate=torch.tanh)).reason == (
        "its gate is replaced on the instance: starify before that"
    )
    wrapped = experts()
    parametrize.register_parametrization(wrapped, "down_proj", nn.Identity())
    assert verify_gate(wrapped).reason == "its weights are parametrised: starify before that"


def test_odd_widths():
    found = experts()
    found.gate_up_proj = nn.Parameter(torch.empty(4, 7, 16))
    assert verify_gate(found).reason == "its branches have 7 channels together, an odd number"


def test_width_of_weights():
    assert module.gate_width(experts()) == 48
    assert module.gate_width(experts(is_transposed=True)) == 16
    quantised = experts()
    quantised.gate_up_proj = nn.Parameter(torch.zeros(9, dtype=torch.uint8), requires_grad=False)
    assert module.gate_width(quantised) == 32
    assert verify_gate(quantised).act_name == "silu"


def test_a_trial_leaves_no_trace():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return F.silu(x)

    found, state = experts(act=Counts()), torch.get_rng_state()
    found.act_fn.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    names = set(vars(found))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert verify_gate(found).act_name == "silu"
    assert found.act_fn.calls == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(found)) == names
    assert type(found) is MixtralExperts


def test_one_verification_for_equal_experts():
    calls = []

    def verify(found):
        calls.append(found)
        return verify_gate(found)

    cached = cached_verification(verify)
    first = experts(act=ACT2FN["gelu_pytorch_tanh"], layer=0)
    second = experts(act=ACT2FN["gelu_pytorch_tanh"], layer=1)
    assert cached(first) == cached(second) == verify_gate(first)
    assert len(calls) == 1
    assert cached(experts()).act_name == "silu"
    assert cached(experts(act=nn.Softplus(beta=1.0))).act_name == "softplus"
    assert cached(experts(act=nn.Softplus(beta=2.0))).reason is not None
    assert cached(experts(has_gate=False)).reason is not None
    assert cached(experts(by_list_free, limit=None)).act_name == "silu"
    assert cached(experts(by_list_free, limit=3.0)).reason is not None
    assert len(calls) == 7


def by_list_free(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * (up if self.limit is None else up.clamp(max=self.limit))


def test_settings():
    act = nn.Softplus(2.0)
    known = module.settings(act)
    assert known == {"beta": 2.0, "threshold": 20.0, module.FORWARD: nn.Softplus.forward}
    assert module.same_settings(known, module.settings(nn.Softplus(2.0)))
    assert not module.same_settings(known, module.settings(nn.Softplus(2)))
    assert not module.same_settings(known, {**known, "more": 1})
    assert not module.same_settings({**known, "more": 1}, {**known, "less": 1})
    assert not module.same_value([1], [1])
    assert not module.same_value(float("nan"), float("nan"))


def test_prints_of_code():
    assert module.code_print(up_first) == module.code_print(up_first)
    assert module.code_print(up_first) != module.code_print(second_activated)
    assert module.restored(up_first, module.code_print(up_first)) is up_first
    assert module.restored(by_split, module.code_print(up_first)) is None
    assert module.restored(None, "") is None
    assert module.restored(torch.tanh, module.code_print(torch.tanh)) is torch.tanh
    assert module.restored(torch.sin, module.code_print(torch.tanh)) is None
