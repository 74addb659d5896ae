"""Checkpoints of every source, the adapted parts of them, the export, and the hub."""

import traceback
from argparse import Namespace
from collections import OrderedDict

import huggingface_hub
import pytest
import timm
import torch
from timm.models._manipulate import adapt_input_conv

from starlayers import vision
from starlayers.vision import LoadReport, StarNet, load_checkpoint, to_timm_state_dict

from .util import (
    TINY,
    assert_same_tensors,
    image,
    saved,
    saved_safely,
    snapshot,
    tiny,
    tiny_timm,
)


def renamed(state, prefix):
    return OrderedDict((prefix + k, v) for k, v in state.items())


# source -> (function of our state dict, timm's and a folder that makes the checkpoint; names in it)
SOURCES = {
    "authors_pth_tar": (
        lambda ours, timms, d: saved({"epoch": 300, "state_dict": timms}, d / "s.pth.tar"),
        "timm",
    ),
    "authors_data_parallel": (
        lambda ours, timms, d: saved({"state_dict": renamed(timms, "module.")}, d / "s.pth.tar"),
        "timm",
    ),
    "compiled_data_parallel": (
        lambda ours, timms, d: saved(renamed(ours, "module._orig_mod."), d / "s.pth"),
        "starlayers",
    ),
    "timm_safetensors": (lambda ours, timms, d: saved_safely(timms, d / "m.safetensors"), "timm"),
    "timm_pth": (lambda ours, timms, d: saved(timms, d / "m.pth"), "timm"),
    "timm_mapping": (lambda ours, timms, d: timms, "timm"),
    "our_pth": (lambda ours, timms, d: saved(ours, d / "m.pth"), "starlayers"),
    "our_pth_as_str": (lambda ours, timms, d: str(saved(ours, d / "m.pth")), "starlayers"),
    "our_safetensors": (
        lambda ours, timms, d: saved_safely(ours, d / "m.safetensors"),
        "starlayers",
    ),
    "our_mapping": (lambda ours, timms, d: ours, "starlayers"),
    # as timm's CheckpointSaver writes it
    "with_arguments_of_a_command": (
        lambda ours, timms, d: saved(
            {"epoch": 3, "state_dict": timms, "args": Namespace(lr=0.1, opt="lamb")},
            d / "model_best.pth.tar",
        ),
        "timm",
    ),
    "under_model": (lambda ours, timms, d: {"model": ours, "step": 3}, "starlayers"),
    "without_counters": (
        lambda ours, timms, d: {k: v for k, v in timms.items() if "num_batches" not in k},
        "timm",
    ),
}


@pytest.mark.parametrize(("make", "names"), SOURCES.values(), ids=SOURCES)
def test_every_source_loads_bit_for_bit_and_in_place(make, names, tmp_path):
    source, target, x = tiny(1).eval(), tiny(2).eval(), image(2, 3, 24, 24)
    theirs = tiny_timm(source)
    checkpoint = make(source.state_dict(), theirs.state_dict(), tmp_path)
    parameters = dict(target.named_parameters())
    report = load_checkpoint(target, checkpoint)
    assert_same_tensors(snapshot(target), snapshot(source))
    torch.testing.assert_close(target(x), theirs(x))
    assert report == LoadReport(names, len(source.state_dict()))
    assert str(report) == f"loaded {len(source.state_dict())} tensors ({names} names)"
    for name, p in target.named_parameters():
        assert p is parameters[name]
        assert p.requires_grad


@pytest.mark.parametrize(
    "name",
    [
        n if n == "starnet_s050" else pytest.param(n, marks=pytest.mark.slow)
        for n in vision.STARNETS
    ],
)
def test_timm_to_ours_to_timm_is_bit_identical(name):
    theirs = timm.create_model(name, num_classes=10)
    ours = getattr(vision, name)(num_classes=10)
    report = load_checkpoint(ours, theirs.state_dict())
    assert (report.source, report.adapted) == ("timm", ())
    back = to_timm_state_dict(ours)
    assert list(back) == list(theirs.state_dict())
    assert_same_tensors(back, theirs.state_dict())
    timm.create_model(name, num_classes=10).load_state_dict(back)


