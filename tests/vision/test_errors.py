"""Errors of networks and blocks, the default of every option, and missing packages."""

import importlib
import inspect
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from starlayers import StarMLP, vision
from starlayers.coefficients.modules import SumMLP
from starlayers.vision import ConvNorm, DemoNet, LoadReport, StarBlock2d, StarNet, load_checkpoint
from starlayers.vision.cost import multiply_adds
from starlayers.vision.training import RunDir, TrainConfig, TrainResult, train

from .util import saved_safely, tiny

SHAPE = {"base_dim": 4, "depths": (1, 1), "stage_strides": (2, 2), "num_classes": 5}
DEMO = {"depth": 2, "dim": 4, "num_classes": 5, "patch_size": 4}


def net(**kwargs):
    return StarNet(**{**SHAPE, **kwargs})


def demo(**kwargs):
    return DemoNet(**{**DEMO, **kwargs})


def taps(indices=None, **kwargs):
    return net().eval().forward_intermediates(torch.ones(1, 3, 8, 8), indices, **kwargs)


ONES, BYTES = torch.ones, torch.uint8
CASES = {
    "net_channels": (
        lambda: net()(ONES(2, 4, 8, 8)),
        ValueError,
        r"\(N, 3, H, W\), got shape \(2, 4, 8, 8\)",
    ),
    "net_nhwc": (lambda: net()(ONES(2, 8, 8, 3)), ValueError, r"3, H, W\).* \(2, 8, 8, 3\)"),
    "net_one_image": (lambda: net()(ONES(3, 8, 9)), ValueError, r"got shape \(3, 8, 9\)"),
    "net_bytes": (
        lambda: net()(ONES(2, 3, 8, 8, dtype=BYTES)),
        TypeError,
        r"expects a floating tensor, got torch\.uint8",
    ),
    "net_bool": (
        lambda: net()(ONES(2, 3, 8, 8, dtype=torch.bool)),
        TypeError,
        r"StarNet expects a floating tensor, got torch\.bool; use x\.float\(\) / 255",
    ),
    "net_three_dimensions": (lambda: net()(ONES(2, 3, 8)), ValueError, r"shape \(2, 3, 8\)"),
    "net_five_dimensions": (
        lambda: net()(ONES(1, 3, 8, 8, 1)),
        ValueError,
        r"StarNet expects \(N, 3, H, W\), got shape \(1, 3, 8, 8, 1\)",
    ),
    "net_int64": (lambda: net()(ONES(2, 3, 8, 8).long()), TypeError, r"got torch\.int64"),
    "features_channels": (
        lambda: net().forward_features(ONES(1, 1, 8, 8)),
        ValueError,
        r"got shape \(1, 1, 8, 8\)",
    ),
    "num_classes": (lambda: net(num_classes=-1), ValueError, "num_classes must be .*, got -1"),
    "num_classes_reset": (lambda: net().reset_classifier(-7), ValueError, "num_classes.* got -7"),
    "pool": (lambda: net(global_pool="mean"), ValueError, "'mean', choose one of 'avg', 'max'"),
    "pool_reset": (lambda: net().reset_classifier(3, "x"), ValueError, "unknown global_pool 'x'"),
    "pool_none": (lambda: net(global_pool=""), ValueError, "num_classes=5 needs a global_pool"),
    "lengths": (lambda: net(depths=(1, 1, 3)), ValueError, r"\(1, 1, 3\) .* \(2, 2\)"),
    "default_strides": (lambda: StarNet(4, (1, 7)), ValueError, r"\(1, 7\) .* \(2, 2, 2, 2\)"),
    "no_stage": (lambda: net(depths=(), stage_strides=()), ValueError, r"depths \(\)"),
    "depth_zero": (lambda: net(depths=(1, 0)), ValueError, "each of depths.* at least 1, got 0"),
    "depth_float": (lambda: net(depths=(1, 1.5)), TypeError, "each of depths.* got 1.5"),
    "stride_zero": (lambda: net(stage_strides=(2, 0)), ValueError, "stage_strides.* got 0"),
    "stem_stride": (lambda: net(stem_stride=-2), ValueError, "stem_stride .*at least 1, got -2"),
    "base_dim": (lambda: net(base_dim=0), ValueError, "base_dim must be at least 1, got 0"),
    "in_chans": (lambda: net(in_chans=0), ValueError, "in_chans must be at least 1, got 0"),
    "in_chans_bool": (lambda: net(in_chans=True), TypeError, "in_chans.* integer, got True"),
    "kernel_even": (lambda: net(kernel_size=4), ValueError, "kernel_size must be odd, got 4"),
    "kernel_zero": (lambda: net(kernel_size=0), ValueError, "kernel_size.* at least 1, got 0"),
    "drop_negative": (lambda: net(drop_rate=-0.1), ValueError, r"drop_rate.*\[0, 1\), got -0\.1"),
    "drop_one": (lambda: net(drop_rate=1.0), ValueError, r"drop_rate.* got 1\.0"),
    "path_negative": (lambda: net(drop_path_rate=-0.2), ValueError, r"_path_rate.* got -0\.2"),
    "path_one": (lambda: net(drop_path_rate=1.0), ValueError, r"drop_path_rate.* got 1\.0"),
    "ratio": (lambda: net(mlp_ratio=0.3), ValueError, r"dim=4 times expansion=0\.3 gives 1\.2"),
    "act": (lambda: net(act="relu7"), ValueError, "unknown activation 'relu7'; known: .*relu6"),
    "act_class": (lambda: net(act=torch.nn.ReLU), TypeError, "act must be a name .* got <class"),
    "mlp_layer_none": (lambda: net(mlp_layer=None), TypeError, "'NoneType' object is not callable"),
    "mlp_layer_width": (
        lambda: net(mlp_layer=lambda dim, hidden, act: StarMLP(dim, hidden, out_features=7)),
        ValueError,
        "StarBlock2d: mlp must keep 4 channels, its out_features is 7",
    ),
    "index_high": (lambda: taps([0, 2]), ValueError, r"stages 0 to 1, got indices=\[0, 2\]"),
    "index_low": (lambda: taps((-3,)), ValueError, r"stages 0 to 1, got indices=\(-3,\)"),
    "indices_none_left": (lambda: taps([]), ValueError, r"got indices=\[\]"),
    "last_zero": (lambda: taps(0), ValueError, "stages 0 to 1, got indices=0"),
    "last_negative": (lambda: taps(-1), ValueError, "got indices=-1"),
    "last_three_of_two": (lambda: taps(3), ValueError, "stages 0 to 1, got indices=3"),
    "last_five_of_two": (lambda: taps(5), ValueError, "stages 0 to 1, got indices=5"),
    "output_fmt": (lambda: taps(output_fmt="NLC"), ValueError, "must be 'NCHW', got 'NLC'"),
    "block_channels": (
        lambda: StarBlock2d(4)(ONES(2, 5, 3, 3)),
        ValueError,
        r"\(N, 4, H, W\), got shape \(2, 5, 3, 3\)",
    ),
    "block_one_image": (lambda: StarBlock2d(4)(ONES(4, 3, 3)), ValueError, r"shape \(4, 3, 3\)"),
    "block_bytes": (
        lambda: StarBlock2d(4)(ONES(2, 4, 3, 3, dtype=BYTES)),
        TypeError,
        r"float.* got torch\.uint8",
    ),
    "block_dim": (lambda: StarBlock2d(0), ValueError, "dim must be at least 1, got 0"),
    "block_dim_float": (lambda: StarBlock2d(4.0), TypeError, r"dim must be an integer, got 4\.0"),
    "block_kernel": (lambda: StarBlock2d(4, 6), ValueError, "odd, got 6"),
    "block_expansion": (lambda: StarBlock2d(3, expansion=1.5), ValueError, r"gives 4\.5 hidden"),
    "block_drop_path": (lambda: StarBlock2d(4, drop_path=1.5), ValueError, r"\[0, 1\), got 1\.5"),
    "block_offset": (
        lambda: StarBlock2d(4, mlp=SumMLP(4, offset=2.0)),
        ValueError,
        r"SumMLP: offset=2\.0 needs a product; leave it at 0",
    ),
    "block_mlp_and_expansion": (
        lambda: StarBlock2d(4, mlp=StarMLP(4), expansion=3),
        ValueError,
        "expansion=3 and act='relu6' are of the star MLP that mlp= replaces; pass them to that",
    ),
    "block_mlp_and_act": (
        lambda: StarBlock2d(4, mlp=StarMLP(4), act=None),
        ValueError,
        "StarBlock2d: expansion=4 and act=None are of the star MLP that mlp= replaces",
    ),
    "block_mlp_function": (
        lambda: StarBlock2d(4, mlp=torch.tanh),
        TypeError,
        "StarBlock2d: mlp must be a module or None, got <built-in method tanh",
    ),
    "block_mlp_width": (
        lambda: StarBlock2d(4, mlp=StarMLP(6)),
        ValueError,
        "StarBlock2d: mlp must keep 4 channels, its in_features is 6",
    ),
    "conv_kernel": (lambda: ConvNorm(3, 4, 2), ValueError, "kernel_size must be odd, got 2"),
    "demo_sides": (
        lambda: demo()(ONES(1, 3, 8, 10)),
        ValueError,
        r"multiples of 4, got shape \(1, 3, 8, 10\)",
    ),
    "demo_height": (lambda: demo()(ONES(1, 3, 7, 8)), ValueError, r"of 4, .*\(1, 3, 7, 8\)"),
    "demo_channels": (lambda: demo()(ONES(1, 1, 8, 8)), ValueError, r"\(N, 3, .*\(1, 1, 8, 8\)"),
    "demo_one_image": (lambda: demo()(ONES(3, 8, 8)), ValueError, r"got shape \(3, 8, 8\)"),
    "demo_bytes": (
        lambda: demo()(ONES(1, 3, 8, 8, dtype=BYTES)),
        TypeError,
        r"float.* got torch\.uint8",
    ),
    "demo_depth": (lambda: demo(depth=0), ValueError, "depth must be at least 1, got 0"),
    "demo_dim": (lambda: demo(dim=-4), ValueError, "dim must be at least 1, got -4"),
    "demo_classes": (lambda: demo(num_classes=0), ValueError, "num_classes.* 1, got 0"),
    "demo_in_chans": (lambda: demo(in_chans=0), ValueError, "in_chans must be .*1, got 0"),
    "demo_patch": (lambda: demo(patch_size=2.5), TypeError, r"patch_size.* integer, got 2\.5"),
    "demo_path_one": (lambda: demo(drop_path_rate=1.0), ValueError, r"\[0, 1\), got 1\.0"),
    "demo_path_negative": (
        lambda: demo(depth=3, drop_path_rate=-0.1),
        ValueError,
        r"drop_path_rate .*got -0\.1$",
    ),
    "demo_path_one_block": (
        lambda: demo(depth=1, drop_path_rate=1.5),
        ValueError,
        r"drop_path_rate .*got 1\.5",
    ),
    "demo_combine": (lambda: demo(combine="max"), ValueError, "combine 'max', choose one of mul"),
}


