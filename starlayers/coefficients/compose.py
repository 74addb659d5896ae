"""Composition of affine layers and one activation-free star into products.

The products of the star become functions of the model's input, and its outputs their mixtures.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from starlayers.coefficients.form import Star, branch_vectors, check_form, products_of, rank_of
from starlayers.coefficients.modules import RankStarMLP
from starlayers.modules import StarMLP

Layers = list[tuple[str, nn.Module]]

#: sizes of the inputs on which layers are tested, so that clamps at small and large values show
SCALES = (1e-3, 1.0, 1e3, 1e6)
CHUNK_BYTES = 1 << 26


class Outline(NamedTuple):
    """Affine layers, a star, affine layers, and the shape of one input."""

    before: Layers
    star: Star
    after: Layers
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Products:
    """Products of a model and the affine layers `tail` that mix them.

    Output `o` is `sum_k mix[o, k] (first[k] . x~) (second[k] . x~) + constant[o]`. `first` and
    `second` (products, d + 1) are float64 on the CPU. `mix` and `constant` are those of `tail`, and
    are computed only for single directions.
    """

    first: Tensor
    second: Tensor
    tail: Layers
    rank: int
    outputs: int

    def weights(self, direction: Tensor) -> tuple[Tensor, float]:
        """Return the weights of the products in `direction . outputs`, and its constant."""
        channels = (len(self.first) // self.rank,)
        mixed, constant = _pull_back(self.tail, direction[None], channels)
        return mixed[0].repeat_interleave(self.rank), float(constant)


def outline(owner: str, model: nn.Module, shape: tuple[int, ...] | None) -> Outline:
    """Find the star of `model` and the layers before and after it; copy nothing."""
    layers = list(_layers(model))
    stars = [i for i, (_, layer) in enumerate(layers) if isinstance(layer, Star)]
    if len(stars) != 1:
        raise ValueError(
            f"{owner} needs a StarOp, a StarMLP, or an nn.Sequential of affine layers and exactly "
            f"one of them; {type(model).__name__} has {len(stars)}"
        )
    star = layers[stars[0]][1]
    assert isinstance(star, Star)
    check_form(owner, star)
    for name, layer in layers:
        for part in layer.modules():
            if isinstance(part, _BatchNorm | _DropoutNd) and part.training:
                raise ValueError(
                    f"{owner}: {type(part).__name__} ({name}) is in training mode, where it is "
                    "not affine; call model.eval()"
                )
    size = _input_shape(owner, layers) if shape is None else shape
    return Outline(layers[: stars[0]], star, layers[stars[0] + 1 :], size)


def compose(owner: str, model: Outline) -> Products:
    """Return the products of a model as functions of the model's input."""
    before, star, after = copy.deepcopy((model.before, model.star, model.after))
    star.cpu().double()
    for _, layer in before + after:
        layer.cpu().double().requires_grad_(False)
    reached = _affine_output_shape(owner, before, model.shape)
    if reached != (star.in_features,):
        raise ValueError(
            f"{owner}: an input of shape {model.shape} reaches the star as {reached}, where one "
            f"vector of {star.in_features} features is needed; pass shape=, that of one input"
        )
    tail = after
    if isinstance(star, StarMLP | RankStarMLP):
        tail = [("g", star.g.requires_grad_(False)), *after]
    outputs = _affine_output_shape(owner, tail, (products_of(star) // rank_of(star),))
    branches: list[Tensor] = []
    for vectors in branch_vectors(star):
        rows = vectors.detach().flatten(0, 1)
        pulled, constant = _pull_back(before, rows[:, :-1], model.shape)
        branches.append(torch.cat([pulled, (constant + rows[:, -1])[:, None]], 1))
    first, second = branches
    return Products(first, second, tail, rank_of(star), torch.Size(outputs).numel())


def _layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    if type(model) is nn.Sequential:
        for name, child in model._modules.items():  # named_children omits repeated modules
            assert child is not None
            yield from _layers(child, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix or "model", model


def _input_shape(owner: str, layers: Layers) -> tuple[int, ...]:
    for name, layer in layers:
        if isinstance(layer, nn.Linear | Star):
            return (layer.in_features,)
        if isinstance(layer, nn.BatchNorm1d):
            return (layer.num_features,)
        if not isinstance(layer, nn.Flatten | nn.Identity | _DropoutNd):
            raise ValueError(
                f"{owner}: {type(layer).__name__} ({name}) takes inputs of unknown shape; "
                "pass shape=, that of one input, such as (1, 28, 28)"
            )
    raise AssertionError("a star has in_features")


@torch.no_grad()
def _affine_output_shape(owner: str, layers: Layers, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Test that layers are affine; return the shape of their output for one input."""
    draw = torch.Generator().manual_seed(0)
    for name, layer in layers:
        a, b = torch.randn(
            2, len(SCALES), *shape, generator=draw, dtype=torch.float64, device="cpu"
        )
        scales = torch.tensor(SCALES, dtype=torch.float64, device="cpu")
        a, b = (t * scales.view(-1, *[1] * len(shape)) for t in (a, b))
        try:
            f0, fa, fb, fab = (layer(t) for t in (torch.zeros_like(a), a, b, a + b))
        except RuntimeError as error:
            raise ValueError(
                f"{owner}: {type(layer).__name__} ({name}) fails on inputs of shape {shape}: "
                f"{error}; pass shape=, that of one input of the model"
            ) from error
        # affine: f(a + b) - f(0) = (f(a) - f(0)) + (f(b) - f(0))
        size = torch.stack([f0, fa, fb, fab]).abs().flatten(2).amax((0, 2))
        bend = (fab + f0 - fa - fb).abs().flatten(1).amax(1)
        if not (bend <= 1e-9 * size).all():
            raise ValueError(
                f"{owner}: {type(layer).__name__} ({name}) is not affine, so the model is no "
                "quadratic form of its input"
            )
        shape = tuple(f0.shape[1:])
    return shape


def _pull_back(layers: Layers, rows: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Multiply `rows` (n, c) by an affine function: weights (n, d), constants (n,).

    This takes vector-Jacobian products: `n` passes for inputs of any size.
    """
    if not layers:
        return rows, rows.new_zeros(len(rows))
    width = torch.Size(shape).numel()
    pulled, constants = [], []
    for part in rows.split(max(1, CHUNK_BYTES // (8 * max(width, rows.shape[1])))):
        with torch.enable_grad():
            x = rows.new_zeros(len(part), *shape).requires_grad_()
            y = x
            for _, layer in layers:
                y = layer(y)
            value = (y.flatten(1) * part).sum(1)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        pulled.append(gradient.flatten(1))
        constants.append(value.detach())
    return torch.cat(pulled), torch.cat(constants)
