"""Random cases of `star`, `star_packed` and `star_mlp` on the paths of a CPU, from `tests.fuzz`.

The cases of forced Triton kernels are in `tests/kernels/test_fuzz_triton.py`.
"""

import dataclasses
import re
from collections import Counter

import pytest
import torch

from starlayers import ACTIVATIONS
from starlayers.kernels import star_mlp_cpu
from tests import fuzz
from tests.helpers import FORMULAS

BATCHES = range(0, fuzz.SEEDS_IN_TRITON, fuzz.BATCH)
QUICK = 2


@pytest.fixture(autouse=True)
def _small_blocks_of_nan(monkeypatch):
    """Let the op of CPUs take blocks of 64 rows; fill new memory with NaN."""
    monkeypatch.setattr(star_mlp_cpu, "BLOCK_BYTES", 1)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "first",
    [pytest.param(n, marks=pytest.mark.slow if i >= QUICK else ()) for i, n in enumerate(BATCHES)],
)
def test_value_and_gradients(first):
    for seed in range(first, first + fuzz.BATCH):
        fuzz.check(fuzz.draw(seed))


def occurrences(cases):
    """Return how often each value of each thing that is drawn occurs."""
    seen = Counter()
    for case in cases:
        mlp = case.function == "star_mlp"
        rows = fuzz.result_shape(case)[:-1]
        seen.update({
            ("function", case.function, case.path, case.dtype),
            ("act", case.function, case.act),
            ("offset", mlp, repr(case.options["offset"])),
            ("dimensions", case.function, len(fuzz.result_shape(case))),
            ("second gradients", case.function, case.path, case.order),
            ("gradients", mlp, case.needs == tuple(case.shapes), bool(case.needs)),
            ("no rows", case.function, 0 in rows),
            ("one row", case.function, rows and set(rows) == {1}),
            ("blocks of 64 rows", case.path, mlp and torch.Size(rows).numel() > 64),
            ("branches of one", case.function, not {"x2", "w2", "h"} & case.shapes.keys()),
            ("kinks", case.function, case.kinks),
            ("dtype of the residual", case.dtype, "residual" in case.shapes and case.residual),
        })  # fmt: skip
        seen.update(("layout", *named) for named in case.layouts.items())
        seen.update(("width", name, shape[-1]) for name, shape in case.shapes.items() if shape)
        seen.update(("there", mlp, name) for name in case.shapes)
        seen.update((name, case.options[name]) for name in case.options if "clamp" in name)
    return seen


def needed(paths, dtypes):
    """Return how often the values must occur at least."""
    least = {}
    for function in fuzz.FUNCTIONS:
        mlp = function == "star_mlp"
        least |= {("act", function, act): 10 for act in fuzz.ACTS}
        least |= {("offset", mlp, repr(offset)): 100 for offset in fuzz.OFFSETS}
        least |= {("dimensions", function, n): 20 for n in range(function != "star", 5)}
        least |= {(name, function, True): 20 for name in ("no rows", "one row", "kinks")}
        least |= {("gradients", mlp, *n): 50 for n in ((True, True), (False, True), (False, False))}
        for path in paths - {"cpu"}:
            least["second gradients", function, path, 2] = 10
            least |= {("function", function, path, dtype): 30 for dtype in dtypes}
    least |= {("branches of one", function, True): 20 for function in ("star", "star_mlp")}
    least |= {("blocks of 64 rows", path, True): 50 for path in paths}
    for name in ("x1", "x2", "h", "x", "w1", "b1", "w2", "b2", "w3", "b3", "residual", "dy"):
        least |= {("layout", name, layout): 10 for layout in fuzz.LAYOUTS}
    least |= {("layout", name, "channels_last"): 10 for name in ("x1", "x2", "dy")}
    least |= {("width", "h", 2 * width): 2 for width in (0, *fuzz.WIDTHS)}
    for name in ("x1", "x", "w1", "w3", "b1", "residual"):
        least |= {("width", name, width): 2 for width in (0, *fuzz.WIDTHS)}
    for clamp in ("clamp1", "clamp2"):
        least |= {(clamp, limits): 50 for limits in fuzz.CLAMPS}
    for dtype in dtypes - {torch.float64}:
        for added in (False, *dtypes - {torch.float64}):
            least["dtype of the residual", dtype, added] = 5
    return least


