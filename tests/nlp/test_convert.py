"""A silu Starformer is a Llama: exactly, in both directions."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from starlayers import use_backend
from starlayers.nlp import StarformerModel, from_llama, to_llama
from tests.nlp.tiny import config, decoder, ids

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
