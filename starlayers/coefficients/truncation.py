"""Stars truncated to their largest eigenvectors, and the loss of accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from starlayers.checks import positive_int
from starlayers.coefficients.eigen import Eigenfeatures, flat, need_all
from starlayers.coefficients.modules import RankStarOp

__all__ = ["TruncationCurve", "truncate", "truncation_curve"]

CHUNK_BYTES = 1 << 26


def truncate(features: Sequence[Eigenfeatures], k: int) -> nn.Sequential:
    """Return a star that computes outputs from their `k` largest eigenvectors alone.

    `y_o = sum_{i < k} lambda_oi (v_oi . x~)^2`, a `RankStarOp` of rank `k` with
    the eigenvectors in both branches. Its parameters are float64; `.float()` converts them.

    Shapes: (..., *shape) -> (..., out).

    Args:
        features: eigenfeatures of the outputs.
        k: number of eigenvectors of each output.

    Raises:
        ValueError: `k` is below 1 or above the number of eigenvectors, or the features are of
            different inputs.

    Example:
        >>> from starlayers import StarMLP
        >>> from starlayers.coefficients import eigenfeatures
        >>> model = StarMLP(4, 8, out_features=3, act=None)
        >>> small = truncate(eigenfeatures(model), 2)
        >>> small[1].extra_repr(), small(torch.randn(5, 4).double()).shape
        ('4, 3, rank=2', torch.Size([5, 3]))
    """
    shape, kept = _common("truncate", features)
    if positive_int("truncate", "k", k) > kept:
        raise ValueError(f"truncate: k={k} is more than the {kept} eigenvectors there are")
    width = torch.Size(shape).numel()
    options = {"act": None, "device": "cpu", "dtype": torch.float64}
    layer = RankStarOp(width, len(features), rank=k, **options)
    vectors = torch.stack([f.vectors[:k] for f in features])  # (out, k, d + 1)
    scaled = torch.stack([f.values[:k] for f in features])[..., None] * vectors
    with torch.no_grad():
        for branch, rows in ((layer.star.f1, vectors), (layer.star.f2, scaled)):
            branch.weight.copy_(rows[..., :-1].flatten(0, 1))
            branch.bias.copy_(rows[..., -1].flatten())
    return nn.Sequential(nn.Flatten(-len(shape)), layer)


@dataclass(frozen=True)
class TruncationCurve:
    """Accuracy of a classifier with `k` eigenvectors of each class, for several `k`.

    For each entry of `k`: `accuracy` against the labels, `agreement` with the predictions of the
    whole model, and `explained`, the share `1 - Var(logit - truncated) / Var(logit)` of the logits'
    variance, mean over classes. `explained` is below 0 if truncated logits are worse than the mean.

    Example:
        >>> TruncationCurve((1, 2), (0.5, 0.75), (0.5, 1.0), (0.3, 1.0)).smallest(0.01)
        2
    """

    k: tuple[int, ...]
    accuracy: tuple[float, ...]
    agreement: tuple[float, ...]
    explained: tuple[float, ...]

    def smallest(self, loss: float) -> int:
        """Return the `k` from which on the accuracy stays within `loss` of the last one."""
        smallest = self.k[-1]
        for n, accuracy in zip(self.k[::-1], self.accuracy[::-1]):
            if accuracy < self.accuracy[-1] - loss:
                break
            smallest = n
        return smallest


def truncation_curve(
    features: Sequence[Eigenfeatures], x: Tensor, labels: Tensor, *, k: Sequence[int] | None = None
) -> TruncationCurve:
    """Measure truncated classifiers, for all `k` in one pass over the inputs.

    Args:
        features: all eigenfeatures of all classes, `eigenfeatures(model)`.
        x, labels: inputs (n, *shape) and their class numbers (n,).
        k: numbers of eigenvectors; by default 1, 2, 3, 5, 7, 10, ... and all.

    Raises:
        ValueError: eigenvectors were left out, a `k` is out of range, or the numbers of inputs and
            labels differ.

    Example:
        >>> from starlayers import StarMLP
        >>> from starlayers.coefficients import eigenfeatures
        >>> model, x = StarMLP(4, 8, out_features=3, act=None), torch.randn(20, 4)
        >>> curve = truncation_curve(eigenfeatures(model), x, model(x).argmax(1))
        >>> curve.k, curve.accuracy[-1]
        ((1, 2, 3, 5), 1.0)
    """
    shape, kept = _common("truncation_curve", features)
    need_all("truncation_curve", features)
    if k is None:
        counts = (m * 10**e for e in range(4) for m in (1, 2, 3, 5, 7))
        k = [*(n for n in counts if n < kept), kept]
    if not k or min(k) < 1 or max(k) > kept:
        raise ValueError(f"truncation_curve: k must be numbers from 1 to {kept}, got {list(k)}")
    inputs = flat("truncation_curve", x, shape)
    if inputs.ndim != 2 or labels.shape != inputs.shape[:1]:
        raise ValueError(
            f"truncation_curve: {tuple(labels.shape)} labels for inputs {tuple(x.shape)}; there "
            "must be one for each"
        )
    columns = torch.tensor([n - 1 for n in k], device="cpu")
    labels = labels.cpu()
    correct, agree = torch.zeros(2, len(k), device="cpu")
    logits, errors = [], []
    rows = max(1, CHUNK_BYTES // (8 * len(features) * kept))
    for part, classes in zip(inputs.split(rows), labels.split(rows), strict=True):
        part = part.unflatten(1, shape)
        # (inputs, classes, k)
        sums = torch.stack([f.terms(part).cumsum(1)[:, columns] for f in features], 1)
        whole = torch.stack([f.terms(part).sum(1) for f in features], 1)
        predictions = sums.argmax(1)
        correct += (predictions == classes[:, None]).sum(0)
        agree += (predictions == whole.argmax(1)[:, None]).sum(0)
        logits.append(whole)
        errors.append(whole[..., None] - sums)
    variance = torch.cat(logits).var(0, correction=0)
    unexplained = torch.cat(errors).var(0, correction=0) / variance[:, None]
    shares = (correct / len(inputs), agree / len(inputs), 1 - unexplained.mean(0))
    return TruncationCurve(tuple(k), *(tuple(share.tolist()) for share in shares))


def _common(owner: str, features: Sequence[Eigenfeatures]) -> tuple[tuple[int, ...], int]:
    """Return the shape of inputs and the number of eigenvectors of all features."""
    if isinstance(features, Eigenfeatures) or not features:
        raise ValueError(f"{owner} needs a list of Eigenfeatures, one for each output")
    kinds = {(f.shape, len(f.values)) for f in features}
    if len(kinds) > 1:
        raise ValueError(f"{owner}: the eigenfeatures differ in shape and number: {kinds}")
    return kinds.pop()
