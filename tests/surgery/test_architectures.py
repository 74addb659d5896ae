"""Starify on tiny models of transformers, timm, torchvision and torch."""

import copy

import pytest
import torch

from starlayers.surgery import (
    GatedMLP,
    StarProjection,
    find_mlps,
    gate_parameters,
    param_groups,
    report,
    revert,
    starify,
)
from tests.surgery.architectures import ARCHITECTURES, run

#: one architecture of each kind for the quick tier: split, Conv1D, gated, packed, inline in a
#: layer, 1x1 convolutions, sequences, torch's inference path
QUICK = {
    "bert",
    "gpt2",
    "llama",
    "phi3",
    "bart",
    "timm-convnext-conv",
    "torchvision-convnext",
    "torch-encoder",
}


def architectures(*kinds):
    return pytest.mark.parametrize(
        "arch",
        [
            pytest.param(a, id=a.name, marks=[] if a.name in QUICK else pytest.mark.slow)
            for a in ARCHITECTURES
            if a.kind in kinds
        ],
    )


every = architectures("plain", "gated", "packed")
stars = architectures("gated", "packed")


def both_modes(model, arch):
    """Outputs in eval mode, and in train mode with seeded dropout."""
    inputs = arch.inputs(model)
    evaluated = run(model.eval(), inputs)
    torch.manual_seed(7)
    return evaluated, run(model.train(), inputs)


def growth(arch):
    return 0 if arch.kind == "plain" else 1


@every
@pytest.mark.parametrize("gate", ["full", "low_rank=3", "scale"])
def test_the_function_stays_and_the_gates_learn(arch, gate):
    model = arch.build()
    before = both_modes(model, arch)
    assert starify(model, gate=gate, grow=growth(arch)) is model
    after = both_modes(model, arch)
    assert [float((a - b).abs().max()) for a, b in zip(before, after)] == [0.0, 0.0]
    assert len(report(model).replaced) == arch.layers

    gates = gate_parameters(model)
    optimizer = torch.optim.SGD(param_groups(model, 0.1, weight_decay=0.0))
    old = [p.detach().clone() for p in gates]
    trained = after[1].float()
    (trained * torch.linspace(-1, 1, trained.numel()).reshape(trained.shape)).sum().backward()
    optimizer.step()
    moved = sum(bool((p != q).any()) for p, q in zip(gates, old))
    # of a low-rank gate the up half moves first, of grown products the second factor
    assert moved >= arch.layers
    assert not torch.equal(run(model.eval(), arch.inputs(model)), after[0])


@every
def test_bfloat16_is_exact_too(arch):
    if not arch.bf16:
        pytest.fail(f"{arch.name} does not run in bfloat16: say so in the table of docs/starify.md")
    model = arch.build().to(torch.bfloat16)
    before = both_modes(model, arch)
    starify(model, grow=growth(arch))
    assert {p.dtype for p in gate_parameters(model)} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(before, both_modes(model, arch)))


@every
def test_revert_leaves_no_trace(arch):
    model = arch.build()
    plain = copy.deepcopy(model)
    kinds = {name: type(m) for name, m in plain.named_modules()}
    revert(starify(model, grow=growth(arch)))
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(isinstance(m, (StarProjection, GatedMLP)) for m in model.modules())
    for a, b in zip(both_modes(plain, arch), both_modes(model, arch)):
        assert torch.equal(a, b)


def test_every_quick_architecture_exists():
    assert {a.name for a in ARCHITECTURES} >= QUICK
    assert len(ARCHITECTURES) == 50


@stars
def test_fuse_keeps_names_and_rounding(arch):
    model = arch.build()
    names = list(model.state_dict())
    before = both_modes(model, arch)
    starify(model, mode="fuse", recompute=True)
    assert list(model.state_dict()) == names
    assert gate_parameters(model) == []
    assert [row.state for row in report(model).rows] == ["fused"] * arch.layers
    for a, b in zip(before, both_modes(model, arch)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@every
def test_on_the_meta_device(arch):
    real = arch.build()
    model = copy.deepcopy(real).to("meta")
    assert len([f for f in find_mlps(model) if f.reason is None]) == arch.layers
    starify(model, grow=growth(arch))
    assert {p.device.type for p in gate_parameters(model)} == {"meta"}
    starify(real, grow=growth(arch))
    assert list(model.state_dict()) == list(real.state_dict())
