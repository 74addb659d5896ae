"""Configurations: defaults, checks, plans, and the effect of every field."""

import dataclasses
import inspect
from functools import partial

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from starlayers import nlp
from starlayers.nlp.configuration_starformer import StarformerConfig
from starlayers.nlp.layers_starformer import (
    StarConv,
    StarformerAttention,
    StarformerLayer,
)
from tests.nlp.tiny import (
    SIZES,
    config,
    decoder,
    encoder_config,
    ids,
    seq2seq,
    seq2seq_config,
)

# --- defaults

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "hidden_act": "silu",
    "mlp_type": "star",
    "mlp_rank": 1,
    "mlp_offset": 0.0,
    "mlp_recompute": False,
    "mlp_bias": False,
    "attention_gate": "none",
    "attention_gate_act": "sigmoid",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "layer_types": ["full_attention"] * 12,
    "conv_kernel_size": 3,
    "conv_act": None,
    "conv_bias": False,
    "hidden_dropout": 0.0,
    "classifier_dropout": None,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ_DEFAULTS = {
    "is_encoder_decoder": True,
    "encoder_layers": 12,
    "encoder_layer_types": ["full_attention"] * 12,
    "decoder_start_token_id": 1,
}


@pytest.mark.parametrize(
    ("config_class", "own"),
    [
        (nlp.StarformerConfig, {}),
        (nlp.StarformerEncoderConfig, {"classifier_pooling": "mean"}),
        (nlp.StarformerSeq2SeqConfig, SEQ2SEQ_DEFAULTS),
    ],
    ids=["decoder", "encoder", "seq2seq"],
)
def test_defaults(config_class, own):
    made, expected = config_class(), DEFAULTS | own
    assert {name: getattr(made, name) for name in expected} == expected
    assert set(expected) <= {field.name for field in dataclasses.fields(config_class)}


def test_every_field_has_a_pinned_default():
    own = {n for n, kind in StarformerConfig.__annotations__.items() if "ClassVar" not in str(kind)}
    assert own == set(DEFAULTS)


def test_class_attributes():
    decoder, encoder, seq2seq = (
        nlp.StarformerConfig,
        nlp.StarformerEncoderConfig,
        nlp.StarformerSeq2SeqConfig,
    )
    assert (decoder.model_type, decoder.causal) == ("starformer", True)
    assert (encoder.model_type, encoder.causal) == ("starformer_encoder", False)
    assert (seq2seq.model_type, seq2seq.causal) == ("starformer_seq2seq", True)
    assert decoder.keys_to_ignore_at_inference == ["past_key_values", "cache"]
    assert seq2seq.keys_to_ignore_at_inference == ["past_key_values", "cache"]
    assert encoder.keys_to_ignore_at_inference == []


def test_defaults_of_the_layers():
    def defaults(function):
        empty = inspect.Parameter.empty
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not empty}

    assert defaults(StarformerAttention) == {"causal": True}
    assert defaults(StarConv) == {"causal": True}
    assert defaults(StarformerLayer) == {"causal": True, "cross_attention": False}


@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size"),
    [(8, 64), (16, 64), (60, 128), (64, 192), (84, 256), (100, 256), (768, 2048), (1024, 2752)],
)
@pytest.mark.parametrize("mlp_type", ["star", "plain"])
def test_default_intermediate_size(hidden_size, intermediate_size, mlp_type):
    made = StarformerConfig(hidden_size=hidden_size, num_attention_heads=2, mlp_type=mlp_type)
    assert made.intermediate_size == intermediate_size


def test_fields_that_follow_others():
    made = seq2seq_config(num_hidden_layers=3, num_key_value_heads=None, bos_token_id=7)
    assert (made.num_key_value_heads, made.head_dim) == (4, 8)
    assert made.encoder_layer_types == made.layer_types == ["full_attention"] * 3
    assert (made.encoder_layers, made.decoder_start_token_id) == (3, 7)
    made = seq2seq_config(encoder_layers=1, decoder_start_token_id=5, head_dim=6)
    assert made.encoder_layer_types == ["full_attention"]
    assert (made.encoder_layers, made.decoder_start_token_id, made.head_dim) == (1, 5, 6)


