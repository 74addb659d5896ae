"""Networks read from a run: the right ones, and nothing that would predict wrongly."""

import pytest
import torch
from safetensors.torch import save_file

from starlayers.vision import StarNet, TrainedNet, load_run, save_weights

USAGE = {"classes": ["cat", "dog"], "mean": [0.5], "std": [0.25], "size": 12}


def small(**kwargs):
    torch.manual_seed(0)
    arguments = {"stem_stride": 1, "stage_strides": (2,), "num_classes": 2, "in_chans": 1}
    return StarNet(8, (1,), **arguments | kwargs).eval()


@pytest.fixture
def file(tmp_path):
    save_weights(small(), tmp_path / "model.safetensors", **USAGE)
    return tmp_path / "model.safetensors"


def test_a_folder_and_a_file_give_the_trained_network(file):
    images = torch.randint(0, 256, (3, 1, 12, 12), dtype=torch.uint8)
    want = small()((images.float() / 255 - 0.5) / 0.25)
    for path in (file, file.parent, str(file)):
        net = load_run(path)
        assert not net.model.training
        assert (net.classes, net.size) == (("cat", "dog"), (12, 12))
        torch.testing.assert_close(net.logits(images), want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"stem_stride": 2, "stage_strides": (1,)},
        {"kernel_size": 3},
        {"act": "gelu"},
        {"mlp_ratio": 3},
        {"in_chans": 3},
        {"global_pool": "max"},
    ],
    ids=str,
)
def test_every_architecture_comes_back(tmp_path, changes):
    model = small(**changes)
    channels = model.in_chans
    usage = {**USAGE, "mean": [0.5] * channels, "std": [0.25] * channels}
    save_weights(model, tmp_path / "model.safetensors", **usage)
    images = torch.randint(0, 256, (2, channels, 12, 12), dtype=torch.uint8)
    want = model((images.float() / 255 - 0.5) / 0.25)
    torch.testing.assert_close(load_run(tmp_path).logits(images), want, rtol=0, atol=0)


def test_fused_weights_come_back_fused(tmp_path):
    model = small().fuse()
    save_weights(model, tmp_path / "model.safetensors", **USAGE)
    images = torch.randint(0, 256, (2, 1, 12, 12), dtype=torch.uint8)
    want = model((images.float() / 255 - 0.5) / 0.25)
    torch.testing.assert_close(load_run(tmp_path).logits(images), want, rtol=0, atol=0)


def test_predictions_are_the_largest_probabilities(file):
    net = load_run(file)
    images = torch.randint(0, 256, (4, 1, 12, 12), dtype=torch.uint8)
    shares = net.logits(images).softmax(1)
    for (one,), two, row in zip(net.predict(images), net.predict(images, top=5), shares.tolist()):
        assert one == two[0]
        assert [name for name, _ in two] == ["dog", "cat"][:: 1 if row[1] > row[0] else -1]
        assert sum(share for _, share in two) == pytest.approx(1)
        assert one[1] == pytest.approx(max(row))


@pytest.mark.parametrize("missing", ["classes", "size", "mean"])
def test_a_file_that_does_not_say_what_it_is_of_is_refused(tmp_path, missing):
    left = {"mean", "std"} if missing == "mean" else {missing}
    usage = {k: v for k, v in USAGE.items() if k not in left}
    save_weights(small(), tmp_path / "model.safetensors", **usage)
    with pytest.raises(ValueError, match=f"does not say its {missing}"):
        load_run(tmp_path)


def test_weights_of_others_are_refused(tmp_path):
    save_file(small().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not say its architecture, classes, mean, std, size"):
        load_run(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path, file):
    with pytest.raises(FileNotFoundError, match=f"no weights in {tmp_path}/nothing"):
        load_run(tmp_path / "nothing")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{file}.*truncated"):
        load_run(file)


def test_images_unlike_those_of_the_training_are_refused(file):
    net = load_run(file)
    assert isinstance(net, TrainedNet)
    with pytest.raises(TypeError, match=r"uint8 from 0 to 255, got torch\.float32"):
        net.logits(torch.rand(1, 1, 12, 12))
    for shape in ((1, 1, 12, 13), (1, 3, 12, 12), (1, 12, 12)):
        with pytest.raises(ValueError, match=r"trained on images \(1, 12, 12\), got"):
            net.predict(torch.zeros(shape, dtype=torch.uint8))
