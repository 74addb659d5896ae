"""Division of the star MLP into blocks of rows on a CPU."""

import pytest
import torch

from starlayers.functional import star_mlp_reference
from starlayers.kernels import star_mlp_cpu
from starlayers.kernels.star_mlp_cpu import blocked_forward
from tests.helpers import randn


# hidden channels, bytes of an element, rows of 2 MiB, but at least 64
@pytest.mark.parametrize(
    ("hidden", "element_size", "rows"),
    [(1024, 4, 512), (1024, 8, 256), (1000, 4, 524), (8192, 4, 64), (8064, 4, 65), (10**6, 4, 64)],
)
def test_rows_of_a_block(hidden, element_size, rows):
    assert star_mlp_cpu._block_rows(hidden, element_size) == rows


@pytest.mark.parametrize("rows", [64, 65, 200])
def test_every_block_is_computed_in_the_same_buffers(rows, monkeypatch):
    monkeypatch.setattr(star_mlp_cpu, "BLOCK_BYTES", 1)  # 64 rows
    x, w1, w2, w3 = randn(rows, 3), randn(5, 3, seed=1), randn(5, 3, seed=2), randn(2, 5, seed=3)
    buffers = set()
    linear = star_mlp_cpu._linear

    def recorded(x, w, b, *, out):
        buffers.add((out.data_ptr(), out.shape[1]))
        linear(x, w, b, out=out)

    monkeypatch.setattr(star_mlp_cpu, "_linear", recorded)
    y = blocked_forward(x, w1, None, w2, None, w3, None, "silu", 1.0)
    expected = star_mlp_reference(x, w1, None, w2, None, w3, None, "silu", offset=1.0)
    torch.testing.assert_close(y, expected)
    assert len({address for address, width in buffers if width == 5}) == 2
