"""Default of every option, and records that cannot be changed."""

import inspect
from dataclasses import FrozenInstanceError

import pytest

from starlayers import vision
from starlayers.vision import ConvNorm, DemoNet, LoadReport, StarBlock2d, StarNet
from starlayers.vision.cost import multiply_adds
from starlayers.vision.training import RunDir, TrainConfig, TrainResult, train

PLACE = {"device": None, "dtype": None}
DEFAULTS = {
    ConvNorm: {"stride": 1, "groups": 1, **PLACE},
    StarBlock2d: {
        "kernel_size": 7,
        "expansion": 4,
        "act": "relu6",
        "drop_path": 0.0,
        "layer_scale": None,
        "combine": "mul",
        "offset": 0.0,
        "rank": 1,
        "coefficients": "fixed",
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
        "combine": "mul",
        "coefficients": "fixed",
        "global_pool": "avg",
        "kernel_size": 7,
        "stem_stride": 2,
        "stage_strides": (2, 2, 2, 2),
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
        "lr": 4e-3,
        "weight_decay": 0.05,
        "schedule": "cosine",
        "warmup": 0.1,
        "label_smoothing": 0.1,
        "clip": 1.0,
        "flip": 0.5,
        "crop": 0,
        "randaugment": 0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "ema": 0.0,
        "amp": False,
        "compile": False,
        "seed": 0,
        "save_every": 200,
        "workers": 0,
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