def test_names_of_layer_types():
    names = ["attention", "full_attention", "star_conv", "conv", "linear_attention"]
    made = config(num_hidden_layers=5, layer_types=names)
    assert made.layer_types == ["full_attention"] * 2 + ["conv"] * 3
    made.num_hidden_layers = 4
    with pytest.raises(StrictDataclassError, match="equal to the number of `layer_types`"):
        made.validate()


# --- checks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_attention_heads": 5},
            "hidden_size=32 is no multiple of num_attention_heads=5; give head_dim",
        ),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads=4 is no multiple of num_key_value_heads=3",
        ),
        ({"head_dim": 5}, "even head size, got 5"),
        ({"hidden_size": 12}, "even head size, got 3"),
        ({"mlp_type": "swish"}, "unknown mlp_type 'swish', choose one of star, sum, plain"),
        (
            {"attention_gate": "yes"},
            "unknown attention_gate 'yes', choose one of none, head, channel",
        ),
        ({"layer_types": ["attention"]}, "1 layer_types for num_hidden_layers=2"),
        ({"layer_types": ["attention"] * 3}, "3 layer_types for num_hidden_layers=2"),
        (
            {"layer_types": ["mamba", "attention"]},
            r"unknown layer_types \['mamba'\], choose from 'attention' and 'star_conv'",
        ),
        (
            {"layer_types": ["star_conv"] * 2},
            "layer_types needs one 'attention' layer at least: a decoder's cache counts its",
        ),
        ({"mlp_type": "sum", "mlp_rank": 2}, "mlp_type='sum' has no products for mlp_rank=2"),
        ({"mlp_type": "sum", "mlp_offset": 1.0}, "mlp_type='sum' .* mlp_offset=1.0"),
        ({"mlp_type": "plain", "mlp_rank": 2}, "no second branch for mlp_rank=2"),
        ({"mlp_type": "plain", "mlp_offset": 1.0}, "no second branch for .*mlp_offset=1.0"),
        ({"mlp_type": "plain", "mlp_recompute": True}, "no second branch for .*mlp_recompute=True"),
    ],
)
@pytest.mark.parametrize("config_class", [StarformerConfig, nlp.StarformerSeq2SeqConfig])
def test_errors(config_class, options, message):
    options = SIZES | {"num_key_value_heads": None} | options
    with pytest.raises(ValueError, match=f"^{config_class.__name__}: .*{message}"):
        config_class(**options)


def test_errors_of_the_encoder():
    for build in (encoder_config, seq2seq_config):
        with pytest.raises(ValueError, match="needs an odd conv_kernel_size, got 4"):
            build(layer_types=["star_conv", "attention"], conv_kernel_size=4)
    with pytest.raises(ValueError, match=r"unknown classifier_pooling 'max', .* one of mean, bos"):
        encoder_config(classifier_pooling="max")
    with pytest.raises(ValueError, match="1 encoder_layer_types for encoder_layers=2"):
        seq2seq_config(encoder_layer_types=["attention"])
    with pytest.raises(ValueError, match=r"unknown encoder_layer_types \['mamba', 's4'\]"):
        seq2seq_config(encoder_layer_types=["mamba", "s4"])


def test_what_is_allowed():
    conv = ["star_conv", "star_conv"]
    assert encoder_config(layer_types=conv).layer_types == ["conv", "conv"]
    assert seq2seq_config(encoder_layer_types=conv).encoder_layer_types == ["conv", "conv"]
    assert config(num_hidden_layers=0, layer_types=[]).layer_types == []
    assert config(layer_types=["conv", "attention"], conv_kernel_size=4).conv_kernel_size == 4
    assert encoder_config(conv_kernel_size=4).conv_kernel_size == 4  # without a star_conv layer
    assert config(hidden_size=30, head_dim=8).head_dim == 8
    assert config(mlp_type="sum", mlp_recompute=True).mlp_recompute is True
    assert config(mlp_rank=2, mlp_offset=1.0, mlp_recompute=True).mlp_rank == 2


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="unknown activation 'silly'"):
        decoder(hidden_act="silly")


# --- parallel plans

