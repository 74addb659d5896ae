"""Explanations of what star layers run, in words and as plans."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from starlayers import StarBlock, StarMLP, StarOp, explain, starify, use_backend
from starlayers.coefficients.modules import DynamicStarMLP, RankStarMLP, ScaledStarMLP, SumMLP
from starlayers.dispatch import Plan
from starlayers.vision import StarNet
from tests.helpers import randn

MANY = torch.zeros(80_000, 16)


def test_one_layer_is_one_sentence():
    assert str(explain(StarMLP(4), torch.ones(1, 4))) == (
        "runs eager: hidden activation of 64 bytes is small enough for eager"
    )
    assert str(explain(StarOp(4, 4), torch.ones(1, 4))) == (
        "runs eager: no Triton kernel for device 'cpu'"
    )
    assert str(explain(StarMLP(16), MANY)) == "runs fused: cpu"
    assert str(explain(nn.Linear(4, 4), torch.ones(1, 4))) == "no star layers"


def test_a_model_is_a_table_in_the_order_of_its_modules():
    model = nn.Sequential(StarBlock(16, pre=nn.LayerNorm(16)), nn.ReLU(), StarOp(16, 3))
    rows = explain(model, MANY)
    assert [(row.name, row.layer, row.plan.path) for row in rows] == [
        ("0.mlp", "StarMLP", "cpu"),
        ("2", "StarOp", "eager"),
    ]
    assert str(rows).splitlines() == [
        "0.mlp  StarMLP  runs fused: cpu",
        "2      StarOp   runs eager: no Triton kernel for device 'cpu'",
    ]


def test_plans_are_those_of_the_call():
    mlp = StarMLP(16)
    assert explain(mlp, MANY)[0].plan.weights is not None
    hidden = 300_000  # bytes enough for inference, not for training
    x = torch.zeros(hidden // 16, 16)
    assert explain(mlp, x)[0].plan == mlp.plan(x)
    with torch.no_grad():
        assert explain(mlp, x)[0].plan.path == mlp.plan(x).path == "cpu"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert explain(mlp, MANY)[0].plan.reason == "autocast is on"
    with use_backend("eager"):
        assert explain(mlp, MANY)[0].plan.reason == "the eager backend was asked for"


def test_a_backend_that_cannot_serve_is_told_and_not_raised():
    with use_backend("triton"):
        rows = explain(nn.Sequential(StarMLP(16)), MANY)
    assert rows[0].plan.path == "raises"
    assert not rows[0].plan.fused
    assert str(rows).startswith(
        "0  StarMLP  raises: the triton backend cannot serve this StarMLP: "
    )


class Scaled(nn.Linear):
    """Linear layer with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def with_lora():
    config = LoraConfig(target_modules=["0.f1"])
    return get_peft_model(nn.Sequential(StarMLP(16)), config)


def quantised():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(StarMLP(16)), {nn.Linear})


def changed(change):
    def make():
        mlp = StarMLP(16)
        change(mlp)
        return mlp

    return make


WORDS = {
    "LoRA": (with_lora, "f1 is an adapter, peft.tuners.lora.layer.Linear; merge it to fuse"),
    "quantised": (
        quantised,
        "f1 is quantised, torch.ao.nn.quantized.dynamic.modules.linear.Linear",
    ),
    "hooked": (
        changed(lambda m: m.g.register_forward_hook(lambda *_: None)),
        "g has hooks",
    ),
    "parametrised": (
        changed(lambda m: nn.utils.parametrizations.weight_norm(m.f2)),
        "f2 is parametrised",
    ),
    "weight of a hook": (changed(lambda m: nn.utils.spectral_norm(m.f2)), "f2 has hooks"),
    "subclass": (
        changed(lambda m: setattr(m, "f2", Scaled(16, 64))),
        "f2 is a Scaled, not nn.Linear",
    ),
    "identity": (changed(lambda m: setattr(m, "g", nn.Identity())), "g is an Identity, not"),
    "own forward": (
        changed(lambda m: setattr(m.f1, "forward", lambda x: x.repeat(1, 4))),
        "f1 has a forward that was replaced",
    ),
    "sum": (lambda: SumMLP(16), "SumMLP computes its products by a method of its own"),
    "scaled": (lambda: ScaledStarMLP(16), "ScaledStarMLP has factors of its own; fold() makes it"),
    "dynamic": (lambda: DynamicStarMLP(16), "DynamicStarMLP computes its products"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", WORDS)
def test_reasons_tell_apart_what_is_in_the_way(case):
    make, words = WORDS[case]
    (row,) = explain(make(), MANY)
    assert words in row.plan.reason


def test_products_of_a_rank_layer_have_a_plan():
    (row,) = explain(RankStarMLP(16), MANY)
    assert (row.name, row.layer) == ("star", "StarOp")


def test_starified_models():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 50}
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **sizes))
    ids = torch.ones(1, 12, dtype=torch.long)
    fused = explain(starify(llama, mode="fuse"), ids)
    assert [(row.name, row.layer) for row in fused] == [
        ("model.layers.0.mlp", "StarLlamaMLP"),
        ("model.layers.1.mlp", "StarLlamaMLP"),
    ]
    assert all("small enough for eager" in row.plan.reason for row in fused)
    plain = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    (row,) = explain(starify(plain), MANY)
    assert (row.layer, row.plan.reason) == (
        "StarProjection",
        "the model's own activation is kept, to the last bit",
    )


