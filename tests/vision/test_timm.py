"""Our StarNets through timm's own factory."""

import pytest
import timm
import torch

import starlayers.vision.timm  # noqa: F401  registers
from starlayers.vision import STARNETS, StarNet


def test_every_name_is_registered_and_timms_own_stay():
    names = set(timm.list_models("*starnet*"))
    assert names >= {f"starlayers_{name}" for name in STARNETS} | set(STARNETS)
    assert not isinstance(timm.create_model("starnet_s050"), StarNet)


def test_create_model_builds_ours_with_its_arguments():
    model = timm.create_model(
        "starlayers_starnet_s050", num_classes=7, in_chans=1, drop_path_rate=0.2, stem_stride=1
    )
    assert isinstance(model, StarNet)
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 7)
    assert model.stages[-1][-1].drop_path.p == pytest.approx(0.2)


def test_timms_data_configuration_fits():
    model = timm.create_model("starlayers_starnet_s1")
    config = timm.data.resolve_model_data_config(model)
    peer = timm.data.resolve_model_data_config(timm.create_model("starnet_s1"))
    assert config == peer


def test_features_only_points_to_forward_intermediates():
    with pytest.raises(ValueError, match="forward_intermediates"):
        timm.create_model("starlayers_starnet_s050", features_only=True)


def test_pretrained_without_weights_is_an_error():
    with pytest.raises(ValueError, match="starnet_s050 has no published weights"):
        timm.create_model("starlayers_starnet_s050", pretrained=True)
