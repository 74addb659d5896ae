"""The block's parts against their formulas, written out."""

import pytest
import torch
import torch.nn.functional as F

from starlayers import ACTIVATIONS, StarBlock, StarMLP, use_backend
from starlayers.nlp import StarConv, StarformerForCausalLM
from starlayers.nlp import portable_starformer as portable
from starlayers.nlp.layers_starformer import StarformerAttention, StarformerRMSNorm
from tests.nlp.tiny import VARIANTS, config, decoder, encoder_config, ids, seq2seq

BUILT_IN = sorted({row.name for row in ACTIVATIONS.values()})


def test_norm_is_the_formula_and_torchs():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16)
    norm = StarformerRMSNorm(16, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-3))
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("implementation", "variant"),
    # flex compiles: two variants stand for the rest
    [*(("sdpa", v) for v in VARIANTS), *(("flex_attention", v) for v in ("silu", "hybrid-gated"))],
)
def test_attention_implementations_agree(implementation, variant):
    eager = decoder(variant, attn_implementation="eager")
    fast = decoder(variant, attn_implementation=implementation)
    tokens = ids(2, 7)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    with torch.no_grad():
        a = eager(tokens, attention_mask=mask).logits
        b = fast(tokens, attention_mask=mask).logits
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("act", ["sigmoid", None])
def test_a_gate_is_a_star_after_the_attention(gate, act):
    torch.manual_seed(0)
    options = {"attn_implementation": "eager", "attention_gate_act": act}
    plain = StarformerAttention(config(**options), 0)
    gated = StarformerAttention(config(attention_gate=gate, **options), 0)
    gated.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 5, 32)
    rotation = (torch.ones(1, 5, 8), torch.zeros(1, 5, 8))
    seen = {}
    plain.o_proj.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0]))
    plain(x, position_embeddings=rotation)
    g = ACTIVATIONS[act].fn(gated.gate_proj(x))
    if gate == "head":
        g = g.repeat_interleave(8, dim=-1)
    expected = gated.o_proj(g * seen["mixed"])
    torch.testing.assert_close(gated(x, position_embeddings=rotation)[0], expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("act", [None, "silu"])
def test_star_conv_is_its_formula(causal, act):
    torch.manual_seed(0)
    options = config(conv_act=act, conv_bias=True, conv_kernel_size=5)
    mixer = StarConv(options, 0, causal=causal).double()
    x = torch.randn(2, 9, 32, dtype=torch.double)
    mask = torch.ones(2, 9)
    mask[0, 7:] = 0
    f = ACTIVATIONS[act].fn
    product = f(mixer.f1(x)) * mixer.f2(x) * mask[..., None]
    mixed = mixer.conv.bias.expand(2, 9, 32).clone()
    for t in range(9):
        for k in range(5):
            source = t + k - (4 if causal else 2)
            if 0 <= source < 9:
                mixed[:, t] += mixer.conv.weight[:, 0, k] * product[:, source]
    expected = mixer.o_proj(f(mixer.gate_proj(x)) * mixed)
    torch.testing.assert_close(mixer(x, mask), expected)


def test_the_block_is_the_cores_and_may_run_fused():
    model = decoder()
    block = model.model.layers[0].ffn
    assert type(block) is StarBlock
    assert type(block.mlp) is StarMLP
    # a real size, where the fused CPU layer serves, against the definition
    torch.manual_seed(0)
    wide = StarformerForCausalLM(config(hidden_size=256, intermediate_size=1024)).eval()
    from starlayers.backend import fused_mlp_blocker

    mlp = wide.model.layers[0].ffn.mlp
    tokens = ids(8, 100)
    with torch.no_grad():
        assert fused_mlp_blocker(mlp, torch.randn(8, 100, 256)) is None
        fast = wide(tokens).logits
        with use_backend("eager"):
            torch.testing.assert_close(fast, wide(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("act", [*BUILT_IN, None, "swiglu"])
@pytest.mark.parametrize("options", [{}, {"rank": 2, "offset": 1.0}, {"combine": "sum"}], ids=str)
def test_portable_layers_are_the_cores(act, options):
    torch.manual_seed(0)
    ours = StarBlock(8, expansion=3, act=act, pre=torch.nn.LayerNorm(8), **options)
    theirs = portable.StarBlock(8, expansion=3, act=act, pre=torch.nn.LayerNorm(8), **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8)
    assert torch.equal(ours(x), theirs(x))


def test_portable_activations_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="'cube' is not known without starlayers"):
        portable.get_activation("cube")


def test_padding_says_nothing_to_an_encoder_or_cross_attention():
    from starlayers.nlp import StarformerEncoderModel

    torch.manual_seed(0)
    hybrid = {**VARIANTS["hybrid-gated"], "conv_kernel_size": 3}
    model = StarformerEncoderModel(encoder_config(**hybrid)).eval()
    tokens = ids(1, 5)
    padded = torch.cat([tokens, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    with torch.no_grad():
        torch.testing.assert_close(
            model(padded, attention_mask=mask).last_hidden_state[:, :5],
            model(tokens).last_hidden_state,
            atol=1e-5,
            rtol=1e-5,
        )
        both = seq2seq("hybrid-gated")
        target = ids(1, 4, seed=1)
        torch.testing.assert_close(
            both(padded, attention_mask=mask, decoder_input_ids=target).logits,
            both(tokens, decoder_input_ids=target).logits,
            atol=1e-5,
            rtol=1e-5,
        )


def test_an_encoder_sees_both_ways():
    from starlayers.nlp import StarformerEncoderModel

    for layers in (["attention"], ["star_conv"]):
        torch.manual_seed(0)
        model = StarformerEncoderModel(encoder_config(num_hidden_layers=1, layer_types=layers))
        model.eval()
        tokens = ids(1, 6)
        other = tokens.clone()
        other[0, 3] = 7 if tokens[0, 3] != 7 else 8
        with torch.no_grad():
            change = model(tokens).last_hidden_state - model(other).last_hidden_state
        change = change.abs().amax(-1)[0]
        assert change[2] > 1e-4
        assert change[4] > 1e-4


def test_recomputing_changes_memory_and_nothing_else():
    from benchmarks.harness.timing import kept_bytes

    tokens, kept, grads = ids(2, 16), [], []
    for recompute in (False, True):
        model = decoder(mlp_recompute=recompute, attention_gate="head").train()
        assert model.model.layers[0].ffn.mlp.recompute is recompute
        kept.append(kept_bytes(model, lambda model=model: model(tokens, labels=tokens)))
        model(tokens, labels=tokens).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    # f1(x), f2(x), silu(f1(x)) and the product, in each of two layers
    assert kept[0] - kept[1] == 2 * 4 * (2 * 16 * 48) * 4
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_configurations_say_what_is_wrong():
    for options, message in (
        ({"num_attention_heads": 5}, "hidden_size=32 is no multiple of num_attention_heads=5"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads=4 is no multiple of num_key_value_heads=3",
        ),
        ({"head_dim": 5}, "even head size, got 5"),
        ({"mlp_type": "swish"}, "unknown mlp_type 'swish', choose one of star, sum, plain"),
        ({"attention_gate": "yes"}, "unknown attention_gate 'yes'"),
        ({"layer_types": ["attention"]}, "1 layer_types for num_hidden_layers=2"),
        ({"layer_types": ["mamba", "attention"]}, r"unknown layer_types \['mamba'\]"),
        ({"mlp_type": "plain", "mlp_rank": 2}, "no second branch for mlp_rank=2"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**options)
    with pytest.raises(ValueError, match="odd conv_kernel_size, got 4"):
        encoder_config(layer_types=["star_conv", "attention"], conv_kernel_size=4)
    with pytest.raises(ValueError, match="unknown classifier_pooling 'max'"):
        encoder_config(classifier_pooling="max")
    with pytest.raises(ValueError, match="unknown activation 'silly'"):
        decoder(hidden_act="silly")


def test_tensor_parallel_plans_leave_out_what_cannot_be_split():
    assert "layers.*.ffn.mlp.f1" in config().base_model_tp_plan
    assert not any("ffn" in name for name in config(mlp_rank=2).base_model_tp_plan)
    assert "layers.*.ffn.mlp.f2" not in config(mlp_type="plain").base_model_tp_plan
    assert "layers.*.ffn.mlp.f1" in config().base_model_tp_plan  # the class's own is untouched
    gated = config(attention_gate="head", mlp_rank=2).base_model_tp_plan
    assert "layers.*.self_attn.gate_proj" in gated
    assert "layers.*.self_attn.gate_proj" not in config(mlp_rank=2).base_model_tp_plan
