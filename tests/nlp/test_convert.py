"""Starformers as Llamas, as plain PyTorch layers, and in folders with code."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from starlayers import ACTIVATIONS, StarBlock, StarMLP, get_activation, nlp, use_backend
from starlayers.coefficients.modules import RankStarMLP, SumMLP
from starlayers.functional import star_product
from starlayers.nlp import StarformerModel, from_llama, layers_starformer, to_llama
from starlayers.nlp import portable_starformer as portable
from starlayers.nlp.layers_starformer import RankMLP
from tests.helpers import FORMULAS
from tests.nlp.tiny import VARIANTS, config, decoder, encoder_config, ids, seq2seq

LLAMA = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **options})).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu_pytorch_tanh", "head_dim": 16},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 1e4,
            }
        },
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 1e4,
            }
        },
        {"attn_implementation": "eager"},
        {"hidden_act": "relu2"},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_a_random_llama_computes_the_same(options, dtype):
    theirs = llama(**options).to(dtype)
    ours = from_llama(theirs)
    assert ours.dtype == dtype
    tokens = ids(2, 9)
    with torch.no_grad(), use_backend("eager"):
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
        a = ours.generate(tokens, do_sample=False, max_new_tokens=6)
        b = theirs.generate(tokens, do_sample=False, max_new_tokens=6)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("silu", "silu"),
        ("swiglu", "silu"),
        ("gelu", "gelu"),
        ("gelu_tanh", "gelu_pytorch_tanh"),
        ("squared_relu", "relu2"),
        (None, "linear"),
        ("relu6", "relu6"),
    ],
)
def test_names_of_activations(ours, theirs):
    model = decoder(hidden_act=ours)
    there = to_llama(model)
    assert there.config.hidden_act == theirs
    back = from_llama(there)
    tokens = ids(2, 5)
    with torch.no_grad(), use_backend("eager"):
        logits = model(tokens).logits
        assert torch.equal(there(tokens).logits, logits)
        assert torch.equal(back(tokens).logits, logits)
    assert from_llama(llama(hidden_act="gelu_new")).config.hidden_act == "gelu_tanh"


def test_state_of_the_model_is_kept():
    theirs = llama(attn_implementation="eager", torch_dtype=torch.bfloat16).bfloat16().train()
    theirs.requires_grad_(False)
    ours = from_llama(theirs)
    assert ours.training
    assert ours.config._attn_implementation == "eager"
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in ours.parameters())
    assert ours.model.rotary_emb.inv_freq.dtype == theirs.model.rotary_emb.inv_freq.dtype
    assert ours.config.dtype == theirs.config.dtype
    assert not from_llama(theirs.eval()).training


def test_gradients_are_a_llamas_too():
    theirs = llama().train()
    ours = from_llama(theirs)
    assert ours.training
    tokens = ids(2, 9)
    ours(tokens, labels=tokens).loss.backward()
    theirs(tokens, labels=tokens).loss.backward()
    torch.testing.assert_close(
        ours.model.layers[0].ffn.mlp.f2.weight.grad,
        theirs.model.layers[0].mlp.up_proj.weight.grad,
        atol=1e-6,
        rtol=1e-5,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bit_identical(tied):
    model = decoder(tie_word_embeddings=tied, attention_bias=True)
    model.generation_config.max_new_tokens = 7
    back = from_llama(to_llama(model))
    assert back.config.to_dict() == model.config.to_dict()
    assert back.generation_config == model.generation_config
    ours, again = model.state_dict(), back.state_dict()
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[k], again[k]) for k in ours)
    assert back.model.embed_tokens.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied


def test_a_llama_saved_and_loaded_is_still_the_model(tmp_path):
    model = decoder()
    to_llama(model).save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    tokens = ids(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mlp_offset": 1.0}, "mlp_offset=1.0"),
        ({"mlp_rank": 2}, "mlp_rank=2"),
        ({"mlp_type": "sum"}, "mlp_type='sum'"),
        ({"attention_gate": "head"}, "attention_gate='head'"),
        ({"layer_types": ["star_conv", "attention"]}, "layer 0 of star_conv"),
    ],
)
def test_what_a_llama_has_not_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        to_llama(decoder(**options))


def test_other_models_are_refused():
    with pytest.raises(TypeError, match=r"got starlayers\.nlp\.\S+\.StarformerModel; if it was"):
        to_llama(StarformerModel(config()))
    with pytest.raises(TypeError, match=r"got starlayers\.nlp\.\S+\.StarformerForCausalLM"):
        from_llama(decoder())
    with pytest.raises(ValueError, match="unknown activation 'mish'"):
        from_llama(llama(hidden_act="mish"))
    with pytest.raises(ValueError, match="a Llama has no hidden_act='softplus'"):
        to_llama(decoder(hidden_act="softplus"))


def test_adapters_have_to_be_merged_first():
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), llama())
    with pytest.raises(ValueError, match=r"q_proj\S*: merge adapters and undo quantisation first"):
        from_llama(model)


def test_nothing_is_shared_with_the_source():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    theirs = llama(rope_parameters=rope)
    ours = from_llama(theirs)
    ours.generation_config.temperature = 0.3
    ours.config.rope_parameters["factor"] = 4.0
    assert theirs.generation_config.temperature != 0.3
    assert theirs.config.rope_parameters["factor"] == 2.0


# --- plain PyTorch layers of `portable_starformer` against those of the core


BUILT_IN = sorted({activation.name for activation in ACTIVATIONS.values()})


PORTABLE = {
    "star": (StarMLP, portable.StarMLP, {}),
    "offset": (StarMLP, portable.StarMLP, {"offset": 1.0}),
    "no-bias": (StarMLP, portable.StarMLP, {"bias": False, "recompute": True}),
    "sum": (SumMLP, portable.SumMLP, {}),
}


@pytest.mark.parametrize("act", [*BUILT_IN, None, "swiglu"])
@pytest.mark.parametrize("name", PORTABLE)
def test_portable_layers_are_the_cores(act, name):
    torch.manual_seed(0)
    core, plain, options = PORTABLE[name]
    ours = StarBlock(8, core(8, 24, act=act, **options), pre=torch.nn.LayerNorm(8))
    theirs = portable.StarBlock(8, plain(8, 24, act=act, **options), pre=torch.nn.LayerNorm(8))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("act", [*BUILT_IN, None, "swiglu"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_an_mlp_of_several_products_is_the_cores_in_another_layout(act, offset, monkeypatch):
    torch.manual_seed(0)
    options = {"act": act, "bias": True, "offset": offset, "recompute": False}
    theirs = RankMLP(8, 24, 3, **options)
    ours = RankStarMLP(8, 24, rank=3, **options)
    ours.load_state_dict(theirs.state_dict())  # rearranges the rows
    x = torch.randn(2, 3, 8)
    h = FORMULAS[get_activation(act).name](theirs.f1(x)) * (offset + theirs.f2(x))
    y = theirs(x)
    torch.testing.assert_close(y, theirs.g(h[..., :24] + h[..., 24:48] + h[..., 48:]))
    torch.testing.assert_close(ours(x), y)
    for name in ("star_product", "get_activation", "recomputed"):  # as without starlayers
        monkeypatch.setattr(layers_starformer, name, getattr(portable, name))
    assert torch.equal(theirs(x), y)
    theirs.recompute = True
    assert torch.equal(theirs(x), y)


def test_an_mlp_of_several_products_recomputes_on_the_backend_of_its_forward():
    torch.manual_seed(0)
    mlp = RankMLP(8, 24, 2, act="silu", bias=True, offset=0.0, recompute=True)
    x = torch.randn(3, 8, requires_grad=True)
    with use_backend("eager"):
        y = mlp(x)
    with use_backend("triton"):  # would refuse a star on a CPU
        (dx,) = torch.autograd.grad(y.sum(), x)
    mlp.recompute = False
    torch.testing.assert_close(dx, torch.autograd.grad(mlp(x).sum(), x)[0])


def test_a_portable_checkpoint_calls_twice_and_keeps_the_gradient():
    calls, x = [], torch.randn(3, requires_grad=True)
    y = portable.recomputed(lambda x: calls.append(1) or x.exp().sin(), x)
    assert len(calls) == 1
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert len(calls) == 2
    torch.testing.assert_close(dx, x.exp().cos() * x.exp())


def test_portable_activations_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="'cube' is not known without starlayers"):
        portable.get_activation("cube")


def test_activations_are_the_cores():
    x, y = torch.randn(50) * 4, torch.randn(50)
    assert set(portable._FUNCTIONS) | set(portable._ALIASES) == {None, *ACTIVATIONS}
    for name in (None, *ACTIVATIONS):
        ours, theirs = get_activation(name), portable.get_activation(name)
        assert theirs.name == (None if ours.name == "identity" else ours.name)
        torch.testing.assert_close(theirs.fn(x), ours.fn(x))
        torch.testing.assert_close(portable.star_product(x, y, name), star_product(x, y, name))


@pytest.mark.parametrize(
    ("ours", "theirs"), [(StarMLP, portable.StarMLP), (StarBlock, portable.StarBlock)]
)
def test_defaults_are_the_cores(ours, theirs):
    core = {n: p.default for n, p in inspect.signature(ours).parameters.items()}
    for name, parameter in inspect.signature(theirs).parameters.items():
        if name not in ("hidden", "mlp"):  # optional in the core
            assert parameter.default == core[name], name


def test_a_block_has_the_mlp_of_the_core():
    ours, theirs = StarBlock(8).mlp, portable.StarBlock(8, portable.StarMLP(8, 32)).mlp
    for name in ("act", "offset"):
        assert getattr(theirs, name) == getattr(ours, name), name
    assert theirs.g.weight.shape == ours.g.weight.shape
    assert [*theirs.state_dict()] == [*ours.state_dict()]


@pytest.mark.parametrize("post", [None, torch.nn.Tanh()])
@pytest.mark.parametrize("bias", [True, False])
def test_portable_block_with_and_without_parts(post, bias):
    torch.manual_seed(0)
    options = {"act": "gelu", "bias": bias}
    ours = StarBlock(8, StarMLP(8, 20, **options), post=post)
    theirs = portable.StarBlock(8, portable.StarMLP(8, 20, **options), post=post)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(theirs(x), ours(x))


# --- folders with code: they load without starlayers, and ordinary saves stay ordinary


WITHOUT_STARLAYERS = """
import sys
sys.modules["starlayers"] = None  # as if it were not installed
import json, torch, transformers
tokens, outputs = torch.tensor({tokens}), []
for auto, folder in {folders}:
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    assert model.__class__.__module__.startswith("transformers_modules"), model.__class__
    more = {{"decoder_input_ids": tokens}} if model.config.is_encoder_decoder else {{}}
    outputs.append(model(tokens, **more).logits.tolist())
