"""StarCSP: its formula written out, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from starlayers.vision.yolo import StarCSP

from ..util import ACTS, image, randomise, reference_block, relative_error


@pytest.mark.parametrize("depth", [1, 3])
def test_it_is_its_formula(depth):
    stage, x = randomise(StarCSP(16, depth)).eval(), image(2, 16, 10, 12)
    y = F.silu(stage.split.bn(stage.split.conv(x)))
    maps = [y[:, :8], y[:, 8:]]
    for block in stage.blocks:
        maps.append(maps[-1] + reference_block(block, maps[-1], ACTS["relu6"]))
    want = F.silu(stage.mix.bn(stage.mix.conv(torch.cat(maps, 1))))
    with torch.no_grad():
        assert relative_error(stage(x), want) < 1e-5


def test_every_weight_has_a_gradient():
    stage = randomise(StarCSP(8, 2)).train()
    stage(image(2, 8, 6, 6)).square().mean().backward()
    assert [name for name, p in stage.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("dim", "depth"), [(15, 1), (0, 1), (16, 0)])
def test_wrong_numbers_are_refused(dim, depth):
    with pytest.raises(ValueError, match=f"got {min(dim, depth) if 0 in (dim, depth) else dim}"):
        StarCSP(dim, depth)


def test_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match=r"StarCSP expects \(N, 16, H, W\), got shape \(1, 8, 4"):
        StarCSP(16)(image(1, 8, 4, 4))