def test_the_export_shares_memory_with_the_model():
    model = tiny()
    to_timm_state_dict(model)["stages.0.1.f1.conv.weight"].zero_()
    assert not model.stages[0][1].mlp.f1.weight.any()


def test_loading_copies_and_converts_to_the_models_type():
    source, target = tiny(1), tiny(2, dtype=torch.float64)
    state = source.state_dict()
    load_checkpoint(target, state)
    want = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    assert_same_tensors(snapshot(target), want)
    before = snapshot(target)
    with torch.no_grad():
        source.head.weight.zero_()
    assert_same_tensors(snapshot(target), before)


@pytest.mark.parametrize("names", ["timm", "starlayers"])
def test_another_number_of_classes_keeps_the_models_head(names):
    source, target = tiny(1), tiny(2, num_classes=4)
    own = {k: v for k, v in snapshot(target).items() if k.startswith("head.")}
    report = load_checkpoint(
        target, to_timm_state_dict(source) if names == "timm" else source.state_dict()
    )
    assert_same_tensors(snapshot(target), {**snapshot(source), **own})
    assert report.adapted == ("head: checkpoint has 10 classes, model keeps its own head of 4",)


def test_a_model_without_head_drops_the_checkpoints():
    source, target = tiny(1).eval(), tiny(2, num_classes=0).eval()
    report = load_checkpoint(target, source.state_dict())
    assert report.adapted == ("head: checkpoint's 10 classes dropped, model has none",)
    assert report.loaded == len(target.state_dict())
    x = image(2, 3, 16, 16)
    pooled = source.forward_head(source.forward_features(x), pre_logits=True)
    torch.testing.assert_close(target(x), pooled, rtol=0, atol=0)


def test_a_model_without_head_takes_a_checkpoint_with_half_of_one():
    source, target = tiny(1), tiny(2, num_classes=0)
    state = source.state_dict()
    del state["head.bias"]
    assert load_checkpoint(target, state).loaded == len(target.state_dict())


def test_a_wrapper_inside_the_file_is_preferred_in_order():
    source, other, target = tiny(1), tiny(3), tiny(2)
    load_checkpoint(target, {"model": other.state_dict(), "state_dict": source.state_dict()})
    assert_same_tensors(snapshot(target), snapshot(source))


def test_the_report_tells_what_was_adapted():
    report = LoadReport("timm", 3, ("first", "second"))
    assert str(report) == "loaded 3 tensors (timm names); first; second"
    assert LoadReport("timm", 3).adapted == ()


def test_a_checkpoint_without_head_keeps_the_models():
    source, target = tiny(1, num_classes=0), tiny(2)
    own = {k: v for k, v in snapshot(target).items() if k.startswith("head.")}
    report = load_checkpoint(target, source.state_dict())
    assert report.adapted == ("head: checkpoint has no head, model keeps its own head of 10",)
    assert_same_tensors(snapshot(target), {**snapshot(source), **own})


def test_colour_to_grey_sees_grey_images_as_before():
    colour, grey, x = tiny(1).eval(), tiny(2, in_chans=1).eval(), image(2, 1, 20, 20)
    report = load_checkpoint(grey, colour.state_dict())
    assert report.adapted == ("stem.conv: 3 input channels summed to 1",)
    torch.testing.assert_close(
        grey.forward_features(x), colour.forward_features(x.expand(2, 3, 20, 20))
    )


def test_grey_to_colour_sees_grey_images_as_before():
    grey, colour, x = tiny(1, in_chans=1).eval(), tiny(2).eval(), image(2, 1, 20, 20)
    report = load_checkpoint(colour, grey.state_dict())
    assert report.adapted == ("stem.conv: 1 input channels repeated to 3 and rescaled",)
    torch.testing.assert_close(
        colour.forward_features(x.expand(2, 3, 20, 20)), grey.forward_features(x)
    )


