"""Weights files: the architecture they name, what is refused, and that they are whole."""

import json
from functools import partial

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from starlayers import vision
from starlayers.coefficients import modules as variants
from starlayers.modules import StarMLP
from starlayers.vision import (
    architecture,
    from_architecture,
    load_checkpoint,
    read_architecture,
    read_metadata,
    save_weights,
)
from starlayers.vision.weights import checksum, differences

from .util import assert_same_tensors, image, snapshot, tiny

TINY = {
    "class": "StarNet",
    "base_dim": 8,
    "depths": [1, 2],
    "mlp_ratio": 4,
    "num_classes": 10,
    "in_chans": 3,
    "drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "act": "relu6",
    "mlp_layer": {"class": "StarMLP"},
    "global_pool": "avg",
    "kernel_size": 7,
    "stem_stride": 2,
    "stage_strides": [2, 2],
    "norm_layer": {"class": "BatchNorm2d"},
}
# arguments -> the entries in which the architecture then differs from TINY
OPTIONS = {
    "defaults": ({}, {}),
    "strides": (
        {"stem_stride": 1, "stage_strides": (1, 3)},
        {"stem_stride": 1, "stage_strides": [1, 3]},
    ),
    "kernel": ({"kernel_size": 3}, {"kernel_size": 3}),
    "shape": (
        {"base_dim": 4, "depths": (2, 1, 1), "stage_strides": (2, 2, 2), "mlp_ratio": 2.5},
        {"base_dim": 4, "depths": [2, 1, 1], "stage_strides": [2, 2, 2], "mlp_ratio": 2.5},
    ),
    "head": (
        {"num_classes": 0, "global_pool": "", "in_chans": 1, "drop_rate": 0.1},
        {"num_classes": 0, "global_pool": "", "in_chans": 1, "drop_rate": 0.1},
    ),
    "drop_path": ({"drop_path_rate": 0.2}, {"drop_path_rate": pytest.approx(0.2)}),
    "activation": ({"act": "gelu"}, {"act": "gelu"}),
    "no_activation": ({"act": None}, {"act": "identity"}),
    "sum": ({"mlp_layer": variants.SumMLP}, {"mlp_layer": {"class": "SumMLP"}}),
    "scaled": ({"mlp_layer": variants.ScaledStarMLP}, {"mlp_layer": {"class": "ScaledStarMLP"}}),
    "dynamic": (
        {"mlp_layer": variants.DynamicStarMLP},
        {"mlp_layer": {"class": "DynamicStarMLP"}},
    ),
    "rank": (
        {"mlp_layer": partial(variants.RankStarMLP, rank=3, offset=1.0)},
        {"mlp_layer": {"class": "RankStarMLP", "rank": 3, "offset": 1.0}},
    ),
    "offset": (
        {"mlp_layer": partial(StarMLP, offset=1.0, bias=False)},
        {"mlp_layer": {"class": "StarMLP", "offset": 1.0, "bias": False}},
    ),
    "norm": (
        {"norm_layer": partial(nn.BatchNorm2d, eps=1e-3, momentum=0.05)},
        {"norm_layer": {"class": "BatchNorm2d", "eps": 1e-3, "momentum": 0.05}},
    ),
}


def written(model, path, **kwargs):
    save_weights(model, path, **kwargs)
    return path


@pytest.mark.parametrize(("options", "entries"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("fused", [False, True], ids=["trained", "fused"])
def test_a_file_builds_its_network_again(options, entries, fused, tmp_path):
    model = tiny(**options).eval()
    found = architecture(model)
    assert found == {**TINY, **entries}
    x = image(2, model.in_chans, 24, 24)
    if fused:
        assert architecture(model.fuse())["fused"] is True
    path = written(model, tmp_path / "model.safetensors")
    saved = read_architecture(path)
    assert saved == json.loads(json.dumps(architecture(model)))
    again = from_architecture(saved).eval()
    assert load_checkpoint(again, path).loaded == len(model.state_dict())
    assert_same_tensors(snapshot(again), snapshot(model))
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


PRUNED = {
    "stages": ({"indices": [0]}, {"depths": [1], "stage_strides": [2], "num_classes": 0}),
    "norm": ({"indices": [1], "prune_norm": True, "prune_head": False}, {"num_classes": 10}),
}


@pytest.mark.parametrize(("options", "entries"), PRUNED.values(), ids=PRUNED)
def test_a_pruned_network_is_described_and_built(options, entries, tmp_path):
    model, x = tiny().eval(), image(1, 3, 16, 16)
    model.prune_intermediate_layers(**options)
    path = written(model, tmp_path / "m.safetensors")
    described = read_architecture(path)
    assert described["pruned"] is True
    assert {k: described[k] for k in entries} == entries
    again = from_architecture(described).eval()
    load_checkpoint(again, path)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("stride", [4, 2])
def test_a_dilated_network_is_described_with_the_strides_it_would_have(stride, tmp_path):
    dilated = tiny(output_stride=stride)
    described = architecture(dilated)
    assert (described["stage_strides"], described["output_stride"]) == ([2, 2], stride)
    again = from_architecture(described)
    assert again.feature_info == dilated.feature_info
    assert str(again) == str(dilated)
    # its weights are those of the network that is not dilated
    load_checkpoint(tiny(2), written(dilated, tmp_path / "m.safetensors"))


@pytest.mark.parametrize("name", vision.STARNETS)
def test_published_networks_are_described_by_their_arguments(name):
    model = getattr(vision, name)(device="meta")
    again = from_architecture(architecture(model), device="meta")
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, again)]
    assert shapes[0] == shapes[1]
    variant = vision.STARNETS[name]
    found = architecture(model)
    assert (found["base_dim"], tuple(found["depths"]), found["mlp_ratio"]) == variant[:3]


