"""StarNets made by timm's own factory, against timm's StarNet with the same weights.

What timm's `tests/test_models.py` asks of a model is asked here of ours, without a network.
"""

import inspect
import json
from functools import partial

import huggingface_hub
import pytest
import timm
import torch
from timm.models import (
    group_parameters,
)
from timm.optim import param_groups_layer_decay
from torch import nn

import starlayers.vision.timm  # noqa: F401  registers
from starlayers import vision
from starlayers.coefficients.modules import SumMLP
from starlayers.vision import STARNETS, StarNet, load_checkpoint, save_weights, to_timm_state_dict
from starlayers.vision.names import timm_name

from .util import (
    assert_same_tensors,
    image,
    randomise,
    relative_error,
    saved,
    saved_safely,
    snapshot,
)

NAME = "starlayers_starnet_s050"
#: all seven, of which only the smallest runs in the quick tier
RUN = [
    f"starlayers_{n}" if n == "starnet_s050" else pytest.param(f"starlayers_{n}", marks=SLOW)
    for SLOW in [pytest.mark.slow]
    for n in STARNETS
]


def make(name=NAME, seed=0, **kwargs):
    return randomise(timm.create_model(name, **kwargs), seed).eval()


def peer(ours, name="starnet_s050", **kwargs):
    """Return timm's network with our weights."""
    theirs = timm.create_model(name, **{"num_classes": ours.num_classes, **kwargs})
    theirs.load_state_dict(to_timm_state_dict(ours))
    return theirs.train(ours.training)


# --- registration


def test_every_name_is_registered_and_timms_own_stay():
    names = set(timm.list_models("*starnet*"))
    assert names >= {f"starlayers_{name}" for name in STARNETS} | set(STARNETS)
    assert not isinstance(timm.create_model("starnet_s050"), StarNet)


def test_networks_with_weights_are_listed_with_their_tag():
    listed = set(timm.list_models("starlayers_*", pretrained=True))
    assert listed == {f"starlayers_starnet_s{i}.in1k" for i in (1, 2, 3, 4)}
    for i in (1, 2, 3, 4):
        config = timm.models.get_pretrained_cfg(f"starlayers_starnet_s{i}.in1k")
        assert config.hf_hub_id == STARNETS[f"starnet_s{i}"].hub_id
        assert config.architecture == f"starlayers_starnet_s{i}"
        assert timm.models.is_model_pretrained(f"starlayers_starnet_s{i}")
    assert not timm.models.is_model_pretrained(NAME)


def test_entry_points_are_named_and_documented():
    for name in STARNETS:
        create = timm.models.model_entrypoint(f"starlayers_{name}")
        assert create.__name__ == create.__qualname__ == f"starlayers_{name}"
        assert create.__module__ == "starlayers.vision.timm"
        assert create.__doc__ == getattr(vision, name).__doc__
        assert inspect.signature(create).parameters["pretrained"].default is False


def test_create_model_builds_ours_with_its_arguments():
    model = timm.create_model(
        NAME, num_classes=7, in_chans=1, drop_path_rate=0.2, stem_stride=1, mlp_layer=SumMLP
    )
    assert isinstance(model, StarNet)
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 7)
    assert model.stages[-1][-1].drop_path.p == pytest.approx(0.2)
    assert type(model.stages[0][1].mlp) is SumMLP
    with pytest.raises(TypeError, match="no_such_argument"):
        timm.create_model(NAME, no_such_argument=1)


def test_timms_data_configuration_fits():
    model = timm.create_model("starlayers_starnet_s1")
    config = timm.data.resolve_model_data_config(model)
    theirs = timm.create_model("starnet_s1")
    assert config == timm.data.resolve_model_data_config(theirs)
    assert model.default_cfg is model.pretrained_cfg
    different = {k for k, v in theirs.default_cfg.items() if model.default_cfg.get(k) != v}
    assert different == {"architecture", "first_conv"}
    for key in ("first_conv", "classifier"):
        assert f"{model.default_cfg[key]}.weight" in model.state_dict()
    grey = [timm.create_model(n, num_classes=7, in_chans=1) for n in (NAME, "starnet_s050")]
    assert [m.in_chans for m in grey] == [1, 1]
    assert len({str(timm.data.resolve_model_data_config(m)) for m in grey}) == 1


