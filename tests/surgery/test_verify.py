"""Trial runs: what they see, that they leave no trace, and which claims they refuse."""

import copy
from queue import SimpleQueue

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from starlayers import starify
from starlayers.surgery import Site, find_mlps, report
from starlayers.surgery import verify as module
from starlayers.surgery.trial_run import CannotRunError, MismatchError
from starlayers.surgery.verify import Verdict, verify
from tests.surgery.small import MLP, Gated, Packed, Twice, train_gates


@pytest.mark.parametrize("first", ["gate", "up"])
def test_the_activated_branch_is_found(x, first):
    mlp = Gated(first)
    y = mlp(x)
    (finding,) = find_mlps(mlp)
    assert (finding.site.inp, finding.site.up) == ("gate", "up")
    assert torch.equal(starify(mlp, mode="fuse")(x), y)


@pytest.mark.parametrize("gate_last", [False, True])
def test_the_activated_half_is_found(x, gate_last):
    mlp = Packed(gate_last)
    y = mlp(x)
    starify(mlp, grow=2)
    assert mlp.star.site.gate_last is gate_last
    assert torch.equal(mlp(x), y)
    train_gates(mlp)
    a, b = mlp.both(x).chunk(2, -1)
    a, b = (b, a) if gate_last else (a, b)
    silu = nn.functional.silu
    grown = mlp.star_grown
    pairs = silu(grown.f1(x)) * grown.f2(x)
    product = silu(a) * b + pairs[:, ::2] + pairs[:, 1::2]
    torch.testing.assert_close(mlp(x), mlp.down(product))


class Skips(MLP):
    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(self.act(h) + h)


class Elsewhere(MLP):
    def forward(self, x):
        return self.fc2(self.fc1(self.act(x)))


class Unused(MLP):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)) * 0)


class Reads(MLP):
    def forward(self, x):
        return self.fc2(self.act(nn.functional.linear(x, self.fc1.weight)))


class NeedsMore(MLP):
    def forward(self, x, mask):
        return self.fc2(self.act(self.fc1(x))) * mask.squeeze(7)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Twice(), "calls 'act' 2 times, not once"),
        (Elsewhere(), "'act' is not applied to the output of 'fc1'"),
        (Unused(), "no effect on what follows"),
        (Reads(), "calls 'fc1' 0 times"),
        (NeedsMore(), "NeedsMore does not run by itself"),
        (Gated(scale=0.5), "'down' takes mul with 0.5, not the product of two branches"),
    ],
)
def test_what_does_not_compute_its_formula_is_left_alone(model, reason):
    before = copy.deepcopy(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    (row,) = report(model).skipped
    assert reason in row.detail
    with pytest.raises(ValueError, match=r"1 looked like one, but"):
        starify(model)
    assert kinds == [type(m) for m in model.modules()]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_trial_calls_no_hook_and_changes_no_buffer():
    class Counts(MLP):
        def __init__(self):
            super().__init__(act=nn.ReLU(inplace=True), dropout=0.5)
            self.norm = nn.BatchNorm1d(8)
            self.register_buffer("runs", torch.zeros(()))

        def forward(self, x):
            self.runs += 1
            x = self.norm(x.flatten(0, -2)).view(x.shape)
            return super().forward(x)

    model = Counts()
    model.fc1.register_forward_hook(lambda *_: pytest.fail("a user's hook was called"))
    model.act.register_forward_hook(lambda *_: pytest.fail("a user's hook was called"))
    model.register_forward_pre_hook(lambda *_: pytest.fail("a user's hook was called"))
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    assert [f.reason for f in find_mlps(model)] == [None]
    starify(copy.deepcopy(model))  # installing calls no hook either
    torch.manual_seed(5)
    find_mlps(model)
    assert torch.equal(torch.rand(1), want)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training


class Int8Linear(nn.Linear):
    """Linear layer as quantisers make it."""

    def __init__(self, n, f):
        super().__init__(n, f)
        self.weight = nn.Parameter((self.weight * 100).to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() / 100, self.bias)


def test_quantised_layers_are_refused():
    model = MLP()
    model.fc1 = Int8Linear(8, 16)
    (row,) = report(model).skipped
    assert row.detail == ("Int8Linear holds torch.int8 weights: starify before quantising")
    dynamic = torch.ao.quantization.quantize_dynamic(MLP(), {nn.Linear})
    (row,) = report(dynamic).skipped
    assert "starify before quantising" in row.detail


def test_a_quantised_last_projection_is_safe(x):
    model = MLP()
    model.fc2 = Int8Linear(16, 8)
    y = model(x)
    assert torch.equal(starify(model)(x), y)


class Clamped(Gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x).clamp(max=5)) * self.up(x))


