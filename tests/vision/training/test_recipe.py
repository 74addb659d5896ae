"""Recipes chosen by the data, and the weights of classes."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, Subset, TensorDataset

from starlayers.vision.training import TrainConfig
from starlayers.vision.training.data import class_weights, labels_of
from tests.helpers import properties


def of(images, side=64, channels=3):
    return SimpleNamespace(train=range(images), shape=(channels, side, side))


@pytest.mark.parametrize(
    ("images", "side", "want"),
    [
        (240, 64, {"batch_size": 16, "epochs": 67, "lr": 1.4e-3, "crop": 8}),
        (60_000, 28, {"batch_size": 128, "epochs": 4, "lr": 4e-3, "crop": 0, "ema": 0.9979}),
        (1_437, 8, {"batch_size": 128, "epochs": 84, "lr": 4e-3, "crop": 1}),
        (600, 224, {"batch_size": 64, "epochs": 100, "lr": 2.8e-3, "crop": 28}),
        (10, 64, {"batch_size": 10, "epochs": 1000}),
        (1_281_167, 224, {"batch_size": 128, "epochs": 4, "ema": 0.9998}),
    ],
)
def test_the_recipe_follows_the_data(images, side, want):
    config = TrainConfig.for_data(of(images, side))
    assert {name: getattr(config, name) for name in want} == want


@properties
@given(images=st.integers(2, 10**6), epochs=st.none() | st.integers(1, 50))
def test_every_number_of_images_has_a_recipe(images, epochs):
    options = {} if epochs is None else {"epochs": epochs}
    config = TrainConfig.for_data(of(images), **options)
    steps = config.epochs * -(-images // config.batch_size)
    assert config.batch_size <= min(images, 128)
    assert 0 <= config.ema < 1
    assert config.epochs == epochs if epochs else steps >= 1000


def test_gray_images_are_not_mirrored():
    """They may be of letters."""
    assert [TrainConfig.for_data(of(99, 28, c)).flip for c in (1, 3)] == [0.0, 0.5]
    assert TrainConfig.for_data(of(99, 28, 1), flip=0.2).flip == 0.2


def test_what_is_given_is_kept():
    given = {"batch_size": 100, "epochs": 2, "lr": 0.5, "crop": 3, "ema": 0.0, "balance": "loss"}
    config = TrainConfig.for_data(of(240), **given)
    assert {name: getattr(config, name) for name in given} == given
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TrainConfig.for_data(of(240), batch_size=0)


class Files(Dataset):
    """Images whose labels are known by reading them alone."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        if i > 2:
            raise AssertionError("read past the end")
        return torch.zeros(1, 2, 2), 2 - i


def test_labels_of_every_kind_of_data_set():
    tensors = TensorDataset(torch.zeros(4, 1), torch.tensor([3, 1, 2, 0], dtype=torch.uint8))
    assert labels_of(tensors).tolist() == [3, 1, 2, 0]
    assert labels_of(Subset(Subset(tensors, [0, 2, 3]), [2, 1])).tolist() == [0, 2]
    assert labels_of(SimpleNamespace(targets=[1, 0])).tolist() == [1, 0]
    assert labels_of(Files()).tolist() == [2, 1, 0]


def test_a_class_without_images_has_no_weight():
    assert class_weights(torch.tensor([0, 0, 2]), 4).tolist() == pytest.approx([0.75, 0, 1.5, 0])
