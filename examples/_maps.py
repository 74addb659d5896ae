"""Figure of feature maps: stages of a StarNet, and one product inside a block."""

from pathlib import Path

import _report
import torch
from torch import Tensor

from starlayers import get_activation
from starlayers.vision import StarBlock2d, StarNet


@torch.no_grad()
def branches(net: StarNet, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both factors of the first block's stars and the stars, (channels, height, width)."""
    block = next(m for m in net.modules() if isinstance(m, StarBlock2d))
    seen: list[Tensor] = []
    hook = block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(images)
    hook.remove()
    one, two = block.mlp.branches(seen[0])
    one, star = get_activation(block.mlp.act).fn(one), block.mlp.products(seen[0])
    return tuple(t[0].movedim(-1, 0) for t in (one, two, star))  # type: ignore[return-value]


def plot_maps(net: StarNet, image: Tensor, mean: Tensor, std: Tensor, file: Path) -> None:
    """Draw an image, the liveliest channels of every stage, and three products of the first block.

    `image` is (C, H, W), normalised by `mean` and `std` as in training.
    """
    net.eval()
    images = image[None].to(next(net.parameters()).device)
    with torch.no_grad():
        _, stages = net.forward_intermediates(images)
    rows = [(f"stage {i}", liveliest(maps[0], 3)) for i, maps in enumerate(stages)]
    one, two, star = branches(net, images)
    best = order(star)[:3]
    rows += [("act(branch 1)", one[best]), ("branch 2", two[best]), ("their star", star[best])]
    figure, axes = _report.axes(len(rows) + 1, 1.2, 1.2, rows=3)
    shown = (image * std + mean).clamp(0, 1).movedim(0, -1).squeeze(-1)
    axes[0, 0].imshow(shown, cmap="gray")
    axes[0, 0].set_title("image", fontsize=9)
    for column, (name, maps) in zip(axes.T[1:], rows):
        for ax, values in zip(column, maps):
            most = float(values.abs().max()) or 1.0
            ax.imshow(values.cpu(), cmap="RdBu_r", vmin=-most, vmax=most)
        column[0].set_title(name, fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.set_frame_on(bool(ax.images))
    _report.save(figure, file)


def order(maps: Tensor) -> Tensor:
    """Return the channels (channels, height, width) by their spread, the largest first."""
    return maps.flatten(1).std(1).argsort(descending=True)


def liveliest(maps: Tensor, count: int) -> Tensor:
    """Return the channels whose values spread most."""
    return maps[order(maps)[:count]]
