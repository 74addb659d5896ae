"""Fused MLPs whose layers are quantised: served, trained under LoRA, reported and refused."""

import copy

import pytest
import torch
from torch import nn

from starlayers import starify, use_backend
from starlayers.kernels import registration
from starlayers.surgery import report, revert
from tests.surgery.small import IDS, SIZES, Gated

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:torch.quantize_per"),
]


def llama(dtype=torch.float32):
    """A Llama wide enough for blocks of 32 and 64 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval().to(dtype)


def torchao(config, dtype=torch.float32):
    from torchao import quantization

    model = llama(dtype)
    quantization.quantize_(model, getattr(quantization, config)())
    return model


def with_layers(make):
    """A Llama with other layers in its MLPs."""
    model = llama()
    for layer in model.model.layers:
        for name in PROJECTIONS:
            setattr(layer.mlp, name, make(getattr(layer.mlp, name)))
    return model


def bitsandbytes(kind, **options):
    from bitsandbytes import nn as bnb

    def make(old):
        new = getattr(bnb, kind)(old.in_features, old.out_features, bias=False, **options)
        new.load_state_dict(old.state_dict())
        return new.to("cpu")

    return with_layers(make)


class QuantLinear(nn.Module):
    """Linear layer as loaders of GPTQ and AWQ make it: no tensor named `weight`."""

    def __init__(self, old):
        super().__init__()
        self.in_features, self.out_features, self.bias = old.in_features, old.out_features, None
        self.register_buffer("qweight", (old.weight.detach() * 100).round().to(torch.int32))

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 100)


def dynamic():
    return torch.ao.quantization.quantize_dynamic(llama(), {nn.Linear}, dtype=torch.qint8)


#: name -> quantised model, what the report says of its first layer, and why it cannot grow
MODELS = {
    "torchao int8": (
        lambda: torchao("Int8WeightOnlyConfig"),
        "gate_proj has a weight of type Int8Tensor",
        "Linear has a weight of type Int8Tensor",
    ),
    "torchao int8, bfloat16": (
        lambda: torchao("Int8WeightOnlyConfig", torch.bfloat16),
        "gate_proj has a weight of type Int8Tensor",
        "Linear has a weight of type Int8Tensor",
    ),
    "torchao int8 dynamic": (
        lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
        "gate_proj has a weight of type Int8Tensor",
        "Linear has a weight of type Int8Tensor",
    ),
    "torchao int4, dynamic": (  # weight-only int4 needs another package on a CPU
        lambda: torchao("Int8DynamicActivationIntxWeightConfig"),
        "gate_proj has a weight of type IntxUnpackedToInt8Tensor",
        "Linear has a weight of type IntxUnpackedToInt8Tensor",
    ),
    "bitsandbytes 8 bit": (
        lambda: bitsandbytes("Linear8bitLt", has_fp16_weights=False),
        "gate_proj is quantised, bitsandbytes.nn.modules.Linear8bitLt",
        "Linear8bitLt has a weight of type Int8Params",
    ),
    "bitsandbytes 4 bit": (
        lambda: bitsandbytes("Linear4bit", quant_type="nf4"),
        "gate_proj is quantised, bitsandbytes.nn.modules.Linear4bit",
        "Linear4bit has a weight of type Params4bit",
    ),
    "torch.ao dynamic": (
        dynamic,
        "gate_proj is quantised, torch.ao.nn.quantized.dynamic.modules.linear.Linear",
        "Linear has no weight tensor: quantised?",
    ),
    "no weight tensor": (
        lambda: with_layers(QuantLinear),
        f"gate_proj is quantised, {__name__}.QuantLinear",
        "QuantLinear has no weight tensor: quantised?",
    ),
}

models = pytest.mark.parametrize("name", MODELS)
trained = pytest.mark.parametrize(
    "name", ["torchao int8", "bitsandbytes 8 bit", "bitsandbytes 4 bit", "no weight tensor"]
)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@models
def test_a_fused_quantised_model_computes_what_it_did(name):
    make, reason, _ = MODELS[name]
    model = make()
    kind, expected = type(model.model.layers[0].mlp), logits(model)
    (row,) = report(model).rows
    assert (row.state, row.detail) == ("is a star", "")
    keys = list(model.state_dict())
    starify(model, mode="fuse")
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), expected)
    (row,) = report(model).rows
    no_kernel = "its product alone: no Triton kernel for device 'cpu'"
    assert (row.state, row.detail) == ("eager", f"silu, {reason}; {no_kernel}")
    revert(model)
    assert type(model.model.layers[0].mlp) is kind
    assert torch.equal(logits(model), expected)


@models
def test_growth_is_refused_by_its_own_reason(name):
    make, _, reason = MODELS[name]
    model = make()
    with pytest.raises(ValueError, match="it cannot grow: " + reason.replace("?", r"\?")) as error:
        starify(model, grow=1)
    assert "starify before quantising" in str(error.value)
    assert "mode='fuse' adds no parameter and serves it" in str(error.value)
    starify(model, mode="fuse")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="gate_proj cannot grow: " + reason.replace("?", r"\?")):
        starify(model, grow=1)
    assert list(model.state_dict()) == keys
    assert model.model.layers[0].mlp.star.grown == 0


def test_plain_mlps_are_not_blamed_for_their_weights_when_fusing():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="its 1 MLPs are plain, without a second branch to fuse"):
        starify(model, mode="fuse")
    with pytest.raises(ValueError, match="weight of type Int8Tensor: starify before quantising"):
        starify(model)


@pytest.mark.parametrize("mode", ["star", "fuse"])
def test_starified_then_quantised(mode):
    """The order that gates need: a quantiser takes all linear layers, the gates among them."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, plain = (nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in "ab")
    plain.load_state_dict(model.state_dict())
    x = torch.randn(3, 32)
    starify(model)
    for part in (model, plain):
        quantize_(part, Int8WeightOnlyConfig())
    if mode == "fuse":
        starify(model, mode="fuse")
    assert torch.equal(model(x), plain(x))