class ClampedPlain(MLP):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x).clamp(-5, 5)))


class Limited(MLP):
    """Clamps behind a norm, which no size of input gets at."""

    def forward(self, x):
        h = self.act(self.fc1(nn.functional.layer_norm(x, x.shape[-1:])))
        return self.fc2(h.clamp(max=20.0))


def test_clamps_that_rest_at_ordinary_sizes_are_seen():
    (row,) = report(Clamped()).skipped
    assert row.detail == (
        "its forward computes silu(clamp(x, None, 5)), which no row of ACTIVATIONS equals"
    )
    (row,) = report(ClampedPlain()).skipped
    assert row.detail == "'act' is not applied to the output of 'fc1'"
    assert len(report(Limited()).ready) == 1  # the clamp follows the star and stays where it is


def test_clamped_experts_of_transformers_are_left_alone():
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP

    config = DeepseekV4Config(hidden_size=32, intermediate_size=64, moe_intermediate_size=64)
    assert config.swiglu_limit
    (row,) = report(DeepseekV4MLP(config)).skipped
    assert row.detail == (
        "both branches pass through functions, silu(clamp(x, None, 10.0)) and "
        "clamp(x, -10.0, 10.0), where a star has one"
    )


class Peeks(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        before = self.net[0](x)
        return self.net[2](self.net[1](before)) + before.mean(-1, keepdim=True)


class Collects(Peeks):
    def forward(self, x):
        seen = []
        for layer in self.net:
            x = layer(x)
            seen.append(x)
        return seen


class Whole(Peeks):
    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("make", [Peeks, Collects, Whole])
def test_what_reads_the_first_layer_inside_of_a_sequence_sees_it_as_it_was(make, x):
    own = make()
    star = starify(copy.deepcopy(own))
    nn.init.normal_(star.net[0].gate.weight)
    first = torch.equal(own.net[0](x), star.net[0](x))
    assert (first, torch.equal(own.net(x), star.net(x))) == (True, False)
    nn.init.zeros_(star.net[0].gate.weight)
    for a, b in zip(tree_leaves(own(x)), tree_leaves(star(x)), strict=True):
        assert torch.equal(a, b)


def test_a_skip_around_the_activation_stays_without_the_gate(x):
    own = Skips()
    star = starify(copy.deepcopy(own))
    nn.init.normal_(star.fc1.gate.weight)
    h = own.fc1(x)
    torch.testing.assert_close(star(x), own.fc2(own.act(h) * (1 + star.fc1.gate(x)) + h))


def test_a_zero_last_projection_is_no_obstacle(x):
    mlp = MLP()
    nn.init.zeros_(mlp.fc2.weight)
    assert [row.state for row in report(mlp).rows] == ["ready"]


def test_arguments_that_cannot_be_left_out_do_not_confuse():
    class Residual(MLP):
        """As BLOOM and MPT write it."""

        def forward(self, x, residual):
            return residual + self.fc2(self.act(self.fc1(x)))

    assert [row.state for row in report(Residual()).rows] == ["ready"]


def test_a_trial_leaves_no_trace_anywhere():
    import random

    import numpy

    class Busy(MLP):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(3)
            self.count, self.log = torch.zeros(()), []
            self.state = nn.Parameter(torch.zeros(8), requires_grad=False)

        def forward(self, x):
            self.count += 1
            self.log.append(len(x))
            self.state += 1
            torch.rand(1, generator=self.generator)
            numpy.random.rand()
            random.random()
            return super().forward(x)

    model = Busy()

    def numbers():
        held = model.generator.clone_state()
        drawn = torch.rand(1, generator=held).item()
        return [drawn, numpy.random.get_state()[2], random.getstate(), torch.get_rng_state().sum()]

    before = numbers()
    assert [row.state for row in report(model).rows] == ["ready"]
    report(copy.deepcopy(model).to("meta"))
    starify(model)  # a full gate draws no number either
    assert numbers() == before
    assert (model.count, model.log) == (0, [])
    assert model.state.sum() == 0


def test_other_gpus_are_not_seeded(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "manual_seed_all", lambda seed: pytest.fail("every GPU was seeded")
    )
    report(MLP())


@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_parametrised_weights(x, wrap, layer):
    mlp = MLP()
    getattr(torch.nn.utils.parametrizations, wrap)(getattr(mlp, layer))
    mlp.eval()
    state, y = copy.deepcopy(mlp.state_dict()), mlp(x)
    mlp.train()
    report(mlp)
    assert all(torch.equal(state[k], v) for k, v in mlp.state_dict().items())
    starify(mlp)
    assert torch.equal(mlp.eval()(x), y)


def test_what_cannot_be_tried_is_skipped(x):
    net = nn.ModuleDict({"a": MLP(), "b": MLP(), "lazy": nn.LazyBatchNorm1d()})
    net["b"].act = torch.jit.script(nn.GELU())
    net["c"] = MLP()
    net["c"].fc1 = nn.LazyLinear(16)
    assert [row.name for row in report(net).ready] == ["a.fc1"]


# refusals, one by one


def reasons(model):
    (finding,) = find_mlps(model)
    return finding.reason


def test_a_recipe_may_name_what_is_no_linear_map():
    mlp = MLP()
    site = Site("mine", "plain", "drop", "act", "fc2")
    assert verify(mlp, site) == Verdict(site, "'drop' is no linear map")
    gated = Gated()
    site = Site("mine", "gated", "gate", "act", "down", up="act")
    assert verify(gated, site) == Verdict(site, "'act' is no linear map")


def test_a_recipe_may_name_what_is_not_there():
    site = Site("mine", "plain", "fc3", "act", "fc2")
    assert verify(MLP(), site).reason.startswith("it cannot be tried: AttributeError 'MLP' object")


def test_a_forward_on_the_instance_is_refused():
    mlp = MLP()
    mlp.forward = lambda x: x
    assert reasons(mlp) == (
        "its forward was replaced by test_a_forward_on_the_instance_is_refused.<locals>.<lambda> "
        "of tests.surgery.test_verify: starify the model before that is done, or leave its MLPs "
        "alone there"
    )


@pytest.mark.parametrize(("inp", "up"), [("gate", "up"), ("up", "gate")])
def test_the_reason_does_not_depend_on_the_order_of_the_branches(inp, up):
    site = Site("gated", "gated", inp, None, "down", up=up)
    verdict = verify(Gated(scale=0.5), site)
    assert verdict == Verdict(site, "'down' takes mul with 0.5, not the product of two branches")


class Extra(Gated):
    def forward(self, x, mask=None):
        return super().forward(x)


class Needs(Gated):
    def forward(self, x, mask):
        return super().forward(x)


class Keywords(Gated):
    def forward(self, x, **kwargs):
        return super().forward(x)


def test_gated_mlps_take_the_input_alone():
    assert reasons(Extra()) is None  # a call with a mask runs the model's own forward
    assert reasons(Needs()) == "its forward takes 2 arguments, not the input alone"
    assert reasons(Keywords()) is None


class TwiceDown(Gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x)) + self.down(self.gate(x)) * 0


