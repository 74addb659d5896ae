"""Forwards that other libraries replaced on an instance: named, and never silently run."""

import functools
import subprocess
import sys
import types

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from liger_kernel.transformers.monkey_patch import _patch_swiglu_module
from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

from starlayers.surgery import report, revert, starify
from starlayers.surgery.forwards import bypassed, check_forwards, liger_mlps, replaced_forward
from tests.surgery.small import IDS, MLP, Gated, Net, llama

LIGER = "its forward was replaced by LigerSwiGLUMLP.forward of liger_kernel"


def patched(model):
    """Apply Liger to the MLPs as it does itself, without what it changes in transformers."""
    for layer in model.model.layers:
        _patch_swiglu_module(layer.mlp, LigerSwiGLUMLP)
    return model


@pytest.mark.parametrize("options", [{"mode": "fuse"}, {"grow": 1}])
def test_mlps_that_liger_has_are_left_and_named(options):
    model = patched(llama())
    with pytest.raises(ValueError, match=rf"{LIGER}: keep Liger from the MLPs with swiglu=False"):
        starify(model, **options)
    rows = report(model).rows
    assert len(rows) == len(model.model.layers)
    assert all(row.state == "skipped" and row.detail.startswith(LIGER) for row in rows)
    assert not any("star" in vars(layer.mlp) for layer in model.model.layers)


@pytest.mark.parametrize(
    ("options", "lost"), [({"mode": "fuse"}, ""), ({"grow": 2}, " and its grown products are lost")]
)
def test_a_star_layer_that_liger_takes_is_found(options, lost):
    model = starify(llama(), **options)
    check_forwards(model)
    patched(model)
    name = r"model\.layers\.0\.mlp\.gate_proj"
    with pytest.raises(ValueError, match=rf"{name} is a star layer, but {LIGER}, .*run{lost}: "):
        check_forwards(model)
    with pytest.raises(ValueError, match=r"liger_kernel_config=\{'swiglu': False\}"):
        starify(model, mode="fuse", recompute=True)
    rows = report(model).rows
    assert {row.detail for row in rows} == {f"does not run: {LIGER}"}
    mlp = revert(model).model.layers[0].mlp
    assert bypassed(mlp) is None
    assert replaced_forward(mlp) == LIGER


def test_plain_mlps_with_a_replaced_forward_are_named(x):
    model = Net(MLP(), MLP())
    model.blocks[0].forward = types.MethodType(lambda self, x: 2 * self.fc1(x)[..., :8], Net)
    starify(model)
    rows = {row.name: row for row in report(model).rows}
    assert rows["blocks.1.fc1"].state == "star"
    assert rows["blocks.0.fc1"].state == "skipped"
    assert "replaced by test_plain_mlps" in rows["blocks.0.fc1"].detail
    assert "or leave its MLPs alone there" in rows["blocks.0.fc1"].detail
    assert model.blocks[1](x).isfinite().all()


def test_a_wrapper_that_calls_the_star_is_no_obstacle(x):
    model = starify(Net(Gated()), mode="star", grow=1)
    star = model.blocks[0]
    want = star(x)
    add_hook_to_module(star, AlignDevicesHook(execution_device="cpu"))
    assert "forward" in vars(star)
    assert bypassed(star) is None
    torch.nn.init.ones_(star.star_grown.f2.weight)
    assert not torch.equal(star(x), want)  # the grown products run, so it is a star still

    def scaled(x, call=star.forward):
        return 2 * call(x)

    star.forward = functools.wraps(star.forward)(scaled)
    assert bypassed(star) is None
    del scaled.__wrapped__
    assert "scaled of" in bypassed(star) or "accelerate" in bypassed(star)


def test_what_accelerate_dispatched_is_named(tmp_path):
    model = llama()
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    rows = {row.name: row for row in report(model).rows}
    row = rows["model.layers.1.mlp.gate_proj"]
    assert row.state == "skipped"
    assert row.detail.startswith("its forward was replaced by a hook of accelerate: starify before")
    assert model(IDS).logits.isfinite().all()


def test_replaced_forwards_have_names():
    layer = torch.nn.Linear(2, 2)
    assert replaced_forward(layer) is None
    layer.forward = functools.partial(torch.nn.functional.relu)
    assert replaced_forward(layer) == "its forward was replaced by relu of torch.nn.functional"


@pytest.mark.slow
def test_a_model_built_after_liger_is_refused_by_its_name():
    """In a process of its own: Liger changes transformers' module for all models to come."""
    program = """
from liger_kernel.transformers import apply_liger_kernel_to_llama
from tests.surgery.small import llama
from starlayers import starify
from starlayers.surgery import report
before = llama()
apply_liger_kernel_to_llama()
try:
    starify(llama(), mode="fuse")
except ValueError as error:
    print(error)
print([(row.name, row.state) for row in report(llama()).rows])
print(report(llama()).rows[1].detail)
print(report(starify(before, mode="fuse")).rows[0].state)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    refused, rows, detail, state = done.stdout.strip().splitlines()[-4:]
    assert "model.layers.0.mlp: it is Liger's LigerSwiGLUMLP, because the model was" in refused
    assert rows == str([(f"model.layers.{i}.mlp", "skipped") for i in range(2)])
    assert detail.startswith("it is Liger's LigerSwiGLUMLP, because")
    assert state == "fused"
    assert liger_mlps(llama()) == {}
