"""Fixtures shared by the kernel tests."""

import pytest
import torch

from starlayers.kernels import registration, tiles
from tests.kernels.cases import DEVICE

TRITON = registration.INTERPRET or DEVICE == "cuda"


@pytest.fixture(autouse=True)
def _own_process(request):
    """Tests marked `interpret` need kernels that run here, all others need not."""
    if request.node.get_closest_marker("interpret") and not TRITON:
        pytest.fail("needs TRITON_INTERPRET=1, set before starlayers.kernels is first imported")
    with torch.device(DEVICE):
        yield


@pytest.fixture
def nan_memory():
    """Fresh memory holds NaN, so that whatever is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(2).isnan().all()
        assert torch.ones(2).new_empty(2).isnan().all()
        assert torch.empty_like(torch.ones(2)).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_family(monkeypatch):
    """`on_family(name)`: kernels take their tiles from that family's tables."""

    def on_family(name):
        if DEVICE == "cuda" and name != tiles.family(torch.device(DEVICE)):
            pytest.skip("tiles of another family of GPUs")
        monkeypatch.setattr(tiles, "family", lambda device: name)

    return on_family


@pytest.fixture
def launches(monkeypatch):
    """(kernel, grid, options) of every Triton launch, in order."""
    from starlayers.kernels import dwconv, star, star_mlp_launch, statistics

    seen = []

    def recorded(kernel, grid, *args, **options):
        seen.append((kernel.fn.__name__, grid, options))
        registration.launch(kernel, grid, *args, **options)

    for module in (statistics, dwconv, star, star_mlp_launch):
        monkeypatch.setattr(module, "launch", recorded)
    return seen


@pytest.fixture(params=["plain", pytest.param("triton", marks=pytest.mark.interpret)])
def served_by(request, launches):
    """Runs a test with whatever serves CPU tensors in this process, once in each kind of process.

    In the ordinary one that is torch code, under TRITON_INTERPRET=1 and on a GPU the kernels.
    """
    wanted = request.param
    if (wanted == "triton") != TRITON:
        pytest.fail(f"this process does not serve by {wanted}; see the marker `interpret`")
    yield wanted
    assert bool(launches) == (wanted == "triton")