ATTENTION_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
GATE_PLAN = {"layers.*.self_attn.gate_proj": "colwise"}
PLAIN_PLAN = {"layers.*.ffn.mlp.f1": "colwise", "layers.*.ffn.mlp.g": "rowwise"}
STAR_PLAN = PLAIN_PLAN | {"layers.*.ffn.mlp.f2": "colwise"}


@pytest.mark.parametrize("build", [config, encoder_config])
def test_tensor_parallel_plan(build):
    # transformers 5.17 adds "embed_tokens" where embeddings are tied
    tied = build().base_model_tp_plan
    assert set(tied) - {"embed_tokens"} == set(ATTENTION_PLAN | STAR_PLAN)
    build = partial(build, tie_word_embeddings=False)
    assert build().base_model_tp_plan == ATTENTION_PLAN | STAR_PLAN
    assert build(attention_gate="head").base_model_tp_plan == (
        ATTENTION_PLAN | GATE_PLAN | STAR_PLAN
    )
    assert build(attention_gate="channel", mlp_rank=2).base_model_tp_plan == (
        ATTENTION_PLAN | GATE_PLAN
    )
    assert build(mlp_type="plain").base_model_tp_plan == ATTENTION_PLAN | PLAIN_PLAN
    assert build(mlp_type="sum").base_model_tp_plan == ATTENTION_PLAN | STAR_PLAN
    # the plan of the class stays whole
    assert type(build()).base_model_tp_plan == ATTENTION_PLAN | GATE_PLAN | STAR_PLAN


def test_tensor_parallel_plan_of_an_encoder_decoder():
    def both_sides(attention, mlp):
        sides = {
            f"{s}.{n}": v for s in ("encoder", "decoder") for n, v in (attention | mlp).items()
        }
        cross = {f"decoder.{n.replace('self_attn', 'cross_attn')}": v for n, v in attention.items()}
        embeddings = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
        return sides | cross | dict.fromkeys(embeddings, "embedding_rowwise")

    build = partial(seq2seq_config, tie_word_embeddings=False)
    assert build().base_model_tp_plan == both_sides(ATTENTION_PLAN, STAR_PLAN)
    assert build(attention_gate="head", mlp_rank=2).base_model_tp_plan == both_sides(
        ATTENTION_PLAN | GATE_PLAN, {}
    )
    assert build(mlp_type="plain").base_model_tp_plan == both_sides(ATTENTION_PLAN, PLAIN_PLAN)


def test_pipeline_and_fsdp_plans():
    plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    assert config().base_model_pp_plan == encoder_config().base_model_pp_plan == plan
    assert seq2seq_config().base_model_pp_plan is None
    assert seq2seq_config().base_model_fsdp_plan == {
        "shared": "free_full_weight",
        "encoder.layers.*": "free_full_weight",
        "encoder.norm": "keep_full_weight",
        "decoder.layers.*": "free_full_weight",
        "decoder.norm": "keep_full_weight",
    }
    heads = nlp.StarformerForCausalLM, nlp.StarformerForMaskedLM
    for head in (*heads, nlp.StarformerForConditionalGeneration):
        assert head._tp_plan == {"lm_head": "colwise_gather_output"}
        assert head._fsdp_plan == {"lm_head": "keep_full_weight"}
    for head in heads:
        assert head._pp_plan == {"lm_head": (["hidden_states"], ["logits"])}


def test_a_joint_plan_names_each_module_once():
    model = seq2seq(attention_gate="head")
    parts = {name for name, _ in model.named_modules()}
    assert "model.decoder.layers.0.cross_attn.gate_proj" in parts
    plan = {"lm_head"} | {f"model.{name}" for name in model.config.base_model_tp_plan}
    assert set(model.tp_plan) == plan
    for side in (model.model.encoder, model.model.decoder):
        plans = (side._tp_plan, side._pp_plan, side._ep_plan, side._fsdp_plan)
        assert plans == ({}, {}, {}, {})


# --- the effect of every field

