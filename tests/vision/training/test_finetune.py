"""Parts of a recipe for fine-tuning and for large batches, against what they stand for."""

import dataclasses
import json
import os
import signal
import sys

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.utils.data import TensorDataset

from starlayers.vision import StarNet
from starlayers.vision.training import RunDir, TrainConfig, accelerator
from starlayers.vision.training import loop as loop_module
from starlayers.vision.training.augment import image_transform
from starlayers.vision.training.loop import _Run
from starlayers.vision.training.recipe import (
    freeze_stages,
    lr_scheduler,
    make_optimizer,
    param_groups,
)

from .util import CLASSES, RECIPE, call_at_step, numbers, run, tiny_data, tiny_model, weights

#: nothing random, no averages: what is left is the optimizer
PLAIN = {"flip": 0.0, "crop": 0, "mixup": 0.0, "cutmix": 0.0, "ema": 0.0, "norm_batches": 0}


def star(classes: int = CLASSES) -> StarNet:
    torch.manual_seed(1)
    return StarNet(8, (1, 2), num_classes=classes, in_chans=1, stem_stride=1, stage_strides=(1, 2))


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def differing(one, other):
    return {n for n, t in one.items() if not torch.equal(t, other[n])}


# 80 images; the last group of 70 has fewer batches and the last batch fewer images
@pytest.mark.parametrize(("images", "batch", "accumulate"), [(80, 20, 2), (80, 10, 4), (70, 16, 2)])
def test_accumulated_batches_are_one_large_batch(images, batch, accumulate):
    """Without norms, which see single batches."""
    data = tiny_data(train=images)
    small, large = (tiny_model(dropout=0.0, norm=False) for _ in range(2))
    parts = run(model=small, data=data, **PLAIN, batch_size=batch, accumulate=accumulate, clip=0.05)
    whole = run(model=large, data=data, **PLAIN, batch_size=batch * accumulate, clip=0.05)
    assert [h["step"] for h in parts.history] == [h["step"] for h in whole.history]
    for one, other in zip(parts.history, whole.history, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert one["lr"] == other["lr"]
    for name, want in large.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], want, rtol=1e-3, atol=1e-4, msg=name)


def test_accumulation_is_interrupted_between_steps_and_resumes(tmp_path):
    recipe = {"batch_size": 8, "accumulate": 2}
    want = run(tmp_path / "whole", **recipe)
    # forward 7 is the first of the two of step 4
    model = call_at_step(tiny_model(), 7, interrupt)
    stopped = run(tmp_path / "run", model=model, **recipe)
    assert not stopped.finished
    assert [p.name for p in (tmp_path / "run" / "state").iterdir()] == ["step_00000004"]
    resumed = run(tmp_path / "run", model=tiny_model(9), resume=True, **recipe)
    assert numbers(resumed.history) == numbers(want.history)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_frozen_stages_stay_with_their_statistics(tmp_path, ema):
    model = star()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(tmp_path / "run", model=model, freeze=1, ema=ema, epochs=1, norm_batches=2)
    saved = weights(tmp_path / "run")
    changed = differing(before, saved)
    assert {n for n in before if n.startswith(("stem.", "stages.0."))}.isdisjoint(changed)
    rest = {n for n in before if n.startswith(("stages.1.", "norm.", "head."))}
    assert changed == {n for n in rest if n in changed}
    assert {"stages.1.0.bn.running_mean", "stages.1.1.mlp.g.weight", "head.bias"} <= changed


def test_all_stages_can_be_frozen_and_no_more():
    model = star()
    freeze_stages(model, 2)
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"norm", "head"}
    with pytest.raises(ValueError, match="freeze=3 is more than the 2 stages"):
        run(model=model, freeze=3)
    with pytest.raises(ValueError, match=r"freeze=1 needs a StarNet.* of Sequential"):
        run(freeze=1)