@pytest.mark.parametrize("in_chans", [1, 2, 4, 6, 7])
def test_image_channels_are_adapted_as_timm_does(in_chans):
    source, target = tiny(1), tiny(2, in_chans=in_chans)
    load_checkpoint(target, source.state_dict())
    want = adapt_input_conv(in_chans, source.stem.conv.weight.detach())
    torch.testing.assert_close(target.stem.conv.weight.detach(), want)
    rest = {k: v for k, v in snapshot(source).items() if k != "stem.conv.weight"}
    assert_same_tensors({k: v for k, v in snapshot(target).items() if k in rest}, rest)


def test_the_callers_mapping_is_left_alone():
    state = to_timm_state_dict(tiny(1))
    before = {k: v.clone() for k, v in state.items()}
    load_checkpoint(tiny(2, in_chans=1, num_classes=0), state)
    assert_same_tensors(state, before)


@pytest.mark.parametrize("names", ["timm", "starlayers"])
def test_a_fused_model_takes_no_checkpoint_and_gives_none(names):
    source, fused = tiny(1), tiny(2).fuse()
    before = snapshot(fused)
    state = to_timm_state_dict(source) if names == "timm" else source.state_dict()
    with pytest.raises(ValueError, match="model is fused: load the checkpoint first"):
        load_checkpoint(fused, state)
    with pytest.raises(ValueError, match="model is fused"):
        to_timm_state_dict(fused)
    assert_same_tensors(snapshot(fused), before)
    with pytest.raises(ValueError, match=r"missing stem\.bn\.weight"):
        load_checkpoint(source, before)


def test_pretrained_takes_timms_file_from_the_hub(monkeypatch, tmp_path):
    theirs = timm.create_model("starnet_s2", num_classes=10)
    path, asked = saved_safely(theirs.state_dict(), tmp_path / "model.safetensors"), []

    def ask(url, *, timeout):
        asked.append((url, timeout))

    def download(repo_id, filename, *, local_files_only=False, etag_timeout=None):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        asked.append((repo_id, filename, etag_timeout))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    ours = vision.starnet_s2(pretrained=True, num_classes=10)
    url = "https://huggingface.co/timm/starnet_s2.in1k/resolve/main/model.safetensors"
    assert asked == [(url, 5), ("timm/starnet_s2.in1k", "model.safetensors", 5)]
    assert_same_tensors(to_timm_state_dict(ours), theirs.state_dict())
    grey = vision.starnet_s2(pretrained=True, num_classes=3, in_chans=1)
    want = theirs.stem[0].conv.weight.detach().sum(1, keepdim=True)
    torch.testing.assert_close(grey.stem.conv.weight.detach(), want)


def test_pretrained_without_the_hub_says_what_to_do(monkeypatch):
    def ask(*_, **__):
        raise OSError("no route to host")

    def download(*_, local_files_only=False, **__):
        assert local_files_only  # the download itself would try again for half a minute
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    message = (
        r"timm/starnet_s1\.in1k .*OSError.*download model\.safetensors of timm/starnet_s1\.in1k "
        r"elsewhere and pass its path to starlayers\.vision\.load_checkpoint"
    )
    with pytest.raises(ConnectionError, match=message) as caught:
        vision.starnet_s1(pretrained=True)
    assert isinstance(caught.value.__cause__, OSError)


def test_pretrained_needs_no_hub_once_it_is_in_the_cache(monkeypatch, tmp_path):
    cached = vision.starnet_s1()
    path = saved_safely(cached.state_dict(), tmp_path / "model.safetensors")

    def download(repo_id, filename, *, local_files_only):
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = vision.starnet_s1(pretrained=True)
    assert_same_tensors(loaded.state_dict(), cached.state_dict())


