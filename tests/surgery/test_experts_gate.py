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

from starlayers import ACTIVATIONS
from starlayers.surgery import experts_gate as module
from starlayers.surgery.experts import cached
from starlayers.surgery.experts_gate import verify_gate
from starlayers.surgery.formula import activation_name, read_formula
from starlayers.surgery.graph import trace
from starlayers.surgery.trial_run import MismatchError
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
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
    ],
)
def test_activations_of_the_table(name, act_name):
    gate = verify_gate(experts(act=ACT2FN[name]))
    assert gate == (act_name, None, ("act_fn",), True, 0)


@pytest.mark.parametrize("name", ["mish", "leaky_relu", "laplace"])
def test_activations_outside_of_the_table(name):
    gate = verify_gate(experts(act=ACT2FN[name]))
    assert gate.act_name == ""
    assert re.search(r"applies .*\(x|depends on", gate.reason), gate.reason


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


def times_one(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * up * 1.0


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
        times_one,
        inline,
    ],
)
def test_ways_to_write_a_star(gate):
    found = verify_gate(experts(gate))
    reads = () if gate is inline else ("act_fn",)
    width = 48 if gate in (by_sizes, by_slices, by_negative_slices) else 0
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
    return self.act_fn(gate) * up * 1.5


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


def in_place_on_a_part(self, h):
    h[:, 3:9].clamp_(max=1e7)
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * up


def contiguous_only(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * up if h.is_contiguous() else up


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


def by_helper(self, h):
    return limited(self, h)


def limited(experts, h):
    gate, up = h.chunk(2, -1)
    bound = getattr(experts, "bound", None)
    return experts.act_fn(gate) * (up if bound is None else up.clamp(-bound, bound))


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
        (interleaved, r"slice\(1, 0, None, 2\), slice\(1, 1, None, 2\) does not split its input"),
        (second_activated, r"it applies silu\(x\) to the second half of its input"),
        (clamped, r"it applies silu\(clamp\(x, None, 10000000.0\)\), which no row of ACTIVATIONS"),
        (minimum, "a factor of its product depends on minimum"),
        (scaled, "its output takes mul with 1.5, not the product"),
        (shifted, r"functions, silu\(x\) and add\(x, 1e-09\), where a star has one"),
        (of_itself, "its product has one half of its input for both factors"),
        (both_activated, r"both branches pass through functions, silu\(x\) and silu\(x\)"),
        (twice, r"it applies silu\(silu\(x\)\), which no row"),
        (detached, "a factor of its product depends on detach"),
        (no_grad, "a part of its gate runs under wrap_with_set_grad_enabled"),
        (dropped, "in train mode, .* its output takes dropout with 0.1"),
        (in_training, r"in train mode, .* clamp\(x, -100, 100\)"),
        (without_gradients, r"without gradients, .* clamp\(x, -100, 100\)"),
        (half_guard, "in eval mode, float16, .* its output takes clamp with -60000, 60000"),
        (bfloat16_guard, "in eval mode, bfloat16, .* depends on to"),
        (long_batches, "its gate depends on the size of its input"),
        (single_rows, "its gate depends on the size of its input"),
        (no_rows, "its gate depends on the size of its input"),
        (large_values, "its gate has no fixed graph: .*data-dependent"),
        (by_max_of_batch, "a factor of its product depends on amax"),
        (in_place, "its gate changes 'the input' in place"),
        (in_place_at_the_end, "works in place, by mul_"),
        (
            with_a_weight,
            "no fixed graph: AttributeError 'MyExperts' object has no attribute 'weight'",
        ),
        (with_a_norm, "its output takes layer_norm"),
        (of_three, r"chunk\(3, -1\) does not split its input"),
        (two_results, "does not return one tensor made of its input"),
        (by_config, "reads 'config', whose contents may change"),
        (by_list, "its gate reads 'limits', whose contents may change"),
        (by_helper, r"silu\(x\) and clamp\(x, -3.0, 3.0\)"),
        (by_tensor, "reads the tensor 'table'"),
        (fails, "RuntimeError no kernel"),
        (rolled, "roll.* does not split its input"),
        (along_rows, "its gate depends on the size of its input"),
    ],
)
def test_what_is_no_star(gate, reason):
    attributes = {"limits": [], "table": torch.ones(2)}
    given = {k: v for k, v in attributes.items() if k in gate.__code__.co_names}
    given |= {"bound": 3.0} if gate is by_helper else {}
    found = verify_gate(experts(gate, **given))
    assert found.act_name == ""
    assert re.search(reason, found.reason), found.reason