def test_layer_decay_lowers_the_rate_block_by_block():
    """The head, then the last block with the norm after it, and so on down to the stem."""
    config = TrainConfig(lr=0.1, layer_decay=0.5, weight_decay=0.3)
    model = star()
    model.stem.requires_grad_(False)
    groups = param_groups(model, config)
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in groups for p in g["params"]}
    decays = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert rates["head.weight"] == pytest.approx(0.1)
    assert rates["norm.weight"] == pytest.approx(0.05)
    blocks = ["stages.1.2", "stages.1.1", "stages.1.0", "stages.0.1", "stages.0.0"]
    for depth, block in enumerate(blocks, 1):
        found = {rate for name, rate in rates.items() if name.startswith(f"{block}.")}
        assert list(found) == [pytest.approx(0.1 * 0.5**depth)]
    assert rates.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert (decays["head.weight"], decays["head.bias"]) == (0.3, 0.0)


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_the_schedule_keeps_the_ratio_of_the_rates(schedule):
    config = TrainConfig(lr=0.1, layer_decay=0.5, schedule=schedule)
    optimizer = make_optimizer(star(), config)
    scheduler = lr_scheduler(optimizer, config, 10)
    peaks = [g["lr"] for g in optimizer.param_groups]
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    now = scheduler.get_last_lr()
    assert [a / b for a, b in zip(now, peaks)] == pytest.approx([now[0] / peaks[0]] * len(now))
    result = run(model=star(), **PLAIN, layer_decay=0.5, lr=0.1, warmup=0.5, epochs=2)
    assert result.history[0]["lr"] == pytest.approx(0.1)  # the head's


def test_layer_decay_needs_named_blocks(monkeypatch):
    with pytest.raises(ValueError, match=r"layer_decay=0.5 needs .* Sequential has none"):
        run(layer_decay=0.5)
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(ImportError, match="layer_decay needs timm: pip install timm"):
        run(model=star(), layer_decay=0.5)


def test_optimizers_of_timm_by_name():
    groups = make_optimizer(star(), TrainConfig(optimizer="lamb", lr=0.2, weight_decay=0.3))
    assert type(groups).__name__ == "Lamb"
    assert [(g["lr"], g["weight_decay"]) for g in groups.param_groups] == [(0.2, 0.3), (0.2, 0.0)]
    with pytest.raises(ValueError, match=r"optimizer must be 'adamw' or .* got 'adamwww'"):
        run(optimizer="adamwww")


def test_a_recipe_for_a_gpu_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match=r"amp_dtype='float16' needs a GPU.* take 'bfloat16'"):
        run(amp=True, amp_dtype="float16")
    with pytest.raises(ValueError, match=r"sync_bn needs a GPU.* leave it out"):
        run(sync_bn=True)


def scaled_run(scale: float) -> _Run:
    """Return a finished run in float16 with a scaled loss, on a CPU in place of a GPU."""
    config = TrainConfig(**{**RECIPE, **PLAIN, "epochs": 2, "warmup": 0.5})
    made = _Run(tiny_model(), tiny_data(), config, None, False)
    made.accelerator.native_amp = True
    made.accelerator.state._mixed_precision = "fp16"
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    made.optimizer = AcceleratedOptimizer(made.optimizer.optimizer, scaler=scaler)
    made.accelerator.scaler, made.accelerator._optimizers = scaler, [made.optimizer]
    made.run()
    return made


def test_a_scaled_loss_gives_the_steps_of_an_unscaled_one():
    """Clipping, too, sees the gradients without the scale."""
    plain = run(**PLAIN, epochs=2, warmup=0.5).history
    scaled = scaled_run(1024.0)
    for one, other in zip(scaled.history, plain, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-2)
        assert one["lr"] == other["lr"]


def test_an_overflow_skips_the_step_and_the_schedule_waits():
    scaled = scaled_run(2.0**20)
    assert scaled.accelerator.scaler.get_scale() < 2.0**20
    assert 0 < scaled.scheduler.last_epoch < scaled.step == 10
    assert all(p.isfinite().all() for p in scaled.model.parameters())


def test_norms_of_several_gpus_are_synchronised(monkeypatch):
    make = accelerator.make_accelerator

    class OfTwo:
        """The accelerator, which says that it has two processes until it is asked once."""

        def __init__(self, real):
            self._real, self._asked = real, False

        @property
        def num_processes(self):
            first, self._asked = not self._asked, True
            return 2 if first else self._real.num_processes

        def __getattr__(self, name):
            return getattr(self._real, name)

    def several(config, run_dir):
        return OfTwo(make(dataclasses.replace(config, sync_bn=False), run_dir))

    monkeypatch.setattr(loop_module, "make_accelerator", several)
    model = star()
    config = TrainConfig(**{**RECIPE, "sync_bn": True})
    _Run(model, tiny_data(), config, None, False)
    assert {type(m) for m in model.modules() if hasattr(m, "running_mean")} == {nn.SyncBatchNorm}


