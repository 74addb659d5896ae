"""StarNets made by timm's own factory."""

import inspect

import pytest
import timm
import torch

import starlayers.vision.timm  # noqa: F401  registers
from starlayers import vision
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
    assert model.default_cfg is model.pretrained_cfg
    assert (model.default_cfg["first_conv"], model.default_cfg["classifier"]) == (
        "stem.conv",
        "head",
    )
    assert model.default_cfg["num_classes"] == 1000
    grey = timm.create_model("starlayers_starnet_s050", num_classes=7, in_chans=1).default_cfg
    assert (grey["num_classes"], grey["input_size"]) == (7, (1, 224, 224))


def test_arguments_for_timms_own_loading_are_accepted(tmp_path):
    model = timm.create_model(
        "starlayers_starnet_s050",
        cache_dir=tmp_path,
        pretrained_cfg_overlay={"crop_pct": 0.5},
        features_only=False,
    )
    assert model.num_classes == 1000


def test_entry_points_are_named_and_documented():
    for name in STARNETS:
        create = timm.models.model_entrypoint(f"starlayers_{name}")
        assert create.__name__ == create.__qualname__ == f"starlayers_{name}"
        assert create.__module__ == "starlayers.vision.timm"
        assert create.__doc__ == getattr(vision, name).__doc__
        assert inspect.signature(create).parameters["pretrained"].default is False


def test_features_only_points_to_forward_intermediates():
    message = "starlayers_starnet_s050 has no features_only; call model.forward_intermediates"
    with pytest.raises(ValueError, match=message):
        timm.create_model("starlayers_starnet_s050", features_only=True)


def test_pretrained_without_weights_is_an_error():
    with pytest.raises(ValueError, match="starnet_s050 has no published weights"):
        timm.create_model("starlayers_starnet_s050", pretrained=True)