# --- adapters


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)


def training(model):
    """Losses of some steps, and the gradients of the first."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(parameters.values(), 1e-2)
    losses, gradients = [], {}
    for _ in range(4):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        gradients = gradients or {n: p.grad.clone() for n, p in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, gradients


@trained
@pytest.mark.parametrize("recompute", [False, True])
def test_lora_on_a_fused_quantised_model_trains_as_on_the_unfused(name, recompute):
    make, _, _ = MODELS[name]
    losses, gradients = training(adapted(make()))
    assert losses[-1] < losses[0] - 0.05
    options = {"mode": "fuse", "recompute": recompute}
    for model in (adapted(starify(make(), **options)), starify(adapted(make()), **options)):
        (row,) = report(model).rows
        assert row.state == "eager"
        actual = training(model)
        assert actual[0] == losses
        assert actual[1].keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert torch.equal(actual[1][key], gradient), key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["8 bit", "4 bit", "torchao"])
def test_models_that_transformers_quantises(kind, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    config = {
        "8 bit": BitsAndBytesConfig(load_in_8bit=True),
        "4 bit": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        "torchao": TorchAoConfig(Int8WeightOnlyConfig()),
    }[kind]
    llama().save_pretrained(tmp_path)
    options = {"device_map": "cpu", "dtype": torch.float32}

    def load():
        cls = AutoModelForCausalLM
        quantised = copy.deepcopy(config)
        return cls.from_pretrained(tmp_path, quantization_config=quantised, **options).eval()

    expected = logits(load())
    assert torch.equal(logits(starify(load(), mode="fuse")), expected)
    losses, gradients = training(adapted(load()))
    for model in (adapted(starify(load(), mode="fuse")), starify(adapted(load()), mode="fuse")):
        actual = training(model)
        assert actual[0] == losses
        assert all(torch.equal(actual[1][key], gradients[key]) for key in gradients)


# --- the kernel, in Triton's interpreter


@pytest.mark.interpret
@models
def test_the_kernel_computes_the_product(name):
    assert registration.INTERPRET
    make, _, _ = MODELS[name]
    model = make()
    mlp = starify(copy.deepcopy(model), mode="fuse").model.layers[0].mlp
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    x = x.to(next(model.parameters()).dtype)
    with torch.no_grad():
        expected = model.model.layers[0].mlp(x)
        with use_backend("triton"):
            plan = mlp.star_plan(x)
            actual = mlp(x)
    assert (plan.path, plan.reason) == ("star", "")
    size = expected.abs().max()
    rounding = 2e-2 if "bfloat16" in name or "dynamic" in name or "8 bit" in name else 1e-5
    assert (actual - expected).abs().max() <= rounding * size


@pytest.mark.interpret
@trained
def test_lora_trains_by_the_kernel(name):
    make, _, _ = MODELS[name]
    losses, gradients = training(adapted(make()))
    with use_backend("triton"):
        actual = training(adapted(starify(make(), mode="fuse")))
    torch.testing.assert_close(actual[0][0], losses[0], rtol=1e-3, atol=0)
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            actual[1][key], gradient, rtol=0, atol=2e-2 * float(gradient.abs().max()) + 1e-7
        )


# --- verified once


def verified(monkeypatch):
    """The classes of the MLPs that are verified from now on."""
    from starlayers.surgery import verify as module

    seen, own = [], module.verify_gated
    monkeypatch.setattr(
        module, "verify_gated", lambda owner, *args: seen.append(type(owner)) or own(owner, *args)
    )
    monkeypatch.setattr(module, "_gated", {})
    return seen


class Numbered(Gated):
    """MLP that knows the number of its layer, as Gemma 3n's do, and never reads it."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.gate = QuantLinear(self.gate)


class ReadsItsNumber(Numbered):
    def forward(self, x):
        return super().forward(x) * (1 if self.layer_idx < 2 else self.layer_idx)


def factor_of(mlp):
    return getattr(mlp, "layer" + "_idx") + 1


class ReadsItsNumberElsewhere(Numbered):
    def forward(self, x):
        return super().forward(x) * (1 if factor_of(self) < 3 else 2)


def test_mlps_that_differ_in_what_is_not_read_are_verified_once(monkeypatch):
    seen = verified(monkeypatch)
    model = nn.ModuleList(Numbered(i) for i in range(5))
    starify(model, mode="fuse")
    assert seen == [Numbered]
    assert [row.state for row in report(model).rows] == ["eager"] * 5


@pytest.mark.parametrize("kind", [ReadsItsNumber, ReadsItsNumberElsewhere])
def test_what_is_read_decides(monkeypatch, kind):
    seen = verified(monkeypatch)
    model = nn.ModuleList(kind(i) for i in range(4))
    plain = copy.deepcopy(model)
    starify(model, mode="fuse")
    assert seen == [kind] * 4
    x = torch.randn(2, 8)
    for star, own in zip(model, plain):
        torch.testing.assert_close(star(x), own(x))