SHAPES = {  # option -> parameter of the first layer (or the model) -> its shape, None for absent
    "vocab_size=50": {"embed_tokens.weight": (50, 32)},
    "hidden_size=16": {"embed_tokens.weight": (99, 16), "norm.weight": (16,)},
    "intermediate_size=20": {"layers.0.ffn.mlp.f1.weight": (20, 32)},
    "num_hidden_layers=1": {
        "layers.0.ffn.mlp.g.weight": (32, 48),
        "layers.1.ffn.mlp.g.weight": None,
    },
    "num_attention_heads=2": {
        "layers.0.self_attn.q_proj.weight": (32, 32),
        "layers.0.self_attn.k_proj.weight": (32, 32),
    },
    "num_key_value_heads=1": {
        "layers.0.self_attn.q_proj.weight": (32, 32),
        "layers.0.self_attn.k_proj.weight": (8, 32),
        "layers.0.self_attn.v_proj.weight": (8, 32),
    },
    "head_dim=6": {
        "layers.0.self_attn.q_proj.weight": (24, 32),
        "layers.0.self_attn.v_proj.weight": (12, 32),
        "layers.0.self_attn.o_proj.weight": (32, 24),
    },
    "mlp_type='plain'": {
        "layers.0.ffn.mlp.f1.weight": (48, 32),
        "layers.0.ffn.mlp.f2.weight": None,
        "layers.0.ffn.mlp.g.weight": (32, 48),
        "layers.0.ffn.mlp.g.bias": None,
    },
    "mlp_type='plain', mlp_bias=True": {
        "layers.0.ffn.mlp.f1.bias": (48,),
        "layers.0.ffn.mlp.g.bias": (32,),
    },
    "mlp_rank=3": {
        "layers.0.ffn.mlp.f1.weight": (144, 32),
        "layers.0.ffn.mlp.f2.weight": (144, 32),
        "layers.0.ffn.mlp.g.weight": (32, 48),
    },
    "mlp_bias=True": {
        "layers.0.ffn.mlp.f1.bias": (48,),
        "layers.0.ffn.mlp.f2.bias": (48,),
        "layers.0.ffn.mlp.g.bias": (32,),
        "layers.0.self_attn.q_proj.bias": None,
    },
    "attention_gate='head', head_dim=6": {"layers.0.self_attn.gate_proj.weight": (4, 32)},
    "attention_gate='channel', head_dim=6": {"layers.0.self_attn.gate_proj.weight": (24, 32)},
    "attention_gate='none'": {"layers.0.self_attn.gate_proj.weight": None},
    "attention_bias=True, attention_gate='head'": {
        "layers.0.self_attn.q_proj.bias": (32,),
        "layers.0.self_attn.k_proj.bias": (16,),
        "layers.0.self_attn.v_proj.bias": (16,),
        "layers.0.self_attn.o_proj.bias": (32,),
        "layers.0.self_attn.gate_proj.bias": (4,),
        "layers.0.ffn.mlp.f1.bias": None,
    },
    "layer_types=['conv', 'attention'], conv_kernel_size=5": {
        "layers.0.self_attn.q_proj.weight": None,
        "layers.0.conv.conv.weight": (32, 1, 5),
        "layers.0.conv.f1.bias": None,
        "layers.0.conv.conv.bias": None,
        "layers.1.conv.conv.weight": None,
    },
    "layer_types=['conv', 'attention'], conv_bias=True": {
        f"layers.0.conv.{part}.bias": (32,) for part in ("f1", "f2", "conv", "gate_proj", "o_proj")
    },
}


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("family", ["decoder", "encoder", "seq2seq"])
def test_fields_that_shape_the_parameters(family, options):
    given, expected = eval(f"dict({options})"), SHAPES[options]
    if "num_attention_heads" in given:
        given["num_key_value_heads"] = None
    build, model_class, sides = {
        "decoder": (config, nlp.StarformerModel, [""]),
        "encoder": (encoder_config, nlp.StarformerEncoderModel, [""]),
        "seq2seq": (seq2seq_config, nlp.StarformerSeq2SeqModel, ["encoder.", "decoder."]),
    }[family]
    with torch.device("meta"):
        parameters = dict(model_class(build(**given)).named_parameters(remove_duplicate=False))
    for side in sides:
        found = {n: p.shape for n in expected if (p := parameters.get(side + n)) is not None}
        assert found == {n: shape for n, shape in expected.items() if shape}


