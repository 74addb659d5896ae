"""Image files in class folders: how they are divided, and their pixels."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from starlayers.datasets.image_folder import EXTENSIONS, load_image, read_image, to_rgb
from starlayers.datasets.images import load_images
from tests.datasets.support import unchanged
from tests.helpers import properties

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


@pytest.mark.parametrize(("n", "set_aside"), [(10, 2), (23, 4), (3, 1), (4, 2)])
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


@pytest.mark.parametrize(
    ("sizes", "test_sizes"),
    [((60, 3), (12, 1)), ((9, 10), (1, 2)), ((2, 1), (1, 0)), ((15,), (3,))],
)
def test_every_class_is_divided_by_itself(tmp_path, sizes, test_sizes):
    for label, size in enumerate(sizes):
        for i in range(size):
            picture(tmp_path / f"class{label}" / f"{i:02}.png", (i, 0, 0), (2, 2))
    data = load_images("folder", path=tmp_path, size=2)
    assert f"{sum(test_sizes)} of {sum(sizes)} set aside" in data.source
    for part, wanted in (
        (data.test, test_sizes),
        (data.train, [n - held_out for n, held_out in zip(sizes, test_sizes)]),
    ):
        counts = Counter(label for _, label in pairs(part))
        assert [counts[label] for label in range(len(sizes))] == list(wanted)
    both = pairs(data.train) + pairs(data.test)
    assert len(set(both)) == len(both) == sum(sizes)


def test_one_image_a_class_is_too_few(tmp_path):
    for name in ("cat", "dog"):
        picture(tmp_path / name / "0.png", RED)
    message = f"{tmp_path} has one image in each of its classes; a class needs two or more"
    with pytest.raises(ValueError, match=message):
        load_images("folder", path=tmp_path)


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
    seen.remove(tuple(data.test[0][0][:, 0, 0].tolist()))
    assert seen == {RED, (GREY, GREY, GREY), (0, 0, 0)}
    # half transparent, over white
    half = [round(128 / 255 * value + 127 / 255 * 255) for value in RED]
    assert data.test[0][0][:, 0, 0].tolist() == pytest.approx(half, abs=1)


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


def test_a_class_without_images_is_named(tmp_path):
    picture(tmp_path / "cat" / "0.png", RED)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "0.heic").touch()
    with pytest.raises(FileNotFoundError, match=r"each class with one image at least \(.*dog"):
        load_images("folder", path=tmp_path)


def test_files_that_are_not_read_are_counted(tmp_path):
    for part in ("train", "val"):
        for i in range(2):
            picture(tmp_path / part / "cat" / f"{i}.png", RED)
        (tmp_path / part / "cat" / ".DS_Store").touch()
    for name in ("1.HEIC", "2.heic", "notes.txt", "README"):
        (tmp_path / "train" / "cat" / name).touch()
    (tmp_path / "val" / "cat" / "3.heic").touch()
    data = load_images("folder", path=tmp_path, size=2)
    ignored = "(5 other files ignored: .heic, .txt, README)"
    assert data.source == f"images in {tmp_path} {ignored}"
    data = load_images("folder", path=tmp_path / "train", size=2)
    assert data.source == (
        f"images in {tmp_path / 'train'}, 1 of 2 set aside for testing "
        "(4 other files ignored: .heic, .txt, README)"
    )


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_extension_is_read(tmp_path, extension):
    for name in (f"0{extension}", f"1{extension.upper()}"):
        mode = "1" if extension == ".pbm" else "L" if extension == ".pgm" else "RGB"
        picture(tmp_path / "x" / name, 255 if mode != "RGB" else (255, 255, 255), mode=mode)
    data = load_images("folder", path=tmp_path, size=4)
    assert len(data.train) + len(data.test) == 2
    assert data.source.endswith("set aside for testing")
    assert data.train[0][0].tolist() == [[[255] * 4] * 4] * 3


def test_a_moving_picture_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "0.gif", save_all=True, append_images=frames[1:])
    assert Image.open(tmp_path / "0.gif").n_frames == 2
    assert read_image(tmp_path / "0.gif").getpixel((0, 0)) == (255, 0, 0)


# --- pixels of every mode

GRADIENT = np.arange(256, dtype=np.uint8).reshape(16, 16)


def transparent(mode, *pixels):
    image = Image.new(mode, (len(pixels), 1))
    for i, pixel in enumerate(pixels):
        image.putpixel((i, 0), pixel)
    return image


def first_row(image):
    assert image.mode == "RGB"
    return [image.getpixel((i, 0)) for i in range(image.width)]


def grey(*values):
    return [(value,) * 3 for value in values]


def test_8_bits_stay_as_they_are():
    for image in (Image.fromarray(GRADIENT), Image.merge("RGB", [Image.fromarray(GRADIENT)] * 3)):
        rgb = np.asarray(to_rgb(image))
        assert np.array_equal(rgb, np.stack([GRADIENT] * 3, -1))


def test_1_bit_is_black_and_white():
    assert first_row(to_rgb(Image.fromarray(np.array([[True, False]])))) == grey(255, 0)


def test_a_palette_is_looked_up():
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert first_row(to_rgb(image)) == [(1, 2, 3), (40, 50, 60)]
    image.info["transparency"] = 1
    assert first_row(to_rgb(image)) == [(1, 2, 3), (255, 255, 255)]


def test_transparent_pixels_are_laid_over_white(tmp_path):
    opaque, clear, half = (10, 20, 30, 255), (10, 20, 30, 0), (10, 20, 30, 51)
    mixed = tuple(round(0.2 * value + 0.8 * 255) for value in (10, 20, 30))
    image = transparent("RGBA", opaque, clear, half)
    image.save(tmp_path / "a.png")
    for rgb in (to_rgb(image), read_image(tmp_path / "a.png")):
        assert first_row(rgb) == [(10, 20, 30), (255, 255, 255), mixed]
    image = transparent("LA", (10, 255), (10, 0), (0, 51))
    assert first_row(to_rgb(image)) == grey(10, 255, 204)
    # one colour declared to be transparent
    image = Image.new("L", (2, 1), 7)
    image.putpixel((1, 0), 8)
    image.save(tmp_path / "b.png", transparency=8)
    assert first_row(read_image(tmp_path / "b.png")) == grey(7, 255)


def test_colours_of_print_and_of_video():
    cmyk = transparent("CMYK", (0, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255))
    assert first_row(to_rgb(cmyk)) == [(255, 255, 255), (255, 0, 0), (0, 0, 0)]
    ycbcr = transparent("YCbCr", (255, 128, 128), (0, 128, 128), (77, 128, 128))
    assert first_row(to_rgb(ycbcr)) == grey(255, 0, 77)
    assert first_row(to_rgb(transparent("HSV", (0, 0, 90), (0, 255, 255)))) == [
        (90, 90, 90),
        (255, 0, 0),
    ]


@pytest.mark.parametrize("extension", [".png", ".tif", ".pgm"])
def test_16_bits_are_scaled(tmp_path, extension):
    values = np.array([[0, 257, 4095, 32896, 65278, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"0{extension}")
    assert first_row(read_image(tmp_path / f"0{extension}")) == grey(0, 1, 16, 128, 254, 255)


@properties
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=50))
def test_16_bits_are_rounded_to_the_nearest_of_8(values):
    for dtype in ("<u2", ">u2"):
        mode = {"<u2": "I;16", ">u2": "I;16B"}[dtype]
        raw = np.array(values, dtype).tobytes()
        image = Image.frombytes(mode, (len(values), 1), raw)
        assert first_row(to_rgb(image)) == grey(*(round(value / 257) for value in values))


def test_32_bit_integers_are_refused_by_name(tmp_path):
    file = tmp_path / "0.tif"
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(file)
    with pytest.raises(ValueError, match=f"{file} cannot be read .*32-bit integer pixels have no"):
        read_image(file)
    with pytest.raises(ValueError, match="convert them to 8 or 16 bits"):
        to_rgb(Image.fromarray(np.zeros((1, 1), np.int32)))


def test_floating_point_from_0_to_1_is_scaled(tmp_path):
    values = np.array([[0, 0.1, 0.5, 0.999, 1]], np.float32)
    Image.fromarray(values).save(tmp_path / "0.tif")
    assert first_row(read_image(tmp_path / "0.tif")) == grey(0, 26, 128, 255, 255)


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ([0, 255], "from 0 to 255"),
        ([0, 1.001], "from 0 to 1.001"),
        ([-0.001, 1], "from -0.001 to 1"),
        ([0, np.nan], "from nan to nan"),
        ([0, np.inf], "from 0 to inf"),
    ],
)
def test_other_floating_point_is_refused_by_name(tmp_path, values, seen):
    file = tmp_path / "0.tif"
    Image.fromarray(np.array([values], np.float32)).save(file)
    message = f"{file} cannot be read as an image: floating-point pixels {seen}; 0 .black. to 1"
    with pytest.raises(ValueError, match=message):
        read_image(file)


def test_the_lab_colour_space_is_converted():
    assert first_row(to_rgb(transparent("LAB", (128, 128, 128)))) == grey(119)


def test_a_mode_that_pillow_does_not_convert_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="La"):
        to_rgb(Image.new("La", (1, 1)))
    monkeypatch.setattr(Image, "open", lambda stream: Image.new("La", (1, 1)))
    (tmp_path / "0.psd").write_bytes(b"any")
    with pytest.raises(ValueError, match=r"0\.psd cannot be read as an image: .*La"):
        read_image(str(tmp_path / "0.psd"))


@pytest.mark.parametrize("extension", [".jpg", ".png", ".gif", ".webp", ".tif", ".bmp", ".ppm"])
@pytest.mark.parametrize("keep", [0.6, 0])
def test_a_truncated_image_is_named(tmp_path, extension, keep):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for part in ("train", "val"):
        (tmp_path / part / "x").mkdir(parents=True)
        Image.fromarray(noise).save(tmp_path / part / "x" / f"0{extension}")
    file = tmp_path / "val" / "x" / f"0{extension}"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    data = load_images("folder", path=tmp_path)
    with unchanged(tmp_path), pytest.raises(ValueError, match=f"{file} cannot be read as an image"):
        data.test[0]


def test_a_folder_is_never_written_to(tmp_path):
    for i in range(5):
        picture(tmp_path / "cat" / f"{i}.png", RED)
    with unchanged(tmp_path):
        data = load_images("folder", path=tmp_path)
        assert len(pairs(data.train) + pairs(data.test)) == 5
    with unchanged(tmp_path), pytest.raises(FileNotFoundError):
        load_images("folder", path=tmp_path / "cat")


@pytest.mark.parametrize("extension", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright(tmp_path, extension, orientation):
    upright = np.zeros((16, 24), np.uint8)
    upright[:8, :8] = 255  # white above left
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: np.rot90(upright, 2).T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / f"a{extension}", exif=exif)
    image = read_image(tmp_path / f"a{extension}")
    assert image.size == (24, 16)
    assert np.abs(np.asarray(image)[..., 0].astype(int) - upright).max() < 9  # JPEG's loss


def test_an_image_is_read_as_the_training_reads_it(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 256, (30, 50, 3)).astype(np.uint8)
        file = tmp_path / "train" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    data = load_images("folder", path=tmp_path / "train", size=16)
    wanted = dict(zip(*read_all(data)))
    for name, image in wanted.items():
        assert torch.equal(load_image(name, (3, 16, 16)), image)
    grey = load_image(name, (1, 16, 16))
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    # the resizing is rounded after the channels are mixed, or before
    torch.testing.assert_close(grey[0].float(), (image * weights).sum(0), rtol=0, atol=2)
    assert load_image(name, (3, 10, 20)).shape == (3, 10, 20)


def read_all(data):
    """Return files and images of both parts."""
    subsets = [(part.dataset, i) for part in (data.train, data.test) for i in range(len(part))]
    return [s.dataset.samples[s.indices[i]][0] for s, i in subsets], [s[i][0] for s, i in subsets]


def test_images_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no image file at {tmp_path}/a"):
        load_image(tmp_path / "a.png", (3, 8, 8))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{tmp_path}/a.png cannot be read"):
        load_image(tmp_path / "a.png", (3, 8, 8))
    picture(tmp_path / "b.png", GREY)
    with pytest.raises(ValueError, match="1 or 3 channels, the shape asks for 4"):
        load_image(tmp_path / "b.png", (4, 8, 8))


def test_unequal_classes_are_told(tmp_path):
    for i in range(12):
        picture(tmp_path / "many" / f"{i}.png", (i, 0, 0))
    for i in range(3):
        picture(tmp_path / "few" / f"{i}.png", (i, 9, 0))
    source = load_images("folder", path=tmp_path).source
    assert source.endswith("3 of 15 set aside for testing, 2 to 10 training images a class")


def test_files_are_read_once(tmp_path, monkeypatch):
    for i in range(5):
        picture(tmp_path / "a" / f"{i}.png", (i, 0, 0))
    data = load_images("folder", path=tmp_path, size=8)
    first = [data.train[i][0] for i in range(4)]
    for file in (tmp_path / "a").iterdir():
        file.write_bytes(b"changed")
    assert all(torch.equal(data.train[i][0], image) for i, image in enumerate(first))
    with pytest.raises(ValueError, match="cannot be read"):  # not yet read
        data.test[0]
    monkeypatch.setattr("starlayers.datasets.images.MEMORY", 8 * 8 * 3 * 4)
    for i in range(5):
        picture(tmp_path / "a" / f"{i}.png", (i, 0, 0))
    data = load_images("folder", path=tmp_path, size=8)
    (tmp_path / "a" / "0.png").write_bytes(b"changed")
    with pytest.raises(ValueError, match="cannot be read"):
        [data.train[i] for i in range(4)]