class NoGate(Gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x) + self.gate(x)) * self.up(x))


class Residual(Gated):
    def forward(self, x):
        return x + super().forward(x)


def test_gated_mlps_call_their_layers_once_and_return_the_last():
    assert reasons(TwiceDown()) == "one run calls 'gate' 2 times, not once"
    assert reasons(NoGate()) == "one run calls 'gate' 2 times, not once"
    assert reasons(Residual()) == "its output is add, not that of 'down'"


class Between(Gated):
    """Identities in eval mode between product and last layer, and elsewhere."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Dropout(0.5), nn.Identity()
        self.before, self.scaled = nn.Identity(), nn.Identity()

    def forward(self, x):
        x = self.before(x)
        product = self.second(self.first(self.act(self.gate(x)) * self.up(x)))
        self.scaled(2 * product)
        return self.down(product)


def test_modules_between_product_and_last_layer_are_told_in_their_order():
    site = Site("gated", "gated", "gate", "act", "down", up="up")
    assert verify(Between(), site) == Verdict(
        site, None, ("first",), (), "silu", "silu(x)", casts=False
    )


class TrainOnly(Gated):
    """Computes another function in train mode."""

    def forward(self, x):
        y = self.down(self.act(self.gate(x)) * self.up(x))
        return 2 * y if self.training else y


class TrainOnlyPlain(MLP):
    def forward(self, x):
        h = self.act(self.fc1(x))
        return self.fc2(h + self.fc1(x) if self.training else h)


def test_train_mode_is_run_too():
    assert reasons(TrainOnly()) == (
        "in train mode, float32, 3 dimensions: its output is mul with 2, not that of 'down'"
    )
    assert reasons(TrainOnlyPlain()) == "one run calls 'fc1' 2 times, not once"


@pytest.mark.parametrize("limit", [100.0, 1e5])
def test_plain_mlps_are_run_far_from_their_usual_size(limit):
    """Usual outputs of the first layer are of size 1; limits act at other sizes."""

    class Far(MLP):
        def forward(self, x):
            return self.fc2(self.act(self.fc1(x).clamp(max=limit)))

    assert reasons(Far()) == "'act' is not applied to the output of 'fc1'"


def test_a_difference_is_told_in_two_digits():
    class Off(MLP):
        def forward(self, x):
            return self.fc2(self.act(self.fc1(x))) + self.act(self.fc2.bias * 0 - 1).sum() * 0

    assert "calls 'act' 2 times" in reasons(Off())
    with pytest.raises(MismatchError, match=r"^there, its output differs by 0\.12$"):
        module._require_equal([torch.zeros(2)], [torch.tensor([0.0, -0.123])], "there")
    for lost in ([], [torch.tensor([0.0, torch.nan])]):
        with pytest.raises(MismatchError, match=r"^there, a gradient is missing, or overflows"):
            module._require_equal([torch.zeros(2)], lost, "there")


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.0], [1.0, 2.5], False),
        ([1.0, float("nan")], [1.0, 5.0], True),
        ([1.0, float("inf")], [1.0, float("nan")], True),
        ([1.0, 5.0], [1.0, float("nan")], False),
        ([1.0], [1.0, 1.0], False),
    ],
)
def test_tensors_are_equal_where_the_first_is_finite(a, b, equal):
    assert module._equal_tensors(torch.tensor(a), torch.tensor(b)) is equal
    nest = {"x": [torch.tensor(a), (torch.ones(1), "text", None)]}
    other = {"y": [torch.tensor(b), (torch.ones(1), 3)]}
    assert module._equal(nest, other) is equal
    assert not module._equal(nest, [torch.tensor(a)])
    assert not module._equal_tensors(torch.tensor(a), torch.tensor(a).double())


def test_trials_see_outputs_attributes_and_gradients():
    class Keeps(nn.Sequential):
        def forward(self, x):
            self.kept = 2 * x
            return super().forward(x)

    layer = nn.Linear(8, 8)
    body = Keeps(layer)
    results = module._trials(body, layer, (2, 3, 8), list(layer.parameters()))
    assert len(results) == len(module.SCALES) * (2 * 2 * 3 + 2)  # two modules, two more gradients
    x = module._random_input(layer, (2, 3, 8))
    for i, scale in enumerate(module.SCALES):
        output, kept = results[14 * i : 14 * i + 2]
        assert torch.equal(output, layer(x) * scale)
        assert torch.equal(kept[0], 2 * x)
    assert not layer._forward_hooks
    assert not hasattr(body, "kept")


def test_random_input():
    layer = nn.Linear(8, 4, dtype=torch.bfloat16)
    x = module._random_input(layer, (2, 3, 8))
    assert (x.shape, x.dtype) == ((2, 3, 8), torch.bfloat16)
    assert torch.equal(x, module._random_input(layer, (2, 3, 8)))


class Takes(nn.Module):
    """Linear layer that takes input of one shape only."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.fc = shape, nn.Linear(8, 4)

    def forward(self, x):
        if x.shape != self.shape:
            raise ValueError(f"{tuple(x.shape)} is not {self.shape}")
        return x


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 8, 3, 3), (2, 8, 3), (6, 8)])
def test_the_input_has_a_shape_that_runs(shape):
    body = Takes(shape)
    assert module._shape_that_runs(body, body.fc) == shape
    assert module._shape_that_runs(nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)) == (2, 8, 3, 3)


