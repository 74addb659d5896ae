"""Images of one's own, in class folders."""

import pytest
import torch
from PIL import Image

from starlayers.datasets.images import load_images

RED, GREY = (200, 10, 30), 90


def picture(file, colour, size=(12, 10), mode=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    mode = mode or ("RGB" if isinstance(colour, tuple) else "L")
    Image.new(mode, size, colour).save(file)


def pairs(part):
    """(red value of the first pixel, class) of every image."""
    return [(int(x[0, 0, 0]), int(y)) for x, y in (part[i] for i in range(len(part)))]


@pytest.mark.parametrize("test_name", ["val", "test", "valid"])
def test_training_and_test_folders(tmp_path, test_name):
    for i in range(3):
        picture(tmp_path / "train" / "cat" / f"{i}.png", (10 + i, 0, 0))
        picture(tmp_path / "train" / "dog" / f"{i}.png", (20 + i, 0, 0))
    picture(tmp_path / test_name / "cat" / "0.png", (30, 0, 0))
    picture(tmp_path / test_name / "dog" / "0.png", (40, 0, 0))
    data = load_images("folder", path=tmp_path, size=8)
    assert (data.name, data.source) == ("folder", f"images in {tmp_path}")
    assert (data.classes, data.shape) == (("cat", "dog"), (3, 8, 8))
    assert pairs(data.train) == [(10, 0), (11, 0), (12, 0), (20, 1), (21, 1), (22, 1)]
    assert pairs(data.test) == [(30, 0), (40, 1)]
    assert data.mean == pytest.approx((16 / 255, 0, 0), rel=1e-5)
    # variance of 64 copies of each value, unbiased
    spread = sum((v - 16) ** 2 for v in (10, 11, 12, 20, 21, 22)) * 64 / (6 * 64 - 1)
    assert data.std == pytest.approx((spread**0.5 / 255, 1e-6, 1e-6), rel=1e-5)


def test_val_goes_before_test(tmp_path):
    for part, red in (("train", 1), ("val", 2), ("test", 3)):
        picture(tmp_path / part / "cat" / "0.png", (red, 0, 0))
    assert pairs(load_images("folder", path=tmp_path).test) == [(2, 0)]


@pytest.mark.parametrize(("n", "set_aside"), [(10, 2), (23, 4), (2, 1), (4, 1)])
def test_a_single_folder_is_divided_four_to_one(tmp_path, n, set_aside):
    for i in range(n):
        picture(tmp_path / ("cat" if i % 2 else "dog") / f"{i:02}.png", (10 * i, 0, 0))
    data = load_images("folder", path=str(tmp_path), size=4)
    assert data.source == f"images in {tmp_path}, {set_aside} of {n} set aside for testing"
    train, test = pairs(data.train), pairs(data.test)
    assert (len(train), len(test)) == (n - set_aside, set_aside)
    want = [(10 * i, 0 if i % 2 else 1) for i in range(n)]
    assert sorted(train + test) == sorted(want)  # each once, with its class
    again = load_images("folder", path=tmp_path, size=4)
    assert (pairs(again.train), pairs(again.test)) == (train, test)
    reds = torch.tensor([r for r, _ in train]) / 255
    assert data.mean[0] == pytest.approx(reds.mean().item(), rel=1e-4, abs=1e-7)


def test_a_division_is_at_random(tmp_path):
    for i in range(25):
        picture(tmp_path / "cat" / f"{i:02}.png", (10 * i, 0, 0))
    reds = [red for red, _ in pairs(load_images("folder", path=tmp_path).test)]
    assert reds not in (sorted(reds), [10 * i for i in range(5)], [10 * i for i in range(20, 25)])


@pytest.mark.parametrize("size", [8, 30])
def test_any_size_and_mode_becomes_rgb_of_one_size(tmp_path, size):
    shapes = [(12, 10), (10, 40), (33, 7), (8, 8)]
    for i, shape in enumerate(shapes):
        picture(tmp_path / "train" / "x" / f"{i}.png", RED, shape)
        picture(tmp_path / "train" / "x" / f"{i}.jpg", GREY, shape)
    picture(tmp_path / "train" / "x" / "palette.png", 0, mode="P")
    picture(tmp_path / "test" / "x" / "alpha.png", (*RED, 128), mode="RGBA")
    data = load_images("folder", path=tmp_path, size=size)
    assert data.shape == (3, size, size)
    seen = set()
    for x, label in [data.train[i] for i in range(9)] + [data.test[0]]:
        assert label == 0
        assert (x.dtype, tuple(x.shape)) == (torch.uint8, (3, size, size))
        assert bool((x == x[:, :1, :1]).all())  # one colour stays one colour
        seen.add(tuple(x[:, 0, 0].tolist()))
    assert seen == {RED, (GREY, GREY, GREY), (0, 0, 0)}
    assert tuple(data.test[0][0][:, 0, 0].tolist()) == RED


def test_the_centre_is_kept(tmp_path):
    wide = Image.new("RGB", (30, 10), (0, 0, 0))
    wide.paste((255, 0, 0), (10, 0, 20, 10))
    for part in ("train", "val"):
        (tmp_path / part / "x").mkdir(parents=True)
        wide.save(tmp_path / part / "x" / "0.png")
    image = load_images("folder", path=tmp_path, size=10).train[0][0]
    assert image[0].unique().tolist() == [255]
    assert image[1:].unique().tolist() == [0]


def test_other_classes_in_the_test_folder(tmp_path):
    picture(tmp_path / "train" / "cat" / "0.png", RED)
    picture(tmp_path / "val" / "dog" / "0.png", RED)
    with pytest.raises(ValueError, match=r"train has classes \['cat'\], val has \['dog'\]"):
        load_images("folder", path=tmp_path)


@pytest.mark.parametrize("path", [None, "no/such/folder"])
def test_no_folder(path):
    with pytest.raises(FileNotFoundError, match=f"needs path=.*got {path}"):
        load_images("folder", path=path)


def test_a_file_is_no_folder(tmp_path):
    picture(tmp_path / "0.png", RED)
    with pytest.raises(FileNotFoundError, match="needs path="):
        load_images("folder", path=tmp_path / "0.png")


@pytest.mark.parametrize("content", [[], ["cat/notes.txt"], ["0.png"]])
def test_a_folder_without_images_in_class_folders(tmp_path, content):
    for name in content:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=f"under {tmp_path}; expected {tmp_path}/<class>/"):
        load_images("folder", path=tmp_path)


def test_an_empty_training_folder_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    picture(tmp_path / "val" / "dog" / "0.png", RED)
    with pytest.raises(FileNotFoundError, match=f"under {tmp_path / 'train'};"):
        load_images("folder", path=tmp_path)
