"""Random cases of `star`, `star_packed` and `star_mlp` by forced kernels, from `tests.fuzz`."""

import pytest

from starlayers.kernels import star as star_kernels
from starlayers.kernels import star_linear, star_mlp_launch
from starlayers.kernels.tiles import FAMILIES
from tests import fuzz

pytestmark = [pytest.mark.interpret, pytest.mark.slow, pytest.mark.usefixtures("nan_memory")]


@pytest.mark.parametrize("first", range(fuzz.SEEDS_IN_TRITON, fuzz.CASES, fuzz.BATCH))
def test_value_and_gradients(first, launches, on_family, monkeypatch):
    monkeypatch.setattr(star_linear, "launch", star_kernels.launch)
    # one program for all tiles of rows: it loops over them
    monkeypatch.setattr(star_mlp_launch, "multiprocessors", lambda device: 1)
    on_family(FAMILIES[first // fuzz.BATCH % len(FAMILIES)])
    for seed in range(first, first + fuzz.BATCH):
        case = fuzz.draw(seed, ("triton",))
        launches.clear()
        fuzz.check(case)
        assert launches or 0 in fuzz.result_shape(case), case