def test_the_reason_is_that_of_the_first_shape():
    body = Takes((1, 8))
    with pytest.raises(CannotRunError, match=r"\(2, 3, 8\) is not \(1, 8\)"):
        module._shape_that_runs(body, body.fc)


class MapBlock(MLP):
    """ConvNeXt's layer: maps outside, channels last inside."""

    def forward(self, x):
        return x + super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Packing(MLP):
    """Layer of one long sequence with the boundaries of those that it holds."""

    def forward(self, x, cu_seqlens):
        first, *ends = cu_seqlens.tolist()
        assert x.ndim == 2
        assert (first, ends) == (0, [len(x)])
        return super().forward(x)


class Map(MLP):
    """MLP that takes the sizes of a map beside its positions."""

    def forward(self, x, height, width):
        return super().forward(x).view(len(x), height, width, -1)


@pytest.mark.parametrize("kind", [MapBlock, Packing, Map])
def test_layers_of_other_inputs_are_verified(kind):
    assert reasons(kind()) is None


def test_the_smallest_part_that_runs_the_mlp_is_run():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})
            self.parts["act"] = nn.ReLU()

        def forward(self, x):
            return self.parts["fc2"](self.parts["act"](self.parts["fc1"](x)))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()
            self.head = nn.Linear(16, 8)

        def forward(self, ids):
            raise RuntimeError("does not run by itself")

    outer = Outer()
    site = Site("mine", "plain", "inner.parts.fc1", "inner.parts.act", "inner.parts.fc2")
    assert module._deepest_common(outer, site) == "inner"
    body, local = module._runnable_part(outer, site)
    assert type(body) is Inner
    assert local == Site("mine", "plain", "parts.fc1", "parts.act", "parts.fc2")
    assert verify(outer, site) == Verdict(site, act_name="relu")
    outside = Site("mine", "packed", "inner.parts.fc1", "inner.parts.act", "head", gate_last=True)
    _, local = module._runnable_part(outer, outside)
    assert local == Site("mine", "packed", "parts.fc1", "parts.act", None, gate_last=True)
    apart = Site("mine", "plain", "inner.parts.fc1", "head", None)
    assert module._deepest_common(outer, apart) == ""


