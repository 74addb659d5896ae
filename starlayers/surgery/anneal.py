"""A research tool: taking the activations out of a star model, step by step."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.modules import positive_int
from starlayers.surgery.gated import GatedMLP
from starlayers.surgery.gates import name_of
from starlayers.surgery.install import anneal_activation, annealed, installed, role_of
from starlayers.surgery.projection import StarProjection
from starlayers.surgery.saving import note_in_config
from starlayers.surgery.site import attribute, gate_blocker, projection

__all__ = ["Anneal"]

Star = StarProjection | GatedMLP


class Anneal:
    """Moves the star layers of a model towards the activation-free form while it trains.

    Every activation becomes `(1 - t) * act(x) + t * x`, t from 0 (the model as it is) to 1 (star
    layers that are pure products of two linear maps). This changes what the model computes: it is
    no conversion, and a trained model needs training to live with it. `refit` eases the way in
    closed form: it solves, layer by layer, for the last projection that best restores the layer's
    output of before.

    Args:
        model: a model with star layers, by `starify` in either mode.
        steps: calls of `step` from t = 0 to t = 1.

    Raises:
        TypeError, ValueError: `steps` is no integer of at least 1, or no layer is a star layer.

    Source: the interpolation is the one of "Bilinear MLPs enable weight-based mechanistic
    interpretability" (arXiv 2410.08417) in kind, not in its schedule.

    Example:
        >>> from starlayers.surgery import starify
        >>> model = starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        >>> anneal = Anneal(model, steps=4)
        >>> for _ in range(4):  # with a training step of yours in each
        ...     anneal.step()
        >>> anneal.t, model[0].act
        (1.0, AnnealedActivation(
          t=1.0
          (act): GELU(approximate='none')
        ))
    """

    def __init__(self, model: nn.Module, steps: int = 1000) -> None:
        self.model = model
        self.steps = positive_int("Anneal", "steps", steps)
        self.layers: dict[str, tuple[nn.Module, Star]] = {
            name_of(path, star): (owner, star) for path, owner, star in installed(model)
        }
        if not self.layers:
            raise ValueError(
                f"Anneal: this {type(model).__name__} has no star layers; starify it first"
            )
        self._t = max(annealed(star) for _, star in self.layers.values())

    @property
    def t(self) -> float:
        """How far the activations are from what they were: 0 not at all, 1 gone."""
        return self._t

    @t.setter
    def t(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"Anneal: t must be from 0 to 1, got {value}")
        self._t = float(value)
        for _, star in self.layers.values():
            anneal_activation(star, self._t)
        note_in_config(self.model)

    def step(self) -> None:
        """Move t by one part in `steps`, and no further than 1."""
        done = round(self._t * self.steps) + 1
        self.t = min(1.0, done / self.steps)

    def refit(
        self,
        batches: Iterable[Any],
        t: float,
        *,
        forward: Callable[[nn.Module, Any], object] | None = None,
        ridge: float = 1e-4,
    ) -> dict[str, tuple[float, float]]:
        """Go to `t` at once, and solve for the last projections that restore the layers' outputs.

        For each star layer, over all positions of `batches`, with h the product at the new t and y
        the layer's output of now: `min |h g' + b' - y|^2 + ridge * mean(h^2) * |g' - g|^2`, a
        linear system of the hidden width. The model runs once, in eval mode, as it is now.

        Args:
            batches: inputs; a dict is given to the model as keywords, anything else as it is.
            t: where to go.
            forward: `forward(model, batch)` where the model is called in another way.
            ridge: pull towards the projection as it is, relative to the mean square of h.

        Returns:
            For each layer the error before and after, as a share of the variance of y. Layers
            whose last projection is not known, not an ordinary one, or does not take the product
            itself are left out.

        Raises:
            ValueError: `t` is not from 0 to 1, or no batch came.

        Example:
            >>> from starlayers.surgery import starify
            >>> model = starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
            >>> errors = Anneal(model).refit([torch.randn(64, 4)], 0.5)
            >>> before, after = errors["0"]
            >>> after < before
            True
        """
        fits: dict[str, _Fit] = {}
        for name, (owner, star) in self.layers.items():
            out = _last_projection(owner, star)
            if out is not None:
                fits[name] = _Fit(star, out, t)
        training = {m: m.training for m in self.model.modules()}
        count = 0
        try:
            self.model.eval()
            with torch.no_grad(), _watching(fits):
                for count, batch in enumerate(batches, 1):  # noqa: B007
                    _call(self.model, batch, forward)
        finally:
            for module, mode in training.items():
                module.training = mode
        if count == 0:
            raise ValueError("Anneal.refit: no batch came, so there is nothing to fit to")
        self.t = t
        return {name: fit.solve(ridge) for name, fit in fits.items() if fit.rows}


def _call(
    model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], object] | None
) -> object:
    if forward is not None:
        return forward(model, batch)
    return model(**batch) if hasattr(batch, "keys") else model(batch)


def _last_projection(owner: nn.Module, star: Star) -> nn.Module | None:
    name = role_of(star).site.out
    if name is None:
        return None
    out: nn.Module = attribute(owner, name)
    ordinary = projection(out) is not None and gate_blocker(out) is None
    return out if ordinary and not hasattr(out, "base_layer") else None


class _Fit:
    """The normal equations of one layer's last projection."""

    def __init__(self, star: Star, out: nn.Module, t: float) -> None:
        self.star = star
        self.out = out
        self.t = t
        self.rows = 0
        sizes = projection(out)
        assert sizes is not None
        self.first = sizes.channels_first
        n = sizes.in_features + 1
        self.hh = torch.zeros(n, n, dtype=torch.float64, device="cpu")
        self.hy = torch.zeros(n, sizes.out_features, dtype=torch.float64, device="cpu")
        self.yy = torch.zeros(sizes.out_features, dtype=torch.float64, device="cpu")
        self.y = torch.zeros(sizes.out_features, dtype=torch.float64, device="cpu")
        self.x: Tensor | None = None

    def enter(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.x = args[0]

    def leave(self, _: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if self.x is None:
            return
        x, self.x = self.x, None
        if not torch.allclose(self.star.star_hidden(x), args[0], rtol=1e-3, atol=1e-5):
            return  # a norm or the like stands between the two
        now = annealed(self.star)
        anneal_activation(self.star, self.t)
        h, rows = self._rows(self.star.star_hidden(x)), self._rows(y)
        anneal_activation(self.star, now)
        h = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype, device=h.device)], dim=1)
        self.hh += (h.T @ h).cpu().double()
        self.hy += (h.T @ rows).cpu().double()
        self.yy += rows.square().sum(0).cpu().double()
        self.y += rows.sum(0).cpu().double()
        self.rows += len(rows)

    def _rows(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1) if self.first else x
        return x.reshape(-1, x.shape[-1]).float()

    def solve(self, ridge: float) -> tuple[float, float]:
        weight: Any = self.out.weight
        bias: Any = getattr(self.out, "bias", None)
        turned = type(self.out).__name__ == "Conv1D"  # (in, out), where a linear has (out, in)
        g = weight.detach().double().cpu()
        g = g if turned else g.flatten(1).T
        b = g.new_zeros(1, g.shape[1]) if bias is None else bias.double().cpu()[None]
        g = torch.cat([g, b.detach()])
        # without a bias the last row of the system is not there to be solved for
        n = len(g) if bias is not None else len(g) - 1
        pull = ridge * self.hh.diagonal()[:-1].mean() * torch.eye(n, dtype=g.dtype, device="cpu")
        new = torch.linalg.solve(self.hh[:n, :n] + pull, self.hy[:n] + pull @ g[:n])
        before, after = self._error(g[:n], n), self._error(new, n)
        with torch.no_grad():
            matrix = new[: len(g) - 1]
            weight.copy_((matrix if turned else matrix.T).reshape(weight.shape))
            if bias is not None:
                bias.copy_(new[-1])
        return before, after

    def _error(self, g: Tensor, n: int) -> float:
        missed = self.yy.sum() - 2 * (g * self.hy[:n]).sum() + (g * (self.hh[:n, :n] @ g)).sum()
        variance = (self.yy - self.y.square() / self.rows).sum()
        return float(missed / variance)


@contextmanager
def _watching(fits: dict[str, _Fit]) -> Iterator[None]:
    handles = []
    for fit in fits.values():
        handles.append(fit.star.register_forward_pre_hook(fit.enter))
        handles.append(fit.out.register_forward_hook(fit.leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
