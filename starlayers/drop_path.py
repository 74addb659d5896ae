"""Stochastic depth."""

from torch import Tensor, nn

from starlayers.checks import probability

__all__ = ["DropPath"]


class DropPath(nn.Module):
    """Stochastic depth: zero whole samples with probability `p` in training.

    `x * mask / (1 - p)` with one Bernoulli draw per sample; the identity in evaluation mode. For
    the same seed it draws the same samples as timm's layer of this name.

    Shapes: (batch, ...) -> (batch, ...); the first dimension is the batch.

    Args:
        p: probability of dropping a sample, in [0, 1).

    Raises:
        ValueError: `p` outside [0, 1).

    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.

    Example:
        >>> layer, x = DropPath(0.5), torch.ones(1000, 3)
        >>> sorted(set(layer(x).flatten().tolist()))
        [0.0, 2.0]
        >>> layer.eval()(x) is x
        True
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = probability("DropPath", "p", p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * mask.div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"