def test_a_part_directly_below_the_owner_is_run_by_itself():
    owner = nn.ModuleDict({"wide": MLP(), "output": nn.Linear(16, 8)})
    site = Site("split", "plain", "wide.fc1", "wide.act", "output")
    assert module._deepest_common(owner, site) == "wide"
    body, local = module._runnable_part(owner, site)
    assert type(body) is MLP
    assert local == Site("split", "plain", "fc1", "act", None)


def test_of_a_sequence_the_layers_from_projection_to_activation_are_run():
    net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    body, local = module._runnable_part(net, Site("sequential", "plain", "1", "2", "3"))
    assert [type(m) for m in body] == [nn.Linear, nn.GELU]
    assert local == Site("sequential", "plain", "1", "2", None)
    assert not body.training
    assert verify(net, Site("sequential", "plain", "1", "2", "3")).reason is None


class Caller(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.mode = mode

    def forward(self, x):
        if self.mode == "whole":
            return self.net(x)
        if self.mode == "fails":
            raise RuntimeError
        h = self.net[0](x)
        return self.net[2](self.net[1](h)) + h.sum()


UNTRIED = "Caller.forward calls 'net.0' by itself, and cannot be tried"


@pytest.mark.parametrize(("mode", "reason"), [("whole", None), ("fails", UNTRIED), ("reads", None)])
def test_callers_of_sequences(mode, reason):
    caller, site = Caller(mode), Site("sequential", "plain", "0", "1", "2")
    verdict = verify(caller.net, site, (caller, "net"))
    assert verdict.reason is reason or reason in verdict.reason
    caller.register_parameter("large", nn.Parameter(torch.empty(1, device="meta")))
    assert verify(caller.net, site, (caller, "net")).reason == UNTRIED  # a part on meta: not run
    assert type(caller.net[0]) is nn.Linear


def test_the_users_state_is_set_aside():
    class Sees(MLP):
        def forward(self, x):
            told.put(
                (
                    torch.is_grad_enabled(),
                    torch.is_inference_mode_enabled(),
                    torch.is_autocast_enabled("cpu"),
                    torch.ones(1).device.type,
                )
            )
            return super().forward(x)

    model, told = Sees(), SimpleQueue()  # of a list the verification puts back the contents
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert verify(model, Site("chain", "plain", "fc1", "act", "fc2")).reason is None
    seen = [told.get() for _ in range(told.qsize())]
    assert seen[0] == (False, False, False, "cpu")  # later runs have modes of their own
    assert {device for *_, device in seen} == {"cpu"}
    assert torch.is_grad_enabled()


def guarded(condition):
    """Return an MLP that clamps between layer and activation where a condition holds."""

    class Guarded(MLP):
        def forward(self, x):
            h = self.fc1(x)
            return self.fc2(self.act(h.clamp(-1e-3, 1e-3) if condition(h, x) else h))

    return Guarded()


@pytest.mark.parametrize(
    "condition",
    [
        lambda h, x: h.dtype == torch.float16,
        lambda h, x: h.dtype == torch.float64,
        lambda h, x: x.ndim == 2,
        lambda h, x: x.shape[0] == 1,
        lambda h, x: x.shape[-2] > 512,
        lambda h, x: torch.is_autocast_enabled("cpu"),
        lambda h, x: torch.is_inference_mode_enabled(),
        lambda h, x: torch.is_grad_enabled(),
        lambda h, x: not x.is_contiguous(),
    ],
)
def test_what_is_between_under_a_condition_is_seen(condition):
    assert "is not applied to the output of 'fc1'" in reasons(guarded(condition))