def test_arguments_override_the_architecture():
    described = architecture(tiny())
    model = from_architecture(described, num_classes=3, in_chans=1, dtype=torch.float64)
    assert model(image(2, 1, 16, 16, dtype=torch.float64)).shape == (2, 3)
    assert described == architecture(tiny()), "the caller's dictionary is left alone"


def test_norms_of_several_processes_are_described_as_batch_norms():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(tiny())
    assert architecture(model) == TINY


def test_what_is_beside_the_weights_is_read_back(tmp_path):
    model = tiny(num_classes=2, in_chans=1)
    path, usage = tmp_path / "m.safetensors", {"classes": ("cat", "dog"), "mean": [0.1]}
    save_weights(model, path, **usage, std=torch.tensor([0.2], dtype=torch.float64), size=28)
    metadata = read_metadata(path)
    assert metadata.pop("sha256") == checksum(model.state_dict())
    assert metadata == {
        "architecture": architecture(model),
        "classes": ["cat", "dog"],
        "mean": [0.1],
        "std": [0.2],
        "size": [28, 28],
    }
    save_weights(model, str(path), size=(20, 30))
    assert read_metadata(str(path))["size"] == [20, 30]
    assert [f.name for f in tmp_path.iterdir()] == ["m.safetensors"]


def test_weights_of_others_are_written_without_an_architecture(tmp_path):
    layer = nn.Linear(2, 3)
    path = written(layer, tmp_path / "m.safetensors", classes=["a", "b"])
    assert read_architecture(path) is None
    assert read_metadata(path)["classes"] == ["a", "b"]
    assert_same_tensors(load_file(path), snapshot(layer))


def test_averaged_weights_are_written_in_place_of_the_networks_own(tmp_path):
    model, average = tiny(1), tiny(2)
    path = written(model, tmp_path / "m.safetensors", state=average.state_dict())
    load_checkpoint(model, path)
    assert_same_tensors(snapshot(model), snapshot(average))


def test_files_of_others_say_nothing(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    torch.save({}, tmp_path / "m.pth")
    assert read_metadata(tmp_path / "m.safetensors") == read_metadata(tmp_path / "m.pth") == {}
    assert read_architecture(tmp_path / "m.safetensors") is None


# --- what is refused

OTHER = {
    "strides": ({"stage_strides": (1, 2)}, r"stage_strides is \[2, 2\] in the file and \[1, 2\]"),
    "stem": ({"stem_stride": 1}, "stem_stride is 2 in the file and 1 in the model"),
    "kernel": ({"kernel_size": 3}, "kernel_size is 7 in the file and 3 in the model"),
    "activation": ({"act": "gelu"}, "act is 'relu6' in the file and 'gelu' in the model"),
    "depth": (
        {"depths": (2, 2)},
        r"depths is \[1, 2\] in the file and \[2, 2\] in the model",
    ),
    "sum": ({"mlp_layer": variants.SumMLP}, "mlp_layer is {'class': 'StarMLP'} in the file and"),
    "eps": ({"norm_layer": partial(nn.BatchNorm2d, eps=1e-3)}, "'eps': 0.001} in the model"),
}


@pytest.mark.parametrize(("options", "message"), OTHER.values(), ids=OTHER)
def test_weights_of_another_network_are_refused(options, message, tmp_path):
    path = written(tiny(1), tmp_path / "m.safetensors")
    model = tiny(2, **options)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"m\.safetensors is of another network: .*{message}"):
        load_checkpoint(model, path)
    assert_same_tensors(snapshot(model), before)


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 4},
        {"in_chans": 1},
        {"drop_rate": 0.5, "drop_path_rate": 0.1},
        {"num_classes": 0, "global_pool": ""},
        {"norm_layer": partial(nn.BatchNorm2d, momentum=0.01)},
    ],
    ids=["classes", "channels", "dropout", "features", "momentum"],
)
def test_what_is_adapted_or_for_training_alone_may_differ(options, tmp_path):
    path = written(tiny(1), tmp_path / "m.safetensors")
    model = tiny(2, **options)
    load_checkpoint(model, path)
    assert torch.equal(model.norm.weight, tiny(1).norm.weight)