def test_top5_is_counted_from_six_classes_on():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 1, 6, 6), generator=generator).to(torch.uint8)
    images = TensorDataset(pixels, torch.arange(60) % 6)
    data = dataclasses.replace(
        tiny_data(), train=images, test=images, classes=tuple("abcdef"), mean=(0.5,), std=(0.3,)
    )
    model = star(6)
    line = run(model=model, data=data, **PLAIN, epochs=1).history[-1]
    with torch.no_grad():
        logits = model.eval()((pixels / 255 - 0.5) / 0.3)
    worst = logits.argmin(1)
    assert line["test_top5_accuracy"] == pytest.approx((worst != images.tensors[1]).double().mean())
    assert "test_top5_accuracy" not in run(epochs=1).history[-1]


@pytest.mark.parametrize("mix", [{"mixup": 0.3}, {"cutmix": 0.3}, {}])
def test_mixed_images_have_no_training_accuracy(mix, capfd, tmp_path):
    recipe = {"mixup": 0.0, "cutmix": 0.0, **mix}
    for line in run(tmp_path / "run", **recipe).history:
        assert (line["train_accuracy"] is None) is bool(mix)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert (json.loads(lines[0])["train_accuracy"] is None) is bool(mix)
    assert (tmp_path / "run" / "curves.png").is_file()


def test_tensorboard_gets_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = run(tmp_path / "run", log_with="tensorboard").history
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("test_accuracy", "train_loss", "lr"):
        found = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(name)]
        assert found == [(line["step"], line[name]) for line in history]


def test_a_tracker_needs_a_folder_and_its_package(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="log_with='tensorboard' needs a run_dir"):
        run(log_with="tensorboard")
    monkeypatch.setattr(accelerator, "get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match="log_with='wandb': pip install wandb"):
        run(tmp_path / "run", log_with="wandb")


def test_a_resized_crop_shows_a_part_in_full_size():
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8) * 4
    options = {"flip": 0.0, "crop": 0, "randaugment": 0}
    whole = image_transform(8, **options, resized_crop=1.0)
    part = image_transform(8, **options, resized_crop=0.1)
    ranges = []
    for transform in (whole, part):
        torch.manual_seed(0)
        changed = [transform(image) for _ in range(30)]
        assert {(tuple(x.shape), x.dtype) for x in changed} == {((1, 8, 8), torch.uint8)}
        ranges.append(sum(int(x.max()) - int(x.min()) for x in changed) / 30)
    assert ranges[1] < 0.7 * ranges[0]


def test_erased_rectangles_have_the_mean_of_the_images():
    image = torch.full((3, 16, 16), 200, dtype=torch.uint8)
    options = {"flip": 0.0, "crop": 0, "randaugment": 0}
    torch.manual_seed(0)
    erased = image_transform(16, **options, erase=1.0, fill=(10, 20, 30))(image)
    hole = (erased != 200).any(0)
    assert 0 < hole.sum() < 256
    assert erased[:, hole].unique(dim=1).flatten().tolist() == [10, 20, 30]
    assert image_transform(16, **options) is None


def test_a_trained_network_gets_a_lower_rate_and_fewer_steps():
    scratch, tuned = (TrainConfig.for_data(tiny_data(), finetune=f) for f in (False, True))
    assert (tuned.batch_size, tuned.lr) == (scratch.batch_size, pytest.approx(scratch.lr / 4, 0.05))
    assert (scratch.epochs, tuned.epochs) == (200, 100)
    assert TrainConfig.for_data(tiny_data(), finetune=True, lr=0.5, epochs=7).lr == 0.5
    accumulated = TrainConfig.for_data(tiny_data(), batch_size=16, accumulate=4)
    assert (accumulated.epochs, accumulated.lr) == (500, 2.8e-3)
    assert TrainConfig.for_data(tiny_data(), resized_crop=0.3).crop == 0


def test_earlier_runs_resume_only_with_what_they_did(tmp_path):
    RunDir(tmp_path, {"epochs": 3})
    RunDir(tmp_path, {"epochs": 3, "layer_decay": 1.0, "accumulate": 1}, resume=True)
    with pytest.raises(ValueError, match=r"layer_decay was 1.0, now 0.5"):
        RunDir(tmp_path, {"epochs": 3, "layer_decay": 0.5}, resume=True)
