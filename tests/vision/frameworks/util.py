"""A training step of a model with a StarNet inside, and its weights in a file and back."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..util import assert_same_tensors, relative_error

BOX = [16.0, 16.0, 44.0, 44.0]


def images(count: int = 2, side: int = 64) -> Tensor:
    """Return noise with a bright square in it."""
    x = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 0.3
    x[..., 16:44, 16:44] += 1
    return x


def labels(count: int = 2, side: int = 64) -> Tensor:
    """Return class 1 in the square of `images`, and class 0 around it."""
    y = torch.zeros(count, side, side, dtype=torch.long)
    y[:, 16:44, 16:44] = 1
    return y


def step(
    model: nn.Module, backbone: nn.Module, loss: Callable[[], Tensor], lr: float = 1e-4
) -> tuple[float, float]:
    """Take a step of Adam; check gradients and weights; return the loss before and after."""
    weights = dict(backbone.named_parameters())
    old = {name: p.detach().clone() for name, p in weights.items()}
    assert weights
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    torch.manual_seed(0)
    before = loss()
    before.backward()
    assert [n for n, p in weights.items() if p.grad is None or not p.grad.isfinite().all()] == []
    optimizer.step()
    # not each bias has to move: the gradient of those before a BatchNorm is 0 up to rounding
    still = [name for name, p in weights.items() if torch.equal(p, old[name])]
    assert [name for name in still if not name.endswith("bias")] == []
    torch.manual_seed(0)
    with torch.no_grad():
        after = loss()
    assert after.isfinite()
    return before.item(), after.item()


def reloaded(model: nn.Module, fresh: nn.Module, folder: Path) -> nn.Module:
    """Return `fresh` with the weights of `model`, by way of a file."""
    torch.save(model.state_dict(), folder / "weights.pt")
    fresh.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return fresh


def assert_same(
    model: nn.Module, again: nn.Module, outputs: Callable[[nn.Module], list[Tensor]]
) -> float:
    """Check that two models have the same weights and outputs; return the largest difference.

    Weights that safetensors maps into memory are not aligned, which can change the last bits.
    """
    assert_same_tensors(again.state_dict(), model.state_dict())
    with torch.no_grad():
        want, got = (outputs(net.eval()) for net in (model, again))
    assert all(w.isfinite().all() and w.any() for w in want)
    error = max(relative_error(*pair) for pair in zip(got, want, strict=True))
    assert error < 1e-5
    return error