def test_the_weights_alone_load_into_other_strides(tmp_path):
    path = written(tiny(1), tmp_path / "m.safetensors")
    model = tiny(2, stage_strides=(1, 2))
    load_checkpoint(model, load_file(path))
    assert_same_tensors(snapshot(model), snapshot(tiny(1)))


def test_changed_weights_are_noticed(tmp_path):
    path = written(tiny(1), tmp_path / "m.safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    state["head.bias"] += 1
    save_file(state, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"m\.safetensors was changed since it was written"):
        load_checkpoint(tiny(2), path)


def test_a_changed_network_is_saved_with_a_warning(tmp_path):
    model = tiny(1)
    model.stages[1][1] = nn.Identity()
    message = "was changed after it was made.*one ConvNorm followed by StarBlock2d"
    with pytest.raises(ValueError, match=message):
        architecture(model)
    with pytest.warns(UserWarning, match=f"without an architecture: .*{message}"):
        path = written(model, tmp_path / "m.safetensors")
    assert_same_tensors(load_file(path), snapshot(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.stages[1][1].mlp, "act", "gelu"), "act differs between its blocks"),
        (lambda m: setattr(m.stages[0][0].bn, "eps", 1.0), "norm_layer differs between its blocks"),
        (lambda m: setattr(m.stages[0][1], "mlp", nn.Linear(8, 8)), "no attribute 'hidden_feat"),
        (lambda m: m.stages.add_module("0", nn.Sequential()), "is not one ConvNorm"),
    ],
    ids=["activation", "norm", "mlp", "empty_stage"],
)
def test_networks_that_arguments_cannot_give_are_named(change, message):
    model = tiny()
    change(model)
    with pytest.raises(ValueError, match=f"changed after it was made.*({message})"):
        architecture(model)


class OwnMLP(StarMLP):
    """Class of a user."""


def test_a_class_of_the_users_is_passed_again(tmp_path):
    model = tiny(mlp_layer=OwnMLP)
    described = read_architecture(written(model, tmp_path / "m.safetensors"))
    assert described["mlp_layer"] == {"class": f"{__name__}.OwnMLP"}
    with pytest.raises(ValueError, match=r"OwnMLP', which is not the library's: pass .*mlp_layer="):
        from_architecture(described)
    again = from_architecture(described, mlp_layer=OwnMLP)
    assert type(again.stages[0][1].mlp) is OwnMLP


REFUSED = {
    "classes": ({"classes": ["a"]}, "1 classes are named, the network has 10 outputs"),
    "mean": ({"mean": [0.5], "std": [0.5]}, "mean has 1 values, the network sees 3 channels"),
    "half": ({"std": [0.5] * 3}, "mean and std go together"),
    "size": ({"size": (1, 2, 3)}, r"one side or \(height, width\), got \(1, 2, 3\)"),
}


@pytest.mark.parametrize(("usage", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_metadata_is_refused_and_nothing_written(usage, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_weights(tiny(), tmp_path / "m.safetensors", **usage)
    assert list(tmp_path.iterdir()) == []


def test_errors_name_files_and_kinds(tmp_path):
    with pytest.raises(ValueError, match=r"\*\.safetensors, got 'm.pth'"):
        save_weights(tiny(), tmp_path / "m.pth")
    with pytest.raises(FileNotFoundError, match="no weights file at"):
        read_metadata(tmp_path / "none.safetensors")
    broken = tmp_path / "m.safetensors"
    broken.write_bytes(b"\x00")
    with pytest.raises(ValueError, match=r"m\.safetensors \(1 bytes\) is truncated"):
        read_metadata(broken)
    save_file({"a": torch.ones(1)}, broken, metadata={"starlayers": "[1]"})
    with pytest.raises(ValueError, match="its metadata under 'starlayers' is a list"):
        read_metadata(broken)
    with pytest.raises(TypeError, match="read off a StarNet, got Linear"):
        architecture(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="the architecture is of a DemoNet"):
        from_architecture({"class": "DemoNet"})


def test_differences_ignore_the_order_and_false_entries():
    assert differences({"a": 1, "b": (1, 2)}, {"b": [1, 2], "a": 1, "fused": False}) == []
    assert differences({"fused": True}, {}) == ["fused is True in the file and None in the model"]


def test_the_checksum_depends_on_names_types_shapes_and_values():
    a = {"w": torch.zeros(4), "b": torch.ones(1)}
    assert checksum(a) == checksum({k: a[k].clone() for k in reversed(a)})
    others = [
        {**a, "w": torch.zeros(2, 2)},
        {**a, "w": torch.zeros(4, dtype=torch.int32)},
        {**a, "w": torch.tensor([0.0, 0, 0, -0.0])},
        {"v": a["w"], "b": a["b"]},
    ]
    assert len({checksum(a), *map(checksum, others)}) == 5
    empty, scalar = torch.empty(0, 3), torch.tensor(1)
    assert checksum({"a": empty}) != checksum({"a": scalar})
    # a view counts by its values
    assert checksum({"a": torch.arange(4).view(2, 2).t()}) == checksum(
        {"a": torch.tensor([[0, 2], [1, 3]])}
    )
