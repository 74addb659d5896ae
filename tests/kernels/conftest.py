"""Fixtures shared by the kernel tests."""

import pytest
import torch

from starlayers.kernels import registration, tiles
from tests.kernels.cases import DEVICE, EITHER

TRITON = registration.INTERPRET or DEVICE == "cuda"


@pytest.fixture(autouse=True)
def _own_process(request):
    """Run every test on DEVICE, and those marked `interpret` only where kernels run."""
    if request.node.get_closest_marker("interpret") and not TRITON:
        pytest.fail("needs TRITON_INTERPRET=1, set before starlayers.kernels is first imported")
    with torch.device(DEVICE):
        yield


@pytest.fixture
def nan_memory():
    """Fill new memory with NaN, so that reading it before writing shows."""
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
    """Return a function `on_family(name)`: kernels then use the tiles of that family."""

    def on_family(name):
        if DEVICE == "cuda" and name != tiles.family(torch.device(DEVICE)):
            pytest.skip("tiles of another family of GPUs")
        monkeypatch.setattr(tiles, "family", lambda device: name)

    return on_family


@pytest.fixture
def launches(monkeypatch):
    """Record (kernel, grid, options) of every Triton launch, in order."""
    from starlayers.kernels import dwconv, star, star_mlp_launch, statistics

    seen = []

    def recorded(kernel, grid, *args, **options):
        seen.append((kernel.fn.__name__, grid, options))
        registration.launch(kernel, grid, *args, **options)

    for module in (statistics, dwconv, star, star_mlp_launch):
        monkeypatch.setattr(module, "launch", recorded)
    return seen


@pytest.fixture(params=EITHER)
def either(request, launches):
    """Run a test in torch code in an ordinary process, and in Triton in another.

    Triton runs under TRITON_INTERPRET=1 and on a GPU; at least one kernel must be launched there.
    """
    if (request.param == "triton") != TRITON:
        pytest.fail(f"this process does not run {request.param} ops; see the marker `interpret`")
    yield request.param
    assert bool(launches) == (request.param == "triton")
