import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from starlayers import starify
from starlayers.surgery import Anneal, gate_parameters, report, revert
from tests.surgery.small import MLP, Gated, Net, Packed


def starified(*blocks, **options):
    torch.manual_seed(0)
    net = starify(Net(*blocks), **options)
    for parameter in gate_parameters(net):
        nn.init.normal_(parameter, std=0.3)
    return net


@pytest.fixture
def x():
    return torch.randn(512, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_the_interpolation(x, t):
    net = starified(MLP(act=nn.ReLU(inplace=True)))
    Anneal(net).t = t
    star = net.blocks[0].fc1
    h = star.inp(x)
    torch.testing.assert_close(star(x), ((1 - t) * h.relu() + t * h) * (1 + star.gate(x)))


@pytest.mark.parametrize("fuse", [False, True])
def test_at_the_end_every_layer_is_a_quadratic_form(x, fuse):
    net = starified(MLP(), Gated(), Packed(), grow=1)
    if fuse:
        starify(net, mode="fuse")
    anneal = Anneal(net, steps=3)
    for expected in (1 / 3, 2 / 3, 1.0, 1.0):
        anneal.step()
        assert anneal.t == pytest.approx(expected)
    double = net.double()
    x = x[:4].double()
    for block in double.blocks:
        # a polynomial of degree two has no third differences
        values = torch.stack([block(x + k * x.flip(0)) for k in range(4)])
        assert values.diff(n=3, dim=0).abs().max() < 1e-9


def test_back_to_zero_is_exact(x):
    net = starified(MLP(), Gated(), grow=1)
    y = net(x)
    anneal = Anneal(net)
    anneal.t = 0.7
    assert not torch.allclose(net(x), y)
    anneal.t = 0.0
    assert torch.equal(net(x), y)


def test_refit_is_the_least_squares_solution(x):
    net = starified(MLP(dropout=0.5))
    block = net.blocks[0]
    with torch.no_grad():
        y = block.eval()(x)
    net.train()
    errors = Anneal(net).refit([x[:200], x[200:]], 1.0, ridge=0.0)
    assert net.training
    assert block.training
    with torch.no_grad():
        h = block.fc1(x)
        design = torch.cat([h, torch.ones(len(h), 1)], 1).double()
        best = torch.linalg.lstsq(design, y.double()).solution
        torch.testing.assert_close(block.fc2.weight.double().T, best[:-1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(block.fc2.bias.double(), best[-1], rtol=1e-3, atol=1e-4)
        share = (block.eval()(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    before, after = errors["blocks.0.fc1"]
    assert after == pytest.approx(float(share), rel=1e-3)
    assert after < before


def test_refit_without_bias_and_for_maps(x):
    net = starified(Gated(), grow=1)
    ((before, after),) = Anneal(net).refit([x], 0.5).values()
    assert after < before
    maps = nn.Sequential(nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1))
    ((before, after),) = Anneal(starify(maps)).refit([x.view(8, 8, 8, 8)], 0.5).values()
    assert after < before


def test_refit_of_a_language_model():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99)
    model = starify(GPT2LMHeadModel(config).eval())
    ids = torch.randint(0, 99, (8, 32))
    want = model(ids).logits
    anneal = Anneal(model)
    anneal.t = 0.5
    without = (model(ids).logits - want).square().mean()
    anneal.t = 0.0
    errors = anneal.refit([{"input_ids": ids}], 0.5)
    assert len(errors) == 2
    assert all(after < before for before, after in errors.values())
    assert (model(ids).logits - want).square().mean() < without
    called = Anneal(model).refit([ids], 0.6, forward=lambda m, batch: m(input_ids=batch))
    assert len(called) == 2


def test_trained_activations_learn_to_go(x):
    net = starified(MLP())
    target = Net(MLP())(x).detach()
    anneal = Anneal(net, steps=100)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        loss = (net(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        anneal.step()
        losses.append(loss.item())
    assert anneal.t == 1.0
    assert losses[-1] < losses[0] / 3


def test_revert_says_that_it_was_annealed(x):
    net = starify(Net(MLP(), Gated()), grow=1)
    kinds = [type(m) for m in Net(MLP(), Gated()).modules()]
    Anneal(net).t = 1.0
    with pytest.warns(UserWarning, match="2 activations were annealed"):
        revert(net)
    assert [type(m) for m in net.modules()] == kinds


def test_function_activations(x):
    net = starified(MLP(act=nn.functional.gelu))
    y = net(x)
    anneal = Anneal(net)
    anneal.t = 1.0
    anneal.t = 0.0
    assert torch.equal(net(x), y)


def test_errors(x):
    with pytest.raises(ValueError, match="no star layers; starify it first"):
        Anneal(MLP())
    net = starified(MLP())
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Anneal(net, steps=0)
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        Anneal(net).t = 1.5
    with pytest.raises(ValueError, match="no batch came"):
        Anneal(net).refit([], 0.5)
    assert [row.state for row in report(net).rows] == ["star"]