class Packed(nn.Module):
    """Function of a tensor that holds both branches."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


def read(function, *, any_width=False):
    graph = trace(Packed(function), torch.ones(4, 6), (), any_width=any_width)
    return read_formula(graph, module.SITE)


@pytest.mark.parametrize("name", [n for n, row in ACTIVATIONS.items() if row.name == n])
def test_rows_of_the_table(name):
    _, chain = read(lambda h: ACTIVATIONS[name].fn(h[:, :3]) * h[:, 3:])
    assert activation_name(chain) == name


@pytest.mark.parametrize(
    ("gate", "up"),
    [
        (lambda h: h.split(3, 1)[0], lambda h: h.split([3, 3], -1)[1]),
        (lambda h: h[:, :-3], lambda h: h[..., -3:]),
        (lambda h: h[:][..., :][:, :3], lambda h: h.tensor_split(2, 1)[1]),
        (lambda h: h.chunk(2, 1)[0].clone(), lambda h: h.chunk(2, -1)[1].contiguous()),
    ],
)
def test_halves(gate, up):
    first, second = read(lambda h: F.silu(gate(h)) * up(h)), read(lambda h: gate(h) * F.silu(up(h)))
    assert (first[0].act, first[0].site.gate_last) == ("silu(x)", False)
    assert (second[0].act, second[0].site.gate_last) == ("silu(x)", True)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: F.silu(h[:, 1:4]) * h[:, 3:],
        lambda h: F.silu(h[:, :3]) * h[:, 6:3],
        lambda h: F.silu(h.split([2, 4], -1)[0]) * h[:, :1],
        lambda h: F.silu(h[::2, :3]) * h[::2, 3:],
        lambda h: F.silu(h[1:, :3]) * h[1:, 3:],
    ],
)
def test_parts_that_are_no_halves(function):
    with pytest.raises(MismatchError, match=r"split|depends on|must match the size"):
        read(function)


def test_halves_of_any_width():
    def narrow(h):
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up if h.shape[-1] > 5 else up

    chunked, _ = read(lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1], any_width=True)
    assert chunked == read(narrow)[0]
    for function in (narrow, lambda h: F.silu(h[:, :3]) * h[:, 3:]):
        with pytest.raises(MismatchError, match="depends on the size of its input"):
            read(function, any_width=True)


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
        (Straight(), "the gradient of 'x' differs by"),
        (nn.PReLU(), "depends on prelu of 'act_fn' with 'act_fn.weight'"),
        (nn.RReLU(), "depends on rrelu of 'act_fn'"),
        (nn.SiLU(inplace=True), "works in place, by silu_"),
        (Listed(), "its gate reads 'act_fn.limits', whose contents may change"),
        (closure(), "reads 'act_fn', whose contents may change"),
        (lambda x: F.silu(x, inplace=False) * math.pi, r"it applies mul\(silu\(x\), 3.14"),
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
    assert verify_gate(experts(act=Deep())) == ("silu", None, ("act_fn",), True, 0)


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

    first = experts(act=ACT2FN["gelu_pytorch_tanh"])
    second = experts(act=ACT2FN["gelu_pytorch_tanh"])
    second.gate_up_proj.data.zero_()
    assert cached(verify, first) == cached(verify, second) == verify_gate(first)
    assert len(calls) == 1
    assert cached(verify, experts()).act_name == "silu"
    assert cached(verify, experts(act=nn.Softplus(beta=1.0))).act_name == "softplus"
    assert cached(verify, experts(act=nn.Softplus(beta=2.0))).reason is not None
    assert cached(verify, experts(has_gate=False)).reason is not None
    assert cached(verify, experts(by_list_free, limit=None)).act_name == "silu"
    assert cached(verify, experts(by_list_free, limit=3.0)).reason is not None
    assert len(calls) == 7


def by_list_free(self, h):
    gate, up = h.chunk(2, -1)
    return self.act_fn(gate) * (up if self.limit is None else up.clamp(max=self.limit))
