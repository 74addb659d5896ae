"""Products added to a gated MLP, and the order of their rows in files."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from starlayers.surgery.linear_layers import dtype_and_device
from starlayers.surgery.site import attribute


class Grown(nn.Module):
    """Sum of r products per channel, `sum_j act(f1(x)) * f2(x)`; zero at first, because `f2` is.

    Row `c * r + j` of `f1` and `f2` is product j of channel c, so that a slice of the rows holds
    whole products, as tensor parallelism needs. The owner multiplies: it has the activation.

    In state dicts of version 1 (records of `starify` up to version 2) it was row `j * hidden + c`.
    They load with their rows rearranged; an optimizer's state does not.

    Shapes: (..., n) -> (..., hidden).
    """

    _version = 2  # of its state dict

    def __init__(self, n: int, hidden: int, rank: int, **factory: Any) -> None:
        super().__init__()
        self.rank = rank
        #: names of tensors whose rows are in the order of version 1 when they are loaded next
        self.old_rows: set[str] = set()
        self.f1 = nn.Linear(n, rank * hidden, **factory)
        self.f2 = skip_init(nn.Linear, n, rank * hidden, **factory)
        self.reset()

    def forward(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the sum of products; `product(a, b)` computes `act(a) * b`."""
        products = product(self.f1(x), self.f2(x))
        return products.unflatten(-1, (-1, self.rank)).sum(-1)  # type: ignore[no-any-return]

    def reset(self) -> None:
        """Initialise `f1` at random and `f2` with zeros, so that the products are zero."""
        self.f1.reset_parameters()
        for parameter in self.f2.parameters():
            nn.init.zeros_(parameter)

    def expect_old_rows(self) -> None:
        """Take the next tensors that are loaded for those of version 1, unless they say more."""
        if self.rank > 1:
            self.old_rows = {name for name, _ in self.named_parameters()}

    def rearrange_old_rows(self) -> None:
        """Rearrange parameters that were loaded past `load_state_dict`, as by transformers.

        Raises:
            ValueError: the weights are quantised, so that rows cannot be moved.
        """
        for name, parameter in self.named_parameters():
            if name not in self.old_rows:
                continue
            if type(parameter).__name__ not in ("Parameter", "DTensor"):
                raise ValueError(
                    f"{name} of grown products was saved with its {len(parameter)} rows in an "
                    f"earlier order, and a {type(parameter).__name__} cannot be rearranged: load "
                    "the model without quantising it, save it, and quantise the new folder"
                )
            with torch.no_grad():
                parameter.copy_(_by_channel(parameter, self.rank))
        self.old_rows = set()

    def settle_pickled(self, rank: int) -> None:
        """Rearrange rows of an object that was pickled when they had the order of version 1."""
        if "rank" not in vars(self):
            self.rank, self.old_rows = rank, set()
            self.expect_old_rows()
            self.rearrange_old_rows()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        version = local_metadata.get("version")  # files of safetensors have none
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name, rows = key[len(prefix) :], state_dict[key]
            old = name in self.old_rows if version is None else version < 2
            self.old_rows.discard(name)
            if old and rows.shape[:1] == (self.f1.out_features,):
                state_dict[key] = _by_channel(rows, self.rank)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def _by_channel(rows: Tensor, rank: int) -> Tensor:
    """Return rows of layout (rank, hidden) as (hidden, rank); DTensors stay divided as they are."""
    divided: Any = rows if hasattr(rows, "full_tensor") else None
    whole: Tensor = rows if divided is None else divided.full_tensor()
    whole = whole.unflatten(0, (rank, -1)).transpose(0, 1).flatten(0, 1)
    if divided is None:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, divided.device_mesh, divided.placements)


def grow(mlp: Any, rank: int) -> None:
    """Add `rank` products per channel to a `GatedMLP`, all of them zero at first."""
    inp = attribute(mlp, mlp.star.site.inp)
    n, hidden, _ = mlp.star_sizes()
    dtype, device = dtype_and_device(inp)
    bias = getattr(inp, "bias", None) is not None
    grown = Grown(n, hidden, rank, bias=bias, dtype=dtype, device=device)
    mlp.star_grown = grown.train(mlp.training)
    mlp.star.grown = rank