@pytest.mark.parametrize("name", RUN)
def test_the_network_is_timms_in_value_and_shape(name):
    ours = make(name, num_classes=20)
    theirs, x = peer(ours, name.removeprefix("starlayers_")), image(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-5
    for attribute in ("num_classes", "num_features", "head_hidden_size", "in_chans"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)


# --- weights


@pytest.mark.parametrize("kind", ["timm", "authors", "ours", "safetensors", "described"])
def test_checkpoint_path_takes_files_of_every_source(kind, tmp_path):
    source = make(seed=1, num_classes=10)
    state = source.state_dict()
    timms = peer(source).state_dict()
    writers = {
        "timm": lambda: saved(timms, tmp_path / "m.pth"),
        "authors": lambda: saved({"epoch": 3, "state_dict": timms}, tmp_path / "m.pth.tar"),
        "ours": lambda: saved(state, tmp_path / "m.pth"),
        "safetensors": lambda: saved_safely(timms, tmp_path / "m.safetensors"),
        "described": lambda: save_weights(source, tmp_path / "m.safetensors"),
    }
    path = writers[kind]() or tmp_path / "m.safetensors"
    model = timm.create_model(NAME, num_classes=10, checkpoint_path=str(path))
    assert_same_tensors(snapshot(model), snapshot(source))


@pytest.mark.parametrize("names", ["timm", "starlayers"])
def test_pretrained_weights_are_taken_from_the_file_that_the_overlay_names(names, tmp_path):
    source = make(seed=1)
    state = to_timm_state_dict(source) if names == "timm" else source.state_dict()
    path = saved_safely(state, tmp_path / "model.safetensors")
    load = partial(
        timm.create_model, NAME, pretrained=True, pretrained_cfg_overlay={"file": str(path)}
    )
    assert_same_tensors(snapshot(load()), snapshot(source))
    grey = load(in_chans=1, num_classes=5)
    assert grey.head.weight.shape == (5, 128)
    want = source.stem.conv.weight.detach().sum(1, keepdim=True)
    torch.testing.assert_close(grey.stem.conv.weight.detach(), want)
    assert torch.equal(load(num_classes=0).norm.weight, source.norm.weight)
    maps = load(features_only=True)(image(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == [16, 32, 64, 128]


def test_the_overlay_changes_the_configuration_alone():
    model = timm.create_model(NAME, pretrained_cfg_overlay={"crop_pct": 0.5}, features_only=False)
    assert model.pretrained_cfg["crop_pct"] == 0.5
    assert timm.create_model(NAME).pretrained_cfg["crop_pct"] == 0.875


def test_pretrained_without_weights_is_an_error():
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {NAME}"):
        timm.create_model(NAME, pretrained=True)


def test_pretrained_asks_for_timms_repository(monkeypatch, tmp_path):
    source = make("starlayers_starnet_s1", seed=1)
    path, asked = saved_safely(to_timm_state_dict(source), tmp_path / "m.safetensors"), []

    def download(repo_id, filename, **_):
        asked.append((repo_id, filename))
        return str(path)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    model = timm.create_model("starlayers_starnet_s1.in1k", pretrained=True)
    assert asked == [("timm/starnet_s1.in1k", "model.safetensors")]
    assert_same_tensors(snapshot(model), snapshot(source))


def test_a_folder_saved_for_the_hub_is_built_again(tmp_path):
    model, x = make(seed=1, num_classes=5, stem_stride=1), image(1, 3, 32, 32)
    args = {"stem_stride": 1}
    timm.models._hub.save_for_hf(model, tmp_path, model_args=args, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == (NAME, 5)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_same_tensors(snapshot(again), snapshot(model))
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_a_push_to_the_hub_names_the_architecture(monkeypatch):
    pushed = {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})

        def file_exists(self, **_):
            return True

        def upload_folder(self, *, folder_path, **_):
            with open(f"{folder_path}/config.json") as file:
                pushed.update(json.load(file))

    monkeypatch.setattr(timm.models._hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    timm.models.push_to_hf_hub(make(num_classes=5), "me/flowers")
    assert pushed["architecture"] == NAME


# --- options of heads and norms

POOLS = ["avg", "max", "avgmax", "catavgmax"]
FAST = ["fast", *(f"fast{pool}" for pool in POOLS)]


@pytest.mark.parametrize("pool", [*POOLS, *FAST])
def test_pools_are_timms(pool):
    ours, x = make(num_classes=10, global_pool=pool), image(2, 3, 64, 96)
    theirs = peer(ours, global_pool=pool)
    assert ours.head_hidden_size == theirs.head_hidden_size
    assert ours.global_pool.feat_mult() == theirs.global_pool.feat_mult()
    with torch.no_grad():
        features = ours.forward_features(x)
        for options in ({}, {"pre_logits": True}):
            got, want = (m.forward_head(features, **options) for m in (ours, theirs))
            torch.testing.assert_close(got, want)
    for model in (ours, theirs):
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        model.reset_classifier(3, "avg")
        assert model.head.in_features == 128


def test_options_of_norms_reach_every_one():
    model = timm.create_model(NAME, bn_momentum=0.02, bn_eps=1e-3)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 18
    assert {(m.momentum, m.eps) for m in norms} == {(0.02, 1e-3)}
    assert {m.momentum for m in timm.create_model(NAME).modules() if type(m) is type(norms[0])} == {
        0.1
    }


@pytest.mark.parametrize("norm_layer", ["groupnorm1", partial(nn.BatchNorm2d, momentum=0.02)])
def test_another_norm_by_name_or_class(norm_layer):
    model = timm.create_model(NAME, norm_layer=norm_layer, num_classes=3)
    kind = type(model.norm)
    assert {type(m.bn) for m in model.modules() if hasattr(m, "bn")} == {kind}
    assert kind.__name__ == ("GroupNorm1" if norm_layer == "groupnorm1" else "BatchNorm2d")
    assert model(image(2, 3, 64, 64)).isfinite().all()
    if kind is nn.BatchNorm2d:
        assert model.norm.momentum == 0.02


@pytest.mark.parametrize("coarse", [False, True])
def test_groups_of_parameters_are_timms(coarse):
    ours, theirs = timm.create_model(NAME), timm.create_model("starnet_s050")
    groups = []
    for model in (ours, theirs):
        grouped = group_parameters(model, model.group_matcher(coarse), reverse=True)
        groups.append({timm_name(name): number for name, number in grouped.items()})
    assert groups[0] == groups[1]
    assert len(set(groups[0].values())) == (6 if coarse else 12)


def test_rates_fall_from_layer_to_layer():
    model = timm.create_model(NAME)
    assert model.no_weight_decay() == set()
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[id(model.head.weight)] == 1
    assert scales[id(model.stem.conv.weight)] < scales[id(model.stages[3][1].mlp.g.weight)] < 1
    assert len(scales) == len(list(model.parameters()))


def test_frozen_networks_stay_frozen_and_keep_their_place():
    model = timm.create_model(NAME, device="meta", dtype=torch.float64).eval()
    model.requires_grad_(False)
    for call in ((0,), (0, "")):
        model.reset_classifier(*call)
        assert not [n for n, p in model.named_parameters() if p.requires_grad]
    model.reset_classifier(2)
    head = model.get_classifier()
    assert (head.weight.dtype, head.weight.device.type) == (torch.float64, "meta")
    assert not any(m.training for m in model.modules())


def test_a_network_changes_its_type_after_a_call():
    model, x = make(), image(1, 3, 32, 32)
    model(x)
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_load_checkpoint_of_ours_takes_a_network_of_timms_factory(tmp_path):
    source = make(seed=1, num_classes=10)
    save_weights(source, tmp_path / "m.safetensors")
    model = timm.create_model(NAME, num_classes=10)
    load_checkpoint(model, tmp_path / "m.safetensors")
    assert_same_tensors(snapshot(model), snapshot(source))