HYBRID = {"layer_types": ["star_conv", "attention"]}
GATED = {"attention_gate": "head"}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OUTPUTS = {  # field -> other value, and options of both models that make the field matter
    "hidden_act": ("gelu", {}),
    "mlp_type": ("sum", {}),
    "mlp_offset": (0.5, {}),
    "attention_gate_act": ("silu", GATED),
    "conv_act": ("silu", HYBRID),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 100.0}, {}),
    "max_position_embeddings": (
        4,
        {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "rms_norm_eps": (0.1, {}),
}


@pytest.mark.parametrize("field", OUTPUTS)
@pytest.mark.parametrize("build", [decoder, seq2seq])
def test_fields_that_change_the_output(build, field):
    value, others = OUTPUTS[field]
    usual, other, again = build(**others), build(**{**others, field: value}), build(**others)
    for model in (other, again):
        model.load_state_dict(usual.state_dict())
    inputs = {"input_ids": ids(2, 7)}
    if build is seq2seq:
        inputs["decoder_input_ids"] = ids(2, 6, seed=1)
    with torch.no_grad():
        logits = usual(**inputs).logits
        assert torch.equal(again(**inputs).logits, logits)
        difference = (other(**inputs).logits - logits).abs().amax((-1, -2))
    assert difference.min() > 1e-3 * logits.abs().max()


def test_fields_that_change_something_else():
    model = decoder(tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    tied = decoder()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tied.model.embed_tokens.padding_idx == 0
    assert decoder(pad_token_id=None).model.embed_tokens.padding_idx is None
    assert decoder(mlp_recompute=True).model.layers[1].ffn.mlp.recompute is True
    assert tied.model.layers[1].ffn.mlp.recompute is False

    tokens = ids(1, 4)
    with torch.no_grad():
        assert "past_key_values" not in decoder(use_cache=False)(tokens)
        assert tied(tokens).past_key_values.get_seq_length() == 4

    generated = tied.generate(tokens, do_sample=False, max_new_tokens=6)
    stops_at = int(generated[0, 6])
    stopped = decoder(eos_token_id=stops_at).generate(tokens, do_sample=False, max_new_tokens=6)
    first = generated[0, 4:].tolist().index(stops_at)
    assert stopped.tolist() == generated[:, : 5 + first].tolist()
    assert decoder(bos_token_id=5).generation_config.bos_token_id == 5
    started = decoder(bos_token_id=5).generate(max_new_tokens=1, do_sample=False)
    assert started[0, 0] == 5

    start = seq2seq(decoder_start_token_id=9).generate(tokens, do_sample=False, max_new_tokens=1)
    assert start[0, 0] == 9


@pytest.mark.parametrize("std", [0.02, 0.2])
def test_initializer_range(std):
    torch.manual_seed(0)
    options = {"layer_types": ["conv", "attention"], "conv_kernel_size": 5, "hidden_size": 128}
    model = nlp.StarformerModel(config(initializer_range=std, attention_gate="channel", **options))
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all()
        elif name.endswith("conv.conv.weight"):
            assert p.std().item() == pytest.approx(5**-0.5, rel=0.1)
        else:
            assert p.std().item() == pytest.approx(std, rel=0.1), name


def test_the_number_of_encoder_layers():
    model = nlp.StarformerSeq2SeqModel(
        nlp.StarformerSeq2SeqConfig(
            **{**SIZES, "num_hidden_layers": 1},
            encoder_layers=3,
            encoder_layer_types=["attention", "star_conv", "attention"],
        )
    )
    assert [layer.layer_type for layer in model.decoder.layers] == ["full_attention"]
    assert [layer.layer_type for layer in model.encoder.layers] == [
        "full_attention",
        "conv",
        "full_attention",
    ]


def test_every_field_is_tested_for_an_effect():
    covered = set(OUTPUTS) | {part.split("=")[0] for o in SHAPES for part in o.split(", ")}
    covered |= {"mlp_recompute", "tie_word_embeddings", "use_cache"}  # in "something else"
    covered |= {"pad_token_id", "bos_token_id", "eos_token_id", "initializer_range"}
    covered |= {"attention_dropout", "hidden_dropout", "classifier_dropout"}  # test_dropout.py
    assert set(DEFAULTS) <= covered