@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES)
def test_refused_with_the_users_numbers(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- default of every option, and records that cannot be changed


PLACE = {"device": None, "dtype": None}
NORM = {"norm_layer": nn.BatchNorm2d}
DEFAULTS = {
    ConvNorm: {"stride": 1, "groups": 1, "dilation": 1, "act": None, **NORM, **PLACE},
    StarBlock2d: {
        "kernel_size": 7,
        "dilation": 1,
        "mlp": None,
        "expansion": 4,
        "act": "relu6",
        "drop_path": 0.0,
        "layer_scale": None,
        **NORM,
        **PLACE,
    },
    StarNet: {
        "base_dim": 32,
        "depths": (3, 3, 12, 5),
        "mlp_ratio": 4,
        "num_classes": 1000,
        "in_chans": 3,
        "drop_rate": 0.0,
        "drop_path_rate": 0.0,
        "act": "relu6",
        "mlp_layer": StarMLP,
        **NORM,
        "global_pool": "avg",
        "kernel_size": 7,
        "stem_stride": 2,
        "stage_strides": (2, 2, 2, 2),
        "output_stride": None,
        **PLACE,
    },
    DemoNet: {
        "depth": 12,
        "dim": 192,
        "combine": "mul",
        "act": "gelu",
        "num_classes": 1000,
        "in_chans": 3,
        "patch_size": 16,
        "drop_path_rate": 0.0,
        "layer_scale": 1e-6,
        **PLACE,
    },
    StarNet.reset_classifier: {"global_pool": None},
    StarNet.set_grad_checkpointing: {"enable": True},
    StarNet.prune_intermediate_layers: {"indices": 1, "prune_norm": False, "prune_head": True},
    StarNet.group_matcher: {"coarse": False},
    StarNet.forward_head: {"pre_logits": False},
    StarNet.forward_intermediates: {
        "indices": None,
        "norm": False,
        "stop_early": False,
        "output_fmt": "NCHW",
        "intermediates_only": False,
    },
    TrainConfig: {
        "epochs": 3,
        "batch_size": 128,
        "accumulate": 1,
        "optimizer": "adamw",
        "lr": 4e-3,
        "weight_decay": 0.05,
        "layer_decay": 1.0,
        "freeze": 0,
        "schedule": "cosine",
        "warmup": 0.1,
        "label_smoothing": 0.1,
        "clip": 1.0,
        "flip": 0.5,
        "crop": 0,
        "resized_crop": 0.0,
        "randaugment": 0,
        "erase": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "ema": 0.0,
        "norm_batches": 20,
        "balance": "none",
        "amp": False,
        "amp_dtype": "bfloat16",
        "sync_bn": False,
        "compile": False,
        "seed": 0,
        "save_every": 200,
        "workers": 0,
        "log_with": "none",
    },
    train: {"run_dir": None, "progress": True},
    RunDir: {"resume": False},
    multiply_adds: {"shape": (3, 224, 224)},
    **{getattr(vision, name): {"pretrained": False} for name in vision.STARNETS},
}


@pytest.mark.parametrize(
    ("thing", "defaults"), DEFAULTS.items(), ids=[thing.__qualname__ for thing in DEFAULTS]
)
def test_defaults(thing, defaults):
    parameters = inspect.signature(thing).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == defaults


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (TrainConfig(), "lr"),
        (TrainResult([], None, True, 0.0), "finished"),
        (LoadReport("timm", 1), "loaded"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_records_are_frozen(record, field):
    with pytest.raises(FrozenInstanceError, match=field):
        setattr(record, field, 3)


# --- optional packages: importing vision needs einops alone, and errors name the extra to install


CHILD = """
import sys
import torch
allowed = {name.partition(".")[0] for name in sys.modules} | {"starlayers", "einops"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

OPTIONAL = {OPTIONAL!r}
sys.meta_path.insert(0, Refuse())
from starlayers.vision import StarNet
import starlayers.vision.cost
model = StarNet(8, (1,), stage_strides=(2,), num_classes=3)
print(tuple(model.fuse()(torch.ones(1, 3, 16, 16)).shape))
others = {name.partition(".")[0] for name in sys.modules} - allowed
others.discard("triton")  # imported by PyTorch's FLOP counter
print(*sorted(others - set(sys.stdlib_module_names)))
"""
OPTIONAL = {
    *("accelerate", "huggingface_hub", "matplotlib", "safetensors", "sklearn", "timm"),
    *("torchdata", "torchmetrics", "torchvision", "tqdm", "transformers", "typer"),
}


def test_vision_imports_and_runs_with_einops_alone():
    code = CHILD.replace("{OPTIONAL!r}", repr(OPTIONAL))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(1, 3)", ""]


def without(monkeypatch, package, module):
    """Make `package` missing, and `module` not imported yet."""
    for name in list(sys.modules):
        if name == module or name.startswith(module + "."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


def test_without_einops(monkeypatch):
    without(monkeypatch, "einops", "starlayers.vision")
    message = r"starlayers\.vision needs einops: pip install 'starlayers\[vision\]'"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("starlayers.vision")


@pytest.mark.parametrize(
    "package", ["accelerate", "torchdata", "torchmetrics", "torchvision", "tqdm"]
)
def test_without_a_package_of_training(monkeypatch, package):
    without(monkeypatch, package, "starlayers.vision.training")
    message = rf"vision\.training needs {package}: pip install 'starlayers\[training\]'"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("starlayers.vision.training")


def test_without_timm(monkeypatch):
    for name in ("timm.data", "timm.models"):
        without(monkeypatch, name, "starlayers.vision.timm")
    with pytest.raises(ImportError, match=r"starlayers\.vision\.timm needs timm: pip install timm"):
        importlib.import_module("starlayers.vision.timm")


def test_without_safetensors(monkeypatch, tmp_path):
    model = tiny(2)
    file = saved_safely(tiny(1).state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    message = r"weights\.safetensors needs safetensors: pip install 'starlayers\[vision\]'"
    with pytest.raises(ImportError, match=message):
        load_checkpoint(model, file)
    torch.save(tiny(1).state_dict(), tmp_path / "weights.pth")
    assert load_checkpoint(model, tmp_path / "weights.pth").loaded == len(model.state_dict())


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = (
        r"starnet_s1\(pretrained=True\) needs huggingface_hub: pip install 'starlayers\[vision\]'"
    )
    with pytest.raises(ImportError, match=message):
        vision.starnet_s1(pretrained=True)