print(json.dumps(outputs))
"""


def tagger(variant):
    torch.manual_seed(0)
    return nlp.StarformerEncoderForTokenClassification(encoder_config(**VARIANTS[variant])).eval()


def test_folders_with_code_load_where_starlayers_is_not_installed(tmp_path):
    makers = {
        "AutoModelForCausalLM": decoder,
        "AutoModelForSeq2SeqLM": seq2seq,
        "AutoModelForTokenClassification": tagger,
    }
    models = {
        (auto, variant): make(variant)
        for auto, make in makers.items()
        for variant in ("hybrid-gated", "plain")
    }
    folders = [(auto, str(tmp_path / auto / variant)) for auto, variant in models]
    for model, (_, folder) in zip(models.values(), folders, strict=True):
        nlp.save_with_code(model, folder)
    tokens = ids(2, 5)
    script = WITHOUT_STARLAYERS.format(tokens=tokens.tolist(), folders=folders)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = json.loads(done.stdout)
    for model, there in zip(models.values(), outputs, strict=True):
        more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            expected = model(tokens, **more).logits
        torch.testing.assert_close(torch.tensor(there), expected, atol=1e-5, rtol=1e-5)


def test_ordinary_saves_stay_ordinary(tmp_path):
    model = decoder()
    model.config.auto_map = {"AutoTokenizer": ["mine.Tokenizer", None]}
    nlp.save_with_code(model, tmp_path / "with")
    assert model.config.auto_map == {"AutoTokenizer": ["mine.Tokenizer", None]}
    del model.config.auto_map
    assert "auto_map" in json.loads((tmp_path / "with" / "config.json").read_text())
    model.save_pretrained(tmp_path / "without")
    assert not list((tmp_path / "without").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
    # where starlayers is imported, its own class loads the folder, code or no code
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    assert type(loaded) is type(model)
    loaded.save_pretrained(tmp_path / "again")  # without code, so without naming any
    named = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert named == {"AutoTokenizer": ["mine.Tokenizer", None]}
    with pytest.raises(ValueError, match=r"got torch\.\S+\.Linear"):
        nlp.save_with_code(torch.nn.Linear(2, 2), tmp_path)


def test_the_classes_are_as_before_even_after_an_error(tmp_path, monkeypatch):
    model = decoder()
    before = type(model)._auto_class, type(model.config)._auto_class

    def save(folder):
        now = type(model)._auto_class, type(model.config)._auto_class
        assert now == ("AutoModelForCausalLM", "AutoConfig")
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_pretrained", save)
    with pytest.raises(OSError, match="disk full"):
        nlp.save_with_code(model, tmp_path)
    assert (type(model)._auto_class, type(model.config)._auto_class) == before == (None, None)


def test_every_file_of_code_is_saved(tmp_path):
    package = os.path.dirname(nlp.__file__)
    code = {name for name in os.listdir(package) if name.endswith("_starformer.py")}
    assert len(code) == 5
    nlp.save_with_code(decoder(), tmp_path)
    assert {name for name in os.listdir(tmp_path) if name.endswith(".py")} == code
