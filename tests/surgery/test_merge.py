"""Grown and scaled models that become plain ones."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from starlayers import starify
from starlayers.surgery import merge, record_of, report
from tests.helpers import randn
from tests.surgery.small import IDS, MLP, SIZES, Gated, Net, Packed, bert, gpt2, llama, train_gates

TEXT = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def decoder(name, **options):
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**TEXT, **options})
    return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    kind = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(**sizes, **kind, vocab_size=99))


def two_towers():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision = {**sizes, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=TEXT, vision_config=vision)
    return Gemma3ForConditionalGeneration(config)


FAMILIES = {
    "llama": lambda: decoder("Llama"),
    "phi3": lambda: decoder("Phi3"),
    "t5": t5,
}
MORE = {
    "llama with biases, tied": lambda: decoder("Llama", mlp_bias=True, tie_word_embeddings=True),
    "qwen3": lambda: decoder("Qwen3"),
    "gemma3": lambda: decoder("Gemma3Text"),
    "mistral": lambda: decoder("Mistral"),
    "shared expert": lambda: decoder(
        "Qwen2Moe", num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=48
    ),
    "text and vision": two_towers,
}


def logits(model):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def off(actual, expected):
    """The largest difference beside the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def check_family(build, folder, grow):
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and norms
            nn.init.normal_(parameter, std=0.1)
    train_gates(starify(model, gate="scale", grow=grow), 0.2)
    expected, width = logits(model), model.config.get_text_config().to_dict()
    kind = type(model)
    assert merge(model) is model
    assert type(model) is kind
    assert off(logits(model), expected) <= 1e-6
    assert not [m for m in model.modules() if type(m).__module__.startswith("starlayers")]
    assert not {"star_mlp", "fusion_config"} & model.config.to_dict().keys()
    after = model.config.get_text_config().to_dict()
    changed = {name for name in width if width[name] != after.get(name)}
    assert changed - {"star_mlp", "fusion_config"} <= {
        "intermediate_size", "shared_expert_intermediate_size", "d_ff"
    }  # fmt: skip
    model.save_pretrained(folder)
    again, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again.eval()), logits(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_grown_model_becomes_a_wide_one(tmp_path, name):
    check_family(FAMILIES[name], tmp_path, 2)


@pytest.mark.hf
@pytest.mark.parametrize("grow", [1, 3])
@pytest.mark.parametrize("name", MORE)
def test_more_families(tmp_path, name, grow):
    check_family(MORE[name], tmp_path, grow)


@pytest.mark.hf
@pytest.mark.parametrize("name", ["Arcee", "Nemotron", "Starcoder2"])
def test_factors_of_plain_mlps_need_no_config(tmp_path, name):
    check_family(lambda: decoder(name), tmp_path, 0)


@pytest.mark.parametrize("build", [bert, gpt2])  # in two modules; weights (in, out)
def test_factors_of_a_scale_gate(build):
    model = train_gates(starify(build(), gate="scale"), 0.5)
    expected, keys = model(IDS).logits, set(build().state_dict())
    weights = [p for p in model.parameters() if p.ndim > 1]
    merge(model)
    assert off(model(IDS).logits, expected) <= 1e-6
    assert set(model.state_dict()) == keys
    kept = {id(p) for p in model.parameters()}
    assert all(id(p) in kept for p in weights)


WITHOUT_STARLAYERS = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "starlayers":
            raise ImportError("starlayers is not here")
sys.meta_path.insert(0, Refuse())
try:
    import starlayers
except ImportError:
    pass
else:
    raise SystemExit("it is here")
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert type(model).__name__ == "LlamaForCausalLM", type(model)
logits = model(torch.arange(14).reshape(2, 7)).logits
torch.save(logits, sys.argv[2])
"""


@pytest.mark.hf
def test_loading_without_starlayers(tmp_path):
    model = train_gates(starify(llama(), grow=1))
    expected = logits(model)
    merge(model).save_pretrained(tmp_path / "model")
    out = tmp_path / "logits.pt"
    program = [sys.executable, "-c", WITHOUT_STARLAYERS, str(tmp_path / "model"), str(out)]
    subprocess.run(program, check=True)
    assert off(torch.load(out), expected) <= 1e-6


# --- models without a config


@pytest.mark.parametrize("gate_last", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
def test_packed_halves(x, gate_last, rank):
    model = train_gates(starify(Packed(gate_last), grow=rank), 1.0)
    expected = model(x)
    merge(model)
    assert type(model) is Packed
    assert (model.both.out_features, model.down.in_features) == (32 * (1 + rank), 16 * (1 + rank))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_channels_are_appended_product_by_product(x):
    model = train_gates(starify(Gated("up"), grow=2))
    gate, up, down = (model.get_parameter(f"{n}.weight").clone() for n in ("gate", "up", "down"))
    f1, f2 = model.star_grown.f1.weight.clone(), model.star_grown.f2.weight.clone()
    merge(model)
    assert torch.equal(model.gate.weight, torch.cat([gate, f1[::2], f1[1::2]]))
    assert torch.equal(model.up.weight, torch.cat([up, f2[::2], f2[1::2]]))
    assert torch.equal(model.down.weight, torch.cat([down, down, down], 1))


def test_a_bias_on_the_second_branch_alone(x):
    model = Gated()
    model.up = nn.Linear(8, 16)
    expected = train_gates(starify(model, grow=1), 1.0)(x)
    torch.testing.assert_close(merge(model)(x), expected)
    other = Gated()
    other.gate = nn.Linear(8, 16)
    with pytest.raises(ValueError, match="up has no bias, and its grown products have"):
        merge(starify(other, grow=1))


def test_what_was_only_fused_or_never_trained_is_taken_out(x):
    net = Net(Gated(), MLP(), MLP())
    expected = net(x)
    starify(starify(net, mode="fuse"), gate="full")
    starify(net, recompute=True)
    merge(net)
    assert torch.equal(net(x), expected)
    assert report(net).replaced == []


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_sequences_and_dropout(x, dropout):
    def net():
        torch.manual_seed(0)
        layers = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8)
        return nn.Sequential(*layers)

    model = train_gates(starify(net(), gate="scale"), 1.0)
    outs = []
    for part in (model, merge(copy.deepcopy(model))):
        torch.manual_seed(1)
        outs.append(part(x))
    torch.testing.assert_close(*outs)


def test_convolutions():
    def net():
        return nn.Sequential(nn.Conv2d(4, 8, 1), nn.GELU(), nn.Conv2d(8, 4, 1))

    model, images = train_gates(starify(net(), gate="scale"), 1.0), randn(2, 4, 3, 3)
    expected = model(images)
    torch.testing.assert_close(merge(model)(images), expected)
    assert type(model[0]) is nn.Conv2d


def test_low_precision_rounds_once():
    model = starify(MLP().to(torch.bfloat16), gate="scale")
    nn.init.constant_(model.fc1.gate.weight, 2**-7)
    weight = model.fc2.weight.detach().float()
    merge(model)
    assert model.fc2.weight.dtype == torch.bfloat16
    assert torch.equal(model.fc2.weight, (weight * (1 + 2**-7)).to(torch.bfloat16))


# --- what stays


def test_parameters_mode_dtype_and_settings_stay():
    model = starify(Net(Gated(), Gated()).double(), grow=1).eval()
    own = dict(model.named_parameters())
    for name in ("gate", "up", "down"):
        for block in model.blocks:
            block.get_submodule(name).weight.requires_grad_(False)
    for p in model.blocks[0].star_grown.parameters():
        p.requires_grad_(False)
    own["blocks.0.gate.weight"].grad = torch.ones(16, 8).double()
    calls = []
    model.blocks[0].gate.register_forward_hook(lambda *call: calls.append(call[-1].shape))
    model.blocks[1].star_grown.register_forward_hook(lambda *call: None)
    with pytest.warns(UserWarning, match="^merge: ") as caught:
        merge(model)
    assert sorted(str(w.message) for w in caught) == [
        "merge: 1 MLPs, blocks.1.gate first: hooks on their gates are gone",
        "merge: 1 MLPs, blocks.1.gate first: requires_grad is that of their own layers now",
    ]
    after = dict(model.named_parameters())
    assert all(after[name] is own[name] for name in after)
    assert {(p.dtype, p.requires_grad, p.grad) for p in after.values()} == {
        (torch.float64, False, None)
    }
    assert not any(m.training for m in model.modules())
    model(randn(5, 8, dtype=torch.float64))
    assert calls == [(5, 32)]


def test_training_goes_on():
    model = train_gates(starify(Gated(), grow=1))
    merge(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = model.gate.weight.detach().clone()
    model(randn(5, 8)).square().sum().backward()
    optimizer.step()
    assert ((model.gate.weight - before).abs() > 0.01).all()


@pytest.mark.parametrize("grow", [0, 1])
def test_what_was_merged_without_gradients_can_be_trained(grow):
    model = train_gates(starify(Net(Gated(), MLP()), gate="scale", grow=grow))
    with torch.inference_mode():
        merge(model)
    model(randn(5, 8)).sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())


def test_an_optimizer_that_has_taken_steps_raises():
    model = starify(Gated(), grow=1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(randn(5, 8)).sum().backward()
    optimizer.step()
    merge(model)(randn(5, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="size of tensor"):
        optimizer.step()


def test_active_dropout_is_told(x):
    class Dropped(Gated):
        def __init__(self, p):
            super().__init__()
            self.drop = nn.Dropout(p)

        def forward(self, x):
            return self.down(self.drop(self.act(self.gate(x)) * self.up(x)))

    model = train_gates(starify(Dropped(0.5), grow=1)).eval()
    expected = model(x)
    with pytest.warns(UserWarning, match="dropout drops every product by itself now"):
        merge(model)
    torch.testing.assert_close(model(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(starify(Dropped(0.0), grow=1))


def test_no_random_number_is_drawn_and_no_buffer_changed():
    model = train_gates(starify(llama(), grow=1))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    merge(model)
    assert torch.equal(torch.rand(4), expected)


def test_on_the_meta_device():
    with torch.device("meta"):
        model = llama()
        starify(model, grow=1)
    merge(model)
    assert model.model.layers[1].mlp.gate_proj.weight.shape == (128, 32)
    assert {p.device.type for p in model.parameters()} == {"meta"}


# --- what is refused, and left as it was


def refused(model, message):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    record = record_of(model)
    with pytest.raises(ValueError, match=message):
        merge(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert record_of(model) == record


def test_plain_models_are_refused():
    with pytest.raises(ValueError, match=r"^merge: this MLP has no star layer of starify's"):
        merge(MLP())


@pytest.mark.parametrize("gate", ["full", "low_rank=2"])
def test_gates_that_depend_on_the_input_are_refused(gate):
    model = starify(Net(Gated(), MLP(), MLP()), gate=gate, grow=1)
    train_gates(model)
    refused(model, rf"^merge: blocks\.1\.fc1 has gate='{gate}', which depends on the input")


def test_some_layers_or_different_numbers_of_products_are_refused():
    part = starify(llama(), include="model.layers.1.mlp", grow=1)
    message = r"no LlamaConfig describes the merged model: model\.layers\.1\.mlp\.down_proj\.weight"
    refused(part, message + r" would be \(32, 128\)")
    assert part.config.intermediate_size == 64
    refused(starify(part, grow=2), r"no LlamaConfig describes the merged model: model\.layers\.")


def test_a_part_of_a_model_is_refused():
    model = starify(llama(), grow=1)
    refused(model.model.layers[0].mlp, "the width of this .* is in the LlamaConfig of the model")
    refused(model.model.layers[0], "the width of this .* is in the LlamaConfig of the model")
    y = logits(model)
    assert off(logits(merge(model)), y) <= 1e-6


def test_configs_of_other_libraries_are_refused():
    class Other(Net):
        config = {"width": 16}  # noqa: RUF012

        def save_pretrained(self):
            """Mark it as a model that others can load."""

    refused(
        starify(Other(Gated()), grow=1), "the config of Other is a dict and none of transformers"
    )


def test_shared_weights_are_refused():
    net = Net(Gated(), Gated())
    net.blocks[1].down.weight = net.blocks[0].down.weight
    refused(starify(net, grow=1), r"blocks\.0\.gate shares the weights of down with another layer")
    plain = MLP()
    plain.other = plain.fc2
    merge(train_gates(starify(plain, gate="scale")))  # one layer under two names
    plain = Net(MLP())
    plain.other = nn.Linear(16, 8)
    plain.other.weight = plain.blocks[0].fc2.weight
    message = r"blocks\.0\.fc1 shares the weights of fc2 with another layer"
    refused(train_gates(starify(plain, gate="scale")), message)


def test_an_mlp_that_is_used_twice_is_merged_once(x):
    mlp = Gated()
    net = train_gates(starify(Net(mlp, mlp), grow=1))
    expected = net(x)
    torch.testing.assert_close(merge(net)(x), expected)
    assert mlp.gate.out_features == 32


def test_a_norm_before_the_last_layer_is_refused():
    class Normed(MLP):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(16)

        def forward(self, x):
            return self.fc2(self.norm(self.act(self.fc1(x))))

    model = train_gates(starify(Normed(), gate="scale"))
    nn.init.zeros_(model.fc2.weight)  # would hide it
    refused(model, r"^merge: fc1 would compute something else, off by [01]")


def test_every_different_mlp_is_checked():
    class Squared(MLP):
        def __init__(self, squared, f=None):
            super().__init__()
            self.squared = squared
            self.f = f or (lambda h: h)

        def forward(self, x):
            h = self.f(self.act(self.fc1(x)))
            return self.fc2(h * h if self.squared else h)

    for odd in (Squared(True), Squared(False, torch.tanh)):
        net = train_gates(starify(Net(Squared(False), Squared(False), odd), gate="scale"))
        refused(net, r"^merge: blocks\.2\.fc1 would compute something else")


def test_noise_before_the_last_layer_is_refused():
    class Noisy(MLP):
        def forward(self, x):
            h = self.act(self.fc1(x))
            return self.fc2(h + torch.randn_like(h) if self.training else h)

    refused(train_gates(starify(Noisy(), gate="scale")), "fc1 would compute something else")


def test_a_stack_without_a_last_layer_is_refused():
    stack = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    starify(stack, gate="scale")
    nn.init.ones_(stack[2].gate.weight)
    refused(stack, "^merge: 2 has no last layer in the module that holds it")
    nn.init.ones_(stack[0].gate.weight)
    refused(stack, "^merge: 0 cannot be merged: its 2 is a StarProjection, no plain linear layer")


def test_layers_that_are_not_plain_are_refused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Gated()
    model.up = Doubled(8, 16, bias=False)
    refused(starify(model, grow=1), "its up is a Doubled, no plain linear layer")

    model = train_gates(starify(Gated(), grow=1))
    model.gate = nn.utils.parametrizations.weight_norm(model.gate)
    refused(model, "its gate is a ParametrizedLinear, no plain linear layer")


def test_adapters_are_refused():
    from peft import LoraConfig, get_peft_model

    model = train_gates(starify(llama(), grow=1))
    y = logits(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "gate_proj"]))
    refused(adapted, "has adapters, itself the first: call its merge_and_unload")
    refused(model, "has adapters, model.layers.0.self_attn.q_proj the first")
    assert off(logits(merge(adapted.merge_and_unload())), y) <= 1e-6
