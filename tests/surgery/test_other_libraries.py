"""MLPs of diffusers, timm, x-transformers, LFM2, and shapes of litgpt, torchtitan and others."""

import pytest
import timm.layers
import torch
from torch import nn

from starlayers import starify, use_backend
from starlayers.surgery import GatedMLP, apply_record, gate_parameters, record_of, report, revert
from tests.helpers import randn
from tests.surgery import libraries
from tests.surgery.small import train_gates

pytestmark = pytest.mark.hf

N, HIDDEN = libraries.N, libraries.HIDDEN


def diffusers(kind, **options):
    from diffusers.models.attention import FeedForward

    return FeedForward(N, activation_fn=kind, mult=2, dropout=0.1, **options)


def x_transformers(**options):
    from x_transformers.x_transformers import FeedForward

    return FeedForward(N, mult=2, **options)


def lfm2():
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP

    return Lfm2MLP(Lfm2Config(hidden_size=N, intermediate_size=24))


def timm_mlp(kind, **options):
    hidden = 2 * HIDDEN if kind in ("GluMlp", "SwiGLUPacked") else HIDDEN
    return getattr(timm.layers, kind)(N, hidden, drop=0.1, **options)


#: gated MLPs: what makes one, and the activation
STARS = {
    "diffusers geglu": (lambda: diffusers("geglu"), "gelu"),
    "diffusers geglu with dropout": (lambda: diffusers("geglu", final_dropout=True), "gelu"),
    "diffusers swiglu": (lambda: diffusers("swiglu", bias=False), "silu"),
    "x-transformers glu": (lambda: x_transformers(glu=True), "gelu"),
    "x-transformers swish glu": (lambda: x_transformers(glu=True, swish=True), "silu"),
    "x-transformers with norm": (lambda: x_transformers(glu=True, post_act_ln=True), "gelu"),
    "timm GluMlp": (lambda: timm_mlp("GluMlp"), "sigmoid"),
    "timm GluMlp with norm": (lambda: timm_mlp("GluMlp", norm_layer=nn.LayerNorm), "sigmoid"),
    "timm gate first": (lambda: timm_mlp("GluMlp", gate_last=False), "sigmoid"),
    "timm SwiGLUPacked": (lambda: timm_mlp("SwiGLUPacked"), "silu"),
    "timm SwiGLU": (lambda: timm_mlp("SwiGLU"), "silu"),
    "timm SwiGLU with norm": (lambda: timm_mlp("SwiGLU", norm_layer=nn.LayerNorm), "silu"),
    "LFM2": (lfm2, "silu"),
    "litgpt": (libraries.LitGPTLike, "silu"),
    "litgpt Gemma": (libraries.GemmaLike, "gelu_tanh"),
    "torchtitan and Llama": (libraries.TorchtitanLike, "silu"),
    "DINOv2 hub": (libraries.DinoHubSwiGLU, "silu"),
    "DINOv2 hub fused": (libraries.DinoHubFused, "silu"),
}
#: plain MLPs
PLAIN = {
    "diffusers gelu": lambda: diffusers("gelu"),
    "diffusers gelu-approximate": lambda: diffusers("gelu-approximate"),
    "diffusers geglu-approximate": lambda: diffusers("geglu-approximate"),
    "diffusers linear-silu": lambda: diffusers("linear-silu"),
    "x-transformers": x_transformers,
    "x-transformers swish": lambda: x_transformers(swish=True, no_bias=True),
    "x-transformers squared": lambda: x_transformers(relu_squared=True),
    "x-transformers with norm": lambda: x_transformers(post_act_ln=True, dropout=0.1),
    "timm Mlp": lambda: timm_mlp("Mlp", norm_layer=nn.LayerNorm),
    "timm GlobalResponseNormMlp": lambda: timm_mlp("GlobalResponseNormMlp"),
    "nanoGPT": lambda: libraries.NanoLike(dropout=0.1),
}
#: what is left -> the reason
LEFT = {
    "x-transformers scaled": (
        lambda: x_transformers(glu=True, glu_mult_bias=True),
        "its product is multiplied by 'mult_bias'",
    ),
    "x-transformers soft clamps": (
        lambda: x_transformers(glu=True, glu_softclamp=True),
        "a factor of its product depends on special_ndtr",
    ),
    "x-transformers soft clamp": (
        lambda: x_transformers(softclamp_value=5.0),
        "its hidden layer is more than one activation: Lambda '0.1', GELU '0.2', "
        "Dropout '1' after '0.0'",
    ),
    "x-transformers solu": (
        lambda: x_transformers(solu=True),
        "its hidden layer is more than one activation: Sequential '0', LayerNorm '0.1.norm.ln', "
        "Dropout '1' after '0.0'",
    ),
    "timm GluMlp of maps": (
        lambda: timm_mlp("GluMlp", use_conv=True),
        "'fc1' is a convolution, and stars of two branches take linear layers",
    ),
    "timm ConvMlp with norm": (
        lambda: timm_mlp("ConvMlp", norm_layer=nn.BatchNorm2d),
        "'act' is not applied to the output of 'fc1'",
    ),
    "square of relu": (
        libraries.Squared,
        "its activation square(relu(x)) is written into the forward of Squared",
    ),
}