@pytest.mark.parametrize(
    ("seeds", "paths", "dtypes"),
    [
        (range(fuzz.SEEDS_IN_TRITON), fuzz.PATHS, set(fuzz.DTYPES)),
        (range(fuzz.SEEDS_IN_TRITON, fuzz.CASES), ("triton",), set(fuzz.DTYPES) - {fuzz.F64}),
    ],
    ids=["cpu", "triton"],
)
def test_the_cases_reach_every_value_of_everything_drawn(seeds, paths, dtypes):
    seen = occurrences(fuzz.draw(seed, paths) for seed in seeds)
    least = needed(set(paths), dtypes)
    assert {ACTIVATIONS[act].name for act in fuzz.ACTS} == set(FORMULAS)
    assert {key: (seen[key], n) for key, n in least.items() if seen[key] < n} == {}
    assert seen["function", "star_mlp", "cpu", torch.float32] >= 1000 or "cpu" not in paths


def written(case, t):
    y = fuzz.definition(case, t)
    t["x1"].data.zero_()
    return y


def detached(case, t):
    return fuzz.definition(case, {**t, "x2": t["x2"].detach()}) + 0 * t["x2"].sum()


BOTH = ("x1", "x2")
#: words of the message, tensors that need a gradient, defective function
DEFECTS = [
    ("y: .* error", BOTH, lambda case, t: 1.001 * fuzz.definition(case, t)),
    ("gradient of x2: .* error", BOTH, detached),
    ("x1 was written to", BOTH, written),
    ("the result lies in an input", (), lambda case, t: t["x1"]),
    ("the result is torch.float64", (), lambda case, t: fuzz.definition(case, t).double()),
    (r"the result is \(1, 12\)", (), lambda case, t: fuzz.definition(case, t)[None]),
    ("ZeroDivisionError", (), lambda case, t: 1 / 0),
]


@pytest.mark.parametrize(
    ("words", "needs", "defect"), DEFECTS, ids=[words for words, *_ in DEFECTS]
)
def test_a_case_that_fails_names_its_seed_and_its_arguments(monkeypatch, words, needs, defect):
    case = fuzz.Case(
        seed=7, function="star", path="auto", dtype=torch.float32, act="silu",
        options={"offset": 1, "clamp1": None, "clamp2": None}, shapes={"x1": (12,), "x2": (12,)},
        residual=torch.float32, layouts=dict.fromkeys(("x1", "x2", "dy"), "step"), needs=needs,
        order=1, scale=1.0, kinks=False,
    )  # fmt: skip
    fuzz.check(case)
    monkeypatch.setattr(fuzz, "library", defect)
    message = f"(?s)fuzz case of seed 7: .*{words}.*{re.escape(str(case))}"
    with pytest.raises(AssertionError, match=message):
        fuzz.check(case)


@pytest.mark.parametrize("path", ["eager", "cpu"])
def test_another_path_than_the_one_asked_for_fails(monkeypatch, path):
    case = next(c for c in map(fuzz.draw, range(99)) if (c.function, c.path) == ("star_mlp", "cpu"))
    fuzz.check(case)
    fuzz.check(dataclasses.replace(case, path="auto"))
    monkeypatch.setattr(fuzz, "planned", lambda case, t: "star_mlp")
    with pytest.raises(AssertionError, match="'star_mlp' instead of"):
        fuzz.check(dataclasses.replace(case, path=path))


@pytest.mark.parametrize("layout", [*fuzz.LAYOUTS, "channels_last"])
@pytest.mark.parametrize("shape", [(), (3,), (4, 3), (2, 3, 4), (2, 3, 4, 5), (2, 0, 3)], ids=str)
def test_a_layout_moves_values_alone(layout, shape):
    t = fuzz.randn(*shape)
    rng = fuzz.random.Random(0)
    there = fuzz.laid_out(t, layout, rng)
    assert there.shape == t.shape
    assert not there.isnan().any()
    if layout in ("expanded", "scalar"):
        assert not t.numel() or there.flatten()[0] == t.flatten()[0]
        assert not t.ndim or 0 in there.stride() or 0 in shape
        return
    assert torch.equal(there, t)
    if layout == "step" and t.numel() > 1:
        assert not there.is_contiguous()
    if layout == "channels_last" and t.ndim == 4:
        assert there.is_contiguous(memory_format=torch.channels_last)
