"""Errors of `load_checkpoint`, each of which leaves the model as it was."""

import pytest
import timm
import torch

from starlayers.vision import StarNet, load_checkpoint

from .util import assert_same_tensors, saved, saved_safely, snapshot, tiny


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


def truncated(path, keep):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    return path


def written(path, data):
    path.write_bytes(data)
    return path


CONV = "stages.1.2.post.conv.weight"
# case -> (function of a state dict and a folder that makes the checkpoint; error; its message)
REFUSED = {
    "missing": (lambda s, d: without(s, CONV), ValueError, f"missing {CONV}"),
    "missing_bias_of_head": (lambda s, d: without(s, "head.bias"), ValueError, "missing head.bias"),
    "unexpected": (
        lambda s, d: {**s, "neck.weight": torch.ones(1)},
        ValueError,
        "unexpected neck.weight",
    ),
    "shape": (
        lambda s, d: {**s, CONV: torch.ones(16, 1, 5, 5)},
        ValueError,
        rf"{CONV} is \(16, 1, 5, 5\), the model has \(16, 1, 7, 7\)",
    ),
    "all_three_at_once": (
        lambda s, d: {**without(s, CONV), "neck": torch.ones(1), "norm.bias": torch.ones(7)},
        ValueError,
        rf"(?s)missing {CONV}.*unexpected neck.*norm.bias is \(7,\), the model has \(16,\)",
    ),
    "wider_head": (
        lambda s, d: {**s, "head.weight": torch.ones(10, 32)},
        ValueError,
        r"head.weight is \(10, 32\), the model has \(10, 16\)",
    ),
    "deeper": (
        lambda s, d: StarNet(8, (2, 2), stage_strides=(2, 2), num_classes=10).state_dict(),
        ValueError,
        "unexpected stages.0.2.pre.conv.weight",
    ),
    "timm_resnet": (
        lambda s, d: timm.create_model("test_resnet").state_dict(),
        ValueError,
        r"(?s)another model.*missing stem.conv.weight.*and \d+ more",
    ),
    "timm_mobilenet": (
        lambda s, d: saved(timm.create_model("mobilenetv3_small_050").state_dict(), d / "m.pth"),
        ValueError,
        "(?s)another model.*missing stem.conv.weight",
    ),
    "empty": (lambda s, d: {}, ValueError, "missing stem.conv.weight"),
    "stem_of_another_kind": (
        lambda s, d: {**s, "stem.conv.weight": torch.ones(32, 27)},
        ValueError,
        r"stem.conv.weight is \(32, 27\), the model has \(32, 3, 3, 3\)",
    ),
    "pointwise_of_another_kind": (
        lambda s, d: {**s, "stages.0.1.mlp.f1.weight": torch.ones(32, 8, 1)},
        ValueError,
        r"stages.0.1.mlp.f1.weight is \(32, 8, 1\), the model has \(32, 8\)",
    ),
    "pointwise_with_a_kernel": (
        lambda s, d: {**s, "stages.0.1.mlp.f1.weight": torch.ones(32, 8, 3, 3)},
        ValueError,
        r"stages.0.1.mlp.f1.weight is \(32, 72\), the model has \(32, 8\)",
    ),
    "other_tensor_with_two_more_dimensions": (
        lambda s, d: {**s, "norm.bias": torch.ones(16, 1, 1)},
        ValueError,
        r"norm.bias is \(16, 1, 1\), the model has \(16,\)",
    ),
    "state_dict_of_text": (
        lambda s, d: {"state_dict": {"epoch": "three"}},
        ValueError,
        "not a state dict: 'epoch' holds a str",
    ),
    "optimiser": (
        lambda s, d: torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]).state_dict(),
        ValueError,
        "not a state dict: 'state' holds a dict",
    ),
    "integer_keys": (
        lambda s, d: {0: torch.ones(1)},
        ValueError,
        "not a state dict: key 0 is a int",
    ),
    "list_in_file": (
        lambda s, d: saved([1], d / "m.pth"),
        ValueError,
        r"m\.pth holds a list, not a state dict",
    ),
    "truncated_pth_tar": (
        lambda s, d: truncated(saved({"state_dict": s}, d / "s.pth.tar"), 0.6),
        ValueError,
        r"s\.pth\.tar \(\d+ bytes\) is truncated or no checkpoint",
    ),
    "truncated_safetensors": (
        lambda s, d: truncated(saved_safely(s, d / "s.safetensors"), 0.6),
        ValueError,
        r"s\.safetensors \(\d+ bytes\) is truncated or no checkpoint",
    ),
    "truncated_to_nothing": (
        lambda s, d: written(d / "s.pth", b""),
        ValueError,
        r"s\.pth \(0 bytes\) is truncated",
    ),
    "web_page": (
        lambda s, d: written(d / "s.pth", b"<html>Not found</html>"),
        ValueError,
        r"s\.pth \(22 bytes\) is truncated or no checkpoint",
    ),
    "whole_pickled_model": (
        lambda s, d: saved(torch.nn.Linear(1, 1), d / "s.pth"),
        ValueError,
        r"(?s)no checkpoint: .*[Ww]eights.only",
    ),
    "no_such_file": (lambda s, d: d / "none.pth", FileNotFoundError, r"no checkpoint .*none\.pth"),
    "a_folder": (lambda s, d: d, FileNotFoundError, "no checkpoint file at"),
    "a_number": (lambda s, d: 42, TypeError, "a path or a mapping, got int"),
    "nothing": (lambda s, d: None, TypeError, "a path or a mapping, got NoneType"),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_the_model_unchanged(make, error, message, tmp_path):
    model = tiny(2)
    before, checkpoint = snapshot(model), make(tiny(1).state_dict(), tmp_path)
    with pytest.raises(error, match=message):
        load_checkpoint(model, checkpoint)
    assert_same_tensors(snapshot(model), before)


@pytest.mark.parametrize(
    ("unexpected", "last"), [(20, "unexpected key19"), (21, "and 1 more"), (23, "and 3 more")]
)
def test_at_most_20_differences_are_listed(unexpected, last):
    extra = {f"key{i:02}": torch.ones(1) for i in range(unexpected)}
    with pytest.raises(ValueError, match="of another model") as error:
        load_checkpoint(tiny(2), {**tiny(1).state_dict(), **extra})
    lines = str(error.value).splitlines()
    assert lines[0] == "the checkpoint is of another model:"
    assert lines[1:21] == [f"  unexpected key{i:02}" for i in range(20)]
    assert lines[-1].strip() == last
    assert len(lines) == 1 + min(unexpected, 21)