def seeded(module, x):
    torch.manual_seed(0)
    return module(x)


@pytest.mark.parametrize("name", STARS)
def test_stars_are_fused_and_grow(name):
    make, act = STARS[name]
    mlp, x = make(), randn(2, 5, N)
    outputs = [seeded(mlp.train(mode), x) for mode in (False, True)]
    keys = list(mlp.state_dict())
    (row,) = report(mlp).rows
    assert (row.state, row.detail) == ("is a star", "")
    starify(mlp, mode="fuse")
    assert list(mlp.state_dict()) == keys
    (star,) = (m for m in mlp.modules() if isinstance(m, GatedMLP))
    assert star.star.act_name == act
    for backend in ("eager", "auto"):
        with use_backend(backend):
            for mode, y in zip((False, True), outputs):
                torch.testing.assert_close(seeded(mlp.train(mode), x), y)
    starify(mlp, grow=1)
    for mode, y in zip((False, True), outputs):
        torch.testing.assert_close(seeded(mlp.train(mode), x), y)
    train_gates(mlp, 1.0)
    y = seeded(mlp.eval(), x)
    assert not torch.allclose(y, outputs[0])
    again = apply_record(make(), record_of(mlp)).eval()
    again.load_state_dict(mlp.state_dict())
    assert torch.equal(again(x), y)
    with pytest.warns(UserWarning, match="1 gates were not zero"):
        revert(mlp)
    assert torch.equal(seeded(mlp.eval(), x), outputs[0])


@pytest.mark.parametrize("name", PLAIN)
def test_plain_mlps_get_gates(name):
    mlp, x = PLAIN[name](), randn(2, 5, N)
    shape = (2, 5, 3, N) if "Response" in name else (2, 5, N)
    x = randn(*shape)
    outputs = [seeded(mlp.train(mode), x) for mode in (False, True)]
    (row,) = report(mlp).rows
    assert row.state == "ready"
    starify(mlp)
    for mode, y in zip((False, True), outputs):
        assert torch.equal(seeded(mlp.train(mode), x), y)
    seeded(mlp, x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in gate_parameters(mlp))
    train_gates(mlp)
    y = seeded(mlp.eval(), x)
    assert not torch.equal(y, outputs[0])
    again = apply_record(PLAIN[name](), record_of(mlp)).eval()
    again.load_state_dict(mlp.state_dict())
    assert torch.equal(again(x), y)
    with pytest.warns(UserWarning, match="1 gates were not zero"):
        revert(mlp)
    assert torch.equal(seeded(mlp.eval(), x), outputs[0])


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_has_its_reason(name):
    make, reason = LEFT[name]
    (row,) = report(make()).rows
    assert (row.state, row.detail) == ("skipped", reason)
    for options in ({}, {"mode": "fuse"}, {"grow": 1}):
        with pytest.raises(ValueError, match="no MLP to replace") as error:
            starify(make(), **options)
        # a plain MLP is nothing for this mode, whatever else is in the way
        plain = "ConvMlp with norm" in name and "mode" in options
        assert ("are plain, without a second branch" if plain else reason) in str(error.value)


def test_a_block_of_eva02_and_a_transformer_of_x_transformers():
    from x_transformers import Encoder

    eva = timm.create_model(
        "eva02_tiny_patch14_224", img_size=28, depth=2, embed_dim=24, num_heads=2
    ).eval()
    encoder = Encoder(dim=N, depth=2, heads=2, ff_glu=True).eval()
    for model, x in ((eva, randn(1, 3, 28, 28)), (encoder, randn(2, 5, N))):
        y = model(x)
        starify(model, mode="fuse")
        assert len(report(model).replaced) == len(report(model).rows) == 2
        torch.testing.assert_close(model(x), y)
