"""Attention gates, on Qwen3-Next as transformers has it."""

import copy
import io

import pytest
import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from starlayers import starify
from starlayers.surgery import attention, report, revert

IDS = torch.arange(14).reshape(2, 7)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        vocab_size=99,
        layer_types=["full_attention"] * 2,
        num_experts=0,
        mlp_only_layers=[0, 1],
    )
    return Qwen3NextForCausalLM(config).eval()


@pytest.fixture
def products(monkeypatch):
    """Every product a kernel would have taken, computed by its definition."""
    taken = []

    def product(gate, attended, act):
        taken.append(attended.shape)
        return torch.sigmoid(gate) * attended

    monkeypatch.setattr(attention, "star_product", product)
    monkeypatch.setattr(attention, "star_blocker", lambda *_: None)
    return taken


def test_the_gates_go_through_the_star(model, products):
    want, names = model(IDS).logits, list(model.state_dict())
    kind = type(model.model.layers[0].self_attn)
    starify(model, mode="fuse")
    assert list(model.state_dict()) == names
    assert isinstance(model.model.layers[0].self_attn, kind)
    states = [(r.recipe, r.state) for r in report(model).rows]
    assert states == [("attention", "fused"), ("gated", "fused")] * 2
    assert torch.equal(model(IDS).logits, want)
    assert products == [(2, 7, 32)] * 2
    revert(model)
    assert type(model.model.layers[0].self_attn) is kind
    assert torch.equal(model(IDS).logits, want)
    assert len(products) == 2


def test_gradients(model, products):
    grads = []
    for net in (model, starify(copy.deepcopy(model), mode="fuse")):
        net(IDS).logits.square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    assert len(products) == 2
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_small_inputs_run_as_they_were(model, monkeypatch):
    want = model(IDS).logits
    starify(model, mode="fuse")
    monkeypatch.setattr(attention, "_LazySigmoids", lambda: pytest.fail("no kernel serves here"))
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-6, atol=1e-6)


def test_patterns_choose_gates_too(model):
    starify(model, mode="fuse", include="model.layers.0.self_attn")
    assert [r.state for r in report(model).rows] == ["fused", "is a star", "is a star", "is a star"]


def test_copies_and_pickles(model, products):
    starify(model, mode="fuse")
    want = model(IDS).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(IDS).logits, want)
        assert len(report(revert(other)).replaced) == 0
    assert len(products) == 6


def test_compile(model):
    want = model(IDS).logits
    starify(model, mode="fuse")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "use",
    [
        lambda g, x: torch.sigmoid(g).unsqueeze(-1) * x.unsqueeze(-1),
        lambda g, x: x[:, :1] * torch.sigmoid(g),
        lambda g, x: torch.cat([g.sigmoid(), x]),
        lambda g, x: 1 - torch.sigmoid(g),
        lambda g, x: torch.sigmoid(g) @ x.T,
        lambda g, x: torch.sigmoid(g) + x,
        lambda g, x: torch.sigmoid(g).mul(x),
        lambda g, x: x * torch.sigmoid(g.double()),
        lambda g, x: (2 * torch.sigmoid(g)).sum(dim=0),
        lambda g, x: torch.where(torch.sigmoid(g) > 0.5, x, 0),
        lambda g, x: torch.sigmoid(g)[1:] * x[1:],
        lambda g, x: -torch.sigmoid(g),
    ],
)
def test_any_other_use_of_a_sigmoid_is_what_it_was(use, products):
    g, x = torch.randn(3, 4), torch.randn(3, 4)
    want = use(g, x)
    with attention._LazySigmoids():
        got = use(g, x)
    assert type(got) is torch.Tensor
    assert torch.equal(got, want)