@pytest.mark.parametrize("name", ["starnet_s050", "starnet_s100", "starnet_s150"])
def test_there_are_no_weights_of_the_very_small_networks(name):
    with pytest.raises(ValueError, match=f"{name} has no published weights"):
        getattr(vision, name)(pretrained=True)


def test_two_trained_copies_differ_by_their_checkpoint_only():
    a, b = StarNet(**TINY, stage_strides=(2, 2)), StarNet(**TINY, stage_strides=(2, 2))
    load_checkpoint(b, a.state_dict())
    for model in (a, b):
        model.train()(image(2, 3, 32, 32)).square().mean().backward()
    assert_same_tensors(
        {k: p.grad for k, p in a.named_parameters()}, {k: p.grad for k, p in b.named_parameters()}
    )


# --- errors of `load_checkpoint`, each of which leaves the model as it was


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
        r"s\.pth holds objects of torch\.nn\.modules\.linear\.Linear, which only code .* not run",
    ),
    "objects_beside_the_weights": (
        lambda s, d: saved({"state_dict": s, "args": {"path": d, "log": print}}, d / "s.pth"),
        ValueError,
        r"s\.pth holds objects of builtins\.print, pathlib\.\S+, which only code",
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


@pytest.mark.parametrize("content", [torch.nn.Linear(1, 1), None], ids=["objects", "web_page"])
def test_errors_are_without_escape_codes_of_a_terminal(content, tmp_path):
    path = tmp_path / "s.pth"
    path.write_bytes(b"<html>") if content is None else saved(content, path)
    with pytest.raises(ValueError, match=r"s\.pth") as caught:
        load_checkpoint(tiny(2), path)
    text = "".join(traceback.format_exception(caught.value))
    assert "\x1b" not in text
    assert "weights_only" not in str(caught.value)


def test_what_timm_saves_while_it_trains_is_loaded(tmp_path):
    source, target = tiny(1), tiny(2)
    theirs = tiny_timm(source)
    optimizer = torch.optim.AdamW(theirs.parameters())
    saver = timm.utils.CheckpointSaver(
        theirs, optimizer, Namespace(model="starnet_s1"), checkpoint_dir=tmp_path
    )
    saver.save_checkpoint(0, metric=0.5)
    report = load_checkpoint(target, tmp_path / "last.pth.tar")
    assert report == LoadReport("timm", len(source.state_dict()))
    assert_same_tensors(snapshot(target), snapshot(source))


def test_load_state_dict_takes_the_names_of_timm_and_of_the_authors():
    source, target = tiny(1), tiny(2)
    state = tiny_timm(source).state_dict()
    keys = list(state)
    assert target.load_state_dict(state) == ([], [])
    assert_same_tensors(snapshot(target), snapshot(source))
    assert list(state) == keys, "the caller's mapping is left alone"
    wrapped = torch.nn.ModuleDict({"body": tiny(3), "other": torch.nn.Linear(1, 1)})
    state = {**renamed(state, "body."), **renamed(wrapped["other"].state_dict(), "other.")}
    assert wrapped.load_state_dict(state) == ([], [])
    assert_same_tensors(snapshot(wrapped["body"]), snapshot(source))


def test_load_state_dict_stays_strict_about_names_and_shapes():
    target, state = tiny(2), tiny_timm(tiny(1)).state_dict()
    del state["stages.0.1.f1.conv.bias"]
    state["neck.bias"] = torch.ones(1)
    missing, unexpected = target.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["stages.0.1.mlp.f1.bias"], ["neck.bias"])
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*mlp\.f1\.bias.*Unexpected.*neck"):
        target.load_state_dict(state)
    state = tiny_timm(tiny(1)).state_dict()
    state["stages.0.1.f1.conv.weight"] = torch.ones(32, 8, 3, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for stages\.0\.1\.mlp\.f1\.weight"):
        target.load_state_dict(state)


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
