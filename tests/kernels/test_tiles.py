"""Every tile of the star MLP's tables in Triton's interpreter, whole and ragged."""

import pytest
import torch

from starlayers.kernels import star_mlp_launch, tiles
from starlayers.kernels.star_mlp import star_mlp
from starlayers.kernels.tiles import FAMILIES, Tile
from tests.helpers import assert_as_exact_as_eager, converted, results
from tests.kernels.cases import DEVICE, DTYPES, mlp_pair, mlp_tensors

pytestmark = [pytest.mark.interpret, pytest.mark.slow]


def rows_of(table, path=()):
    """Yield (path of keys, tile) for each tile of a nested table."""
    if isinstance(table, Tile):
        yield path, table
    elif isinstance(table, dict):
        for key, value in table.items():
            yield from rows_of(value, (*path, key))


TABLES = {
    name: dict(rows_of(table))
    for name, table in vars(tiles).items()
    if isinstance(table, dict) and any(rows_of(table))
}
SHIPPED = [(name, path) for name, rows in TABLES.items() for path in rows]
#: tiles of "<family> float32" are for that type, all others for 16 bits, and interpreted for any
CASES = [
    pytest.param(name, path, dtype, id=f"{name}-{'-'.join(map(str, path))}-{kind}")
    for name, path in SHIPPED
    for kind, dtype in DTYPES.items()
    if kind == "f32" or not any(str(key).endswith(" float32") for key in path)
]
#: table -> kernel that uses its tiles, and options of the launch
KERNELS = {
    "MLP_FORWARD": ("mlp_forward", {}),
    "all": ("mlp_dw", {"DX": True}),
    "dw": ("mlp_dw", {"DX": False}),
    "dx": ("mlp_dx", {}),
    "hidden": ("mlp_hidden", {}),
}


def kernel_of(name, path):
    return KERNELS[path[0] if name == "MLP_BACKWARD" else name]


def family_of(path):
    family, *kind = next(key for key in path if str(key).startswith(FAMILIES)).split()
    assert kind in ([], ["float32"])
    return family, bool(kind)


def sizes_of(name, path, tile):
    """Return sizes with a ragged tile of rows and of channels after a whole one."""
    channels = path[-1]
    hidden = tile.hidden + 8
    if name == "MLP_BACKWARD":
        whole = TABLES[name].get(("all", *path[1:]))
        if path[0] == "all":
            hidden = tile.hidden - 8
        elif whole is not None:
            hidden = max(hidden, whole.hidden + 8)
    return tile.rows + 3, channels, hidden, channels - 3


@pytest.mark.parametrize(("name", "path", "dtype"), CASES)
def test_tile(name, path, dtype, on_family, launches, monkeypatch):
    tile = TABLES[name][path]
    family, for_float32 = family_of(path)
    on_family(family)
    if DEVICE == "cuda" and for_float32 != (dtype == torch.float32):
        pytest.skip("float32 has tiles of its own on a GPU")
    if for_float32:  # the interpreter itself does not use these tiles
        monkeypatch.setattr(tiles, "INTERPRET", False)
    # one multiprocessor: a program computes several row tiles in turn
    monkeypatch.setattr(star_mlp_launch, "multiprocessors", lambda device: 1)
    tensors = mlp_tensors(*sizes_of(name, path, tile), dtype=dtype)
    op, definition = mlp_pair("silu", 0.5, True)
    if name == "MLP_FORWARD":
        tensors = [t.detach() for t in tensors]
        actual, eager = op(*tensors), definition(*tensors)
        exact = definition(*(t.double() for t in tensors))
    else:
        actual, eager = results(op, tensors), results(definition, tensors)
        exact = results(definition, converted(tensors, torch.float64))
    assert_as_exact_as_eager(actual, eager, exact, sums=True)
    kernel, wanted = kernel_of(name, path)
    options = [o for k, _, o in launches if k == kernel and wanted.items() <= o.items()]
    assert [(o["BM"], o["BH"], o["num_warps"], o["num_stages"]) for o in options] == [
        (tile.rows, tile.hidden, tile.warps, tile.stages)
    ]
    assert [o.get("BK", 0) for o in options] == [tile.depth]


def test_every_row_the_tables_ship_is_run(request):
    ran = {
        tuple(item.callspec.params[k] for k in ("name", "path", "dtype"))
        for item in request.session.items
        if getattr(item, "obj", None) is test_tile
    }
    per_kernel = dict.fromkeys(KERNELS, 0)
    for name, path in SHIPPED:
        per_kernel[path[0] if name == "MLP_BACKWARD" else name] += 1
    print(f"{len(SHIPPED)} tile rows {per_kernel}, {len(ran)} with their dtypes")
    assert {(name, path) for name, path, _ in ran} == set(SHIPPED)
    assert len(SHIPPED) == sum(per_kernel.values()) == repr(vars(tiles)).count("Tile(rows=")
    assert len(ran) == len(CASES)
    families = {family_of(path) for _, path in SHIPPED}
    assert families >= {(family, False) for family in FAMILIES}
    assert families <= {(family, wide) for family in FAMILIES for wide in (False, True)}


@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 132])
@pytest.mark.parametrize("hidden", [72, 136])
def test_any_number_of_programs_yields_the_weight_gradients(
    multiprocessors, hidden, launches, monkeypatch
):
    tensors = mlp_tensors(150, 24, hidden, 17)
    op, definition = mlp_pair("silu", 0.5, True)
    exact = results(definition, converted(tensors, torch.float64))
    eager = results(definition, tensors)
    monkeypatch.setattr(star_mlp_launch, "multiprocessors", lambda device: multiprocessors)
    assert_as_exact_as_eager(results(op, tensors), eager, exact, sums=True)
    (grid, options), *others = [(g, o) for kernel, g, o in launches if kernel == "mlp_dw"]
    assert not others
    chunks, programs = grid
    assert chunks == -(-hidden // options["BH"])
    # no more than run at once with 8 warps a multiprocessor, and no more than there are row tiles
    most = multiprocessors * 8 // options["num_warps"] // chunks
    assert programs == max(1, min(most, -(-150 // options["BM"])))


@pytest.mark.parametrize("family", FAMILIES)
def test_wider_than_every_row_is_refused(family, on_family):
    on_family(family)
    forward = max(path[-1] for path in TABLES["MLP_FORWARD"] if family in path)
    backward = max(path[-1] for path in TABLES["MLP_BACKWARD"] if family in path)
    with pytest.raises(ValueError, match="no star MLP tile"):
        star_mlp(*mlp_tensors(3, forward + 1, 8, 16), "silu", 0.0, False)
    assert backward <= forward
    if backward < forward:
        y, _, _ = star_mlp(*mlp_tensors(3, backward + 1, 8, 16), "silu", 0.0, False)
        with pytest.raises(ValueError, match="no backward tile"):
            y.sum().backward()