def test_a_block_that_runs_fused_hides_its_parts():
    net = StarNet(8, (1,), stage_strides=(2,), num_classes=3)
    rows = explain(net.eval(), randn(1, 3, 32, 32))
    names = ["stem", "stages.0.0", "stages.0.1", "stages.0.1.mlp"]
    assert [row.name for row in rows] == names
    block = net.stages[0][1]

    def whole(*_) -> Plan:
        return Plan("block")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(block), "plan", whole)
        *convolutions, row = str(explain(net, randn(1, 3, 32, 32))).splitlines()
    assert row == "stages.0.1  StarBlock2d  runs fused: block"
    assert [line.split()[:2] for line in convolutions] == [
        ["stem", "ConvNorm"],
        ["stages.0.0", "ConvNorm"],
    ]


class Inner(nn.Module):
    """Star MLP that is called in a context of the model's own."""

    def __init__(self, context):
        super().__init__()
        self.mlp, self.context = StarMLP(16), context

    def forward(self, x):
        with self.context():
            return self.mlp(x)


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "autocast is on"),
        (lambda: use_backend("eager"), "the eager backend was asked for"),
        (lambda: use_backend("cpu"), ""),
        (torch.no_grad, ""),
    ],
)
def test_contexts_inside_of_a_model_count(context, words):
    (row,) = explain(Inner(context), torch.zeros(20_000, 16))
    assert row.plan.reason == words
    assert row.plan.path == ("eager" if words else "cpu")


def test_a_layer_that_is_called_twice_has_a_row_for_each_plan():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = StarMLP(16)

        def forward(self, x):
            return self.mlp(x[:4]), self.mlp(x), self.mlp(x[:4])

    rows = explain(Twice(), MANY)
    assert [(row.name, row.plan.path) for row in rows] == [("mlp", "eager"), ("mlp", "cpu")]


def test_a_pending_backward_and_replaced_buffers_stay_as_they_were():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mlp = nn.BatchNorm1d(4), StarMLP(4)
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x):
            self.n = self.n + 1
            return self.mlp(self.norm(x))

    model, x = Counts().train(), randn(3, 4)
    y = model(x)
    kept = dict(model.named_buffers())
    explain(model, x)
    assert all(b is kept[name] for name, b in model.named_buffers())
    y.sum().backward()
    assert model.n == 1


def test_other_methods_called_plan_are_left_alone():
    class Planner(nn.Module):
        def plan(self, horizon):
            raise AssertionError(horizon)

        def forward(self, x):
            return x

    assert str(explain(nn.Sequential(Planner(), StarMLP(4)), torch.ones(1, 4))).startswith("1  ")


def test_only_models_are_explained():
    with pytest.raises(TypeError, match="explain needs a model or a layer, got a int"):
        explain(3, MANY)


def test_explaining_changes_nothing():
    net = StarNet(8, (1,), stage_strides=(2,), num_classes=3, drop_rate=0.5).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    explain(net, randn(2, 3, 32, 32))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_layers_that_are_not_called_say_so():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = StarMLP(4), StarMLP(4)

        def forward(self, x, *, scale):
            return scale * self.used(x)

    rows = explain(Half(), torch.ones(2, 4), scale=2.0)
    assert rows[1].name == "unused"
    assert rows[1].plan.reason == "not called as a module with these inputs"


def test_hooks_are_removed_when_the_model_fails():
    mlp = StarMLP(4)
    with pytest.raises(ValueError, match="expects 4 input features"):
        explain(mlp, torch.ones(2, 5))
    assert not mlp._forward_pre_hooks


def test_a_forward_of_other_arguments_is_told_and_not_raised():
    class Twice(StarMLP):
        def forward(self, x, *, times):
            return times * super().forward(x)

    (row,) = explain(Twice(4), torch.ones(2, 4), times=2)
    assert str(row.plan).startswith("unknown: its forward takes other arguments than its plan")
