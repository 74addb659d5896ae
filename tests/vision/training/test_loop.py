"""Training loop against training written out by hand, and resumed runs."""

import dataclasses
import math
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from starlayers.datasets.images import load_images
from starlayers.vision import starnet_s050
from starlayers.vision.training import TrainConfig, TrainResult, train
from starlayers.vision.training.augment import Augmented, ShuffleSampler, image_transform
from starlayers.vision.training.rundir import RunDir

from .util import (
    CLASSES,
    RECIPE,
    SIDE,
    ByHand,
    assert_same_run,
    call_at_step,
    numbers,
    run,
    tiny_data,
    tiny_model,
    weights,
)

#: one batch with all images, nothing random
PLAIN = {"batch_size": 80, "flip": 0.0, "crop": 0, "mixup": 0.0, "cutmix": 0.0, "ema": 0.0}
PLAIN["norm_batches"] = 0


def still_model(seed=0, norm=True):
    return tiny_model(seed, dropout=0.0, norm=norm)


def cosine(epochs, warmup):
    """Return the rate of each step, and after the last one, as fractions of the peak."""
    w = max(1, round(warmup * epochs))
    rise = [(i + 1) / w for i in range(w)]
    return rise + [
        (1 + math.cos(math.pi * i / max(1, epochs - w))) / 2 for i in range(epochs - w + 1)
    ]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("clip", [0.0, 0.05, 100.0])
def test_steps_are_those_of_adamw_by_hand(smoothing, clip):
    recipe = {**PLAIN, "epochs": 3, "clip": clip, "label_smoothing": smoothing}
    recipe |= {"warmup": 0.5, "weight_decay": 0.5}
    model, data = still_model(), tiny_data()
    result = run(model=model, data=data, **recipe)
    hand = ByHand(still_model(), data, TrainConfig(**{**RECIPE, **recipe}))
    losses = [hand.step(RECIPE["lr"] * factor) for factor in cosine(3, 0.5)[:3]]
    assert [h["train_loss"] for h in result.history] == pytest.approx(losses, rel=1e-4)
    for (name, got), want in zip(model.state_dict().items(), hand.model.state_dict().values()):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=name)
    before = still_model().state_dict()["1.weight"]
    assert (hand.model.state_dict()["1.weight"] - before).abs().max() > 0.02  # it moved


def test_clipping_smoothing_and_decay_do_something():
    def moved(**kwargs):
        model = still_model()
        run(model=model, **{**PLAIN, "epochs": 2, **kwargs})
        return model.state_dict()["1.weight"]

    plain = moved()
    for change in ({"clip": 1e-6}, {"label_smoothing": 0.5}, {"weight_decay": 5.0}, {"lr": 0.1}):
        assert (moved(**change) - plain).abs().max() > 1e-4, change


@pytest.mark.parametrize(("epochs", "warmup"), [(10, 0.3), (7, 0.0), (4, 0.25), (5, 0.9), (1, 0.1)])
def test_cosine_schedule(epochs, warmup):
    rates = [h["lr"] for h in run(**PLAIN, epochs=epochs, warmup=warmup, lr=0.5).history]
    want = [0.5 * f for f in cosine(epochs, warmup)[1:]]
    assert rates == pytest.approx(want, abs=1e-7)
    if epochs > 1:
        assert rates[-1] == pytest.approx(0.0, abs=1e-7)


def test_the_schedule_counts_steps_not_epochs():
    rates = [h["lr"] for h in run(epochs=2, warmup=0.3, lr=1.0).history]  # 5 steps an epoch
    assert rates == pytest.approx([cosine(10, 0.3)[5], 0.0], abs=1e-7)


@pytest.mark.parametrize(("epochs", "warmup"), [(10, 0.3), (10, 0.5), (8, 0.25)])
def test_onecycle_schedule_peaks_after_the_warmup(epochs, warmup):
    recipe = {**PLAIN, "schedule": "onecycle", "warmup": warmup, "lr": 0.5}
    rates = [h["lr"] for h in run(**recipe, epochs=epochs).history]
    top = round(warmup * epochs) - 1  # the step with the peak, counted from 0
    assert rates.index(max(rates)) == top - 1
    assert max(rates) == pytest.approx(0.5)
    rise = [0.5 * ((1 - math.cos(math.pi * i / top)) / 2 * 24 + 1) / 25 for i in range(top + 1)]
    assert rates[:top] == pytest.approx(rise[1:], rel=1e-5)
    assert rates[epochs - 2] == pytest.approx(0.5 / 25 / 1e4, rel=1e-3)  # of the last step


@pytest.mark.parametrize(("epochs", "warmup"), [(10, 0.0), (10, 0.1), (1, 0.1), (3, 0.1)])
def test_onecycle_schedule_with_a_warmup_of_a_step_or_less(epochs, warmup):
    rates = [
        h["lr"]
        for h in run(
            **PLAIN, epochs=epochs, warmup=warmup, schedule="onecycle", lr=0.5, model=still_model()
        ).history
    ]
    assert len(rates) == epochs
    assert all(math.isfinite(r) and 0 <= r <= 0.5 for r in rates)
    used = rates[:-1]  # the last is that of a step after the end
    assert used == sorted(used, reverse=True)


@pytest.mark.parametrize("decay", [0.3, 0.99])
def test_the_average_of_weights_and_statistics(tmp_path, decay):
    recipe = {**PLAIN, "epochs": 5, "ema": decay}
    data = tiny_data()
    run(tmp_path / "run", model=still_model(), data=data, **recipe)
    hand = ByHand(still_model(), data, TrainConfig(**{**RECIPE, **recipe}))
    average = {}
    for n, factor in enumerate(cosine(5, 0.1)[:5]):
        hand.step(RECIPE["lr"] * factor)
        d = min(decay, (1 + n) / (10 + n)) if n else 0.0
        for name, now in hand.model.state_dict().items():
            if now.is_floating_point():
                average[name] = d * average.get(name, 0) + (1 - d) * now
            else:
                average[name] = now.clone()
    saved = weights(tmp_path / "run")
    assert saved.keys() == average.keys()
    assert int(saved["2.num_batches_tracked"]) == 5
    for name, want in average.items():
        torch.testing.assert_close(saved[name], want, rtol=1e-3, atol=1e-4, msg=name)
    last = hand.model.state_dict()["1.weight"]
    assert (saved["1.weight"] - last).abs().max() > 3e-4  # an average, not the last weights


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_accuracy_is_that_of_the_saved_weights_on_every_test_image(tmp_path, ema):
    data = tiny_data(test=700)  # more than a validation batch
    result = run(tmp_path / "run", data=data, ema=ema)
    model = tiny_model(seed=8).eval()
    model.load_state_dict(weights(tmp_path / "run"))
    images, labels = data.test.tensors
    with torch.no_grad():
        logits = model((images / 255 - data.mean[0]) / data.std[0])
    right = (logits.argmax(1) == labels).sum().item()
    assert 0.3 < right / 700 < 1
    assert result.test_accuracy == right / 700
    assert result.history[-1]["test_loss"] == pytest.approx(
        F.cross_entropy(logits, labels).item(), rel=1e-5
    )
    matrix = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for true, predicted in zip(labels.tolist(), logits.argmax(1).tolist()):
        matrix[true, predicted] += 1
    assert torch.equal(result.confusion.cpu(), matrix)


# batches of 16: the last one is kept, but for a single image, on which no BatchNorm can be trained
@pytest.mark.parametrize(("images", "seen", "steps"), [(70, 70, 5), (65, 64, 4), (66, 66, 5)])
def test_training_accuracy_counts_the_images_seen(images, seen, steps):
    data = tiny_data(train=images)
    for line in run(data=data, epochs=2, mixup=0.0, cutmix=0.0).history:
        right = line["train_accuracy"] * seen
        assert right == pytest.approx(round(right), abs=1e-4)
        assert line["step"] == steps * line["epoch"]


@pytest.mark.parametrize("norm", [False, True])
def test_each_step_sees_the_images_of_its_epoch_normalised(norm):
    data, seen = tiny_data(train=32), []
    model = tiny_model(norm=norm)
    model.register_forward_pre_hook(
        lambda m, x: seen.append(x[0].detach().clone()) if m.training else None
    )
    options = {"flip": 0.5, "crop": 1, "randaugment": 0}
    options |= {"norm_batches": 1} if norm else {}
    run(model=model, data=data, epochs=2, mixup=0.0, cutmix=0.0, ema=0.0, **options)
    if norm:  # the first batch of each epoch once more, for the statistics
        again = [seen.pop(2), seen.pop(4)]
        for first, epoch in zip((seen[0], seen[2]), again, strict=True):
            torch.testing.assert_close(epoch, first, rtol=0, atol=0)
        del options["norm_batches"]
    images = Augmented(data.train, image_transform(SIDE, **options), RECIPE["seed"])
    order = ShuffleSampler(32, RECIPE["seed"])
    assert len(seen) == 4
    for epoch in range(2):
        images.set_epoch(epoch)
        order.set_epoch(epoch)
        want = torch.stack([images[i][0] for i in order]).float() / 255
        want = (want - data.mean[0]) / data.std[0]
        torch.testing.assert_close(torch.cat(seen[2 * epoch : 2 * epoch + 2]), want)


def test_each_channel_is_normalised_by_its_own_mean_and_deviation():
    pixels = torch.randint(0, 256, (16, 2, SIDE, SIDE), dtype=torch.uint8)
    images = TensorDataset(pixels, torch.arange(16) % CLASSES)
    data = SimpleNamespace(
        train=images,
        test=images,
        classes=tuple("abcd"),
        shape=(2, SIDE, SIDE),
        mean=(0.2, 0.6),
        std=(0.5, 2.0),
    )
    seen, model = [], nn.Sequential(nn.Flatten(), nn.Linear(2 * SIDE * SIDE, CLASSES))
    model.register_forward_pre_hook(lambda m, x: None if m.training else seen.append(x[0]))
    run(model=model, data=data, epochs=1, ema=0.0)
    mean, std = torch.tensor([0.2, 0.6]), torch.tensor([0.5, 2.0])
    want = (pixels / 255 - mean.view(2, 1, 1)) / std.view(2, 1, 1)
    torch.testing.assert_close(torch.cat(seen), want)


def test_the_randomness_of_a_step_is_drawn_from_seed_and_step():
    seeds, model = [], tiny_model()
    model.register_forward_pre_hook(
        lambda m, _: seeds.append(torch.initial_seed()) if m.training else None
    )
    run(model=model, epochs=2, norm_batches=1)
    steps = [hash((RECIPE["seed"], step, 0)) & (2**63 - 1) for step in range(10)]
    estimates = [hash((RECIPE["seed"], step, 0)) & (2**63 - 1) for step in (5, 10)]
    assert seeds == [*steps[:5], estimates[0], *steps[5:], estimates[1]]


@pytest.mark.parametrize("ema", [0.0, 0.998])
def test_a_short_training_is_validated_by_the_statistics_of_its_weights(ema):
    """36 steps on digits: running statistics give 0.3 where the same weights reach 0.98."""
    torch.manual_seed(0)
    model = starnet_s050(
        in_chans=1, num_classes=10, stem_stride=1, stage_strides=(1, 1, 2, 2), kernel_size=3
    )
    config = TrainConfig(epochs=3, flip=0.0, ema=ema)
    result = train(model, load_images("digits"), config, progress=False)
    last = result.history[-1]
    assert last["step"] == 36
    # an average lags behind by itself
    assert last["test_accuracy"] > (0.9 if ema else last["train_accuracy"] - 0.02)


def test_the_training_loss_is_the_mean_over_images():
    """Also where the last batch is smaller: 80 images in batches of 64 and 16."""
    recipe = {**PLAIN, "epochs": 1, "batch_size": 64, "lr": 0.0, "label_smoothing": 0.0}
    model, data = still_model(norm=False), tiny_data()
    (line,) = run(model=model, data=data, **recipe).history
    images, labels = data.train.tensors
    logits = still_model(norm=False)((images / 255 - data.mean[0]) / data.std[0])
    assert line["train_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def unequal():
    """Return the tiny data with classes of about 1, 2, 5 and 20 images."""
    data = tiny_data(train=200)
    images, labels = data.train.tensors
    counts = (1, 2, 5, 20)
    kept = torch.cat([(labels == c).nonzero()[: counts[c], 0] for c in range(4)])
    return dataclasses.replace(data, train=TensorDataset(images[kept], labels[kept]))


def test_a_balanced_loss_weights_classes_by_the_inverse_of_their_images():
    recipe = {**PLAIN, "epochs": 1, "batch_size": 28, "lr": 0.0, "label_smoothing": 0.0}
    data = unequal()
    (line,) = run(model=still_model(norm=False), data=data, balance="loss", **recipe).history
    images, labels = data.train.tensors
    logits = still_model(norm=False)((images / 255 - data.mean[0]) / data.std[0])
    losses = F.cross_entropy(logits, labels, reduction="none")
    want = sum(losses[labels == c].mean() for c in range(4)) / 4
    assert line["train_loss"] == pytest.approx(want.item(), rel=1e-5)


def test_balanced_sampling_draws_all_classes_equally_often():
    data, drawn = unequal(), []
    model = still_model()
    model.register_forward_pre_hook(lambda m, x: drawn.append(x[0].detach().clone()))
    recipe = {**PLAIN, "batch_size": 28, "epochs": 60}
    run(model=model, data=data, balance="sampling", **recipe)
    images, labels = data.train.tensors
    known = ((images / 255 - data.mean[0]) / data.std[0]).flatten(1)
    seen = torch.cat([x for x in drawn if len(x) == 28]).flatten(1)
    numbers = torch.cdist(seen, known).argmin(1)
    shares = torch.bincount(labels[numbers]) / len(numbers)
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.05)


def test_images_of_one_value_are_refused():
    data = dataclasses.replace(tiny_data(), std=(1e-6,))
    with pytest.raises(ValueError, match="all pixels are of one value"):
        run(data=data)


def test_frozen_parts_are_trained_by_nothing():
    model = tiny_model()
    model[:3].requires_grad_(False)
    before = {k: v.clone() for k, v in model[:3].state_dict().items()}
    run(model=model, epochs=2, ema=0.0)
    for name, value in model[:3].state_dict().items():
        assert torch.equal(value, before[name]), name


def test_it_learns():
    result = run(epochs=12, mixup=0.0, cutmix=0.0, crop=0)
    assert result.test_accuracy > 0.7
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert math.isnan(TrainResult([], None, False, 0.0).test_accuracy)


def test_batch_larger_than_the_data():
    with pytest.raises(ValueError, match="batch_size=81 is more than the 80 training images"):
        run(batch_size=81)
    assert len(run(batch_size=80, epochs=1).history) == 1


def test_the_history_has_one_line_per_epoch():
    history = run(epochs=3).history
    assert [(h["epoch"], h["step"]) for h in history] == [(1, 5), (2, 10), (3, 15)]
    keys = "epoch step lr train_loss train_accuracy test_loss test_accuracy seconds"
    assert all(list(h) == keys.split() for h in history)
    assert numbers(history)[0].keys() == history[0].keys() - {"seconds"}


# --- resumed runs against undisturbed ones


STEPS = 15  # three epochs of five


class Crash(Exception):
    pass


def crash():
    raise Crash


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Function from a recipe to (result, folder) of a whole run, each trained once."""
    done = {}

    def get(**recipe):
        key = tuple(recipe.items())
        if key not in done:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            done[key] = run(folder, **recipe), folder
        return done[key]

    return get


def states(folder):
    return sorted(int(p.name.split("_")[1]) for p in (folder / "state").iterdir())


# 2 saves a state anyway, 5 ends an epoch, 6 begins one
@pytest.mark.parametrize(
    "step", [2, 5, 6, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 9, 10, 14))]
)
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, undisturbed, step):
    handler = signal.getsignal(signal.SIGINT)
    stopped = run(tmp_path / "run", model=call_at_step(tiny_model(), step, interrupt))
    assert signal.getsignal(signal.SIGINT) is handler
    assert not stopped.finished
    assert len(stopped.history) == step // 5  # an interrupt in the last step ends the epoch
    assert states(tmp_path / "run") == [step]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    model = tiny_model(seed=99)  # the state brings the weights
    resumed = run(tmp_path / "run", model=model, resume=True)
    assert signal.getsignal(signal.SIGINT) is handler
    want, folder = undisturbed()
    assert_same_run(resumed, want, tmp_path / "run", folder)
    assert states(tmp_path / "run") == [STEPS]
    assert numbers(resumed.history)[: step // 5] == numbers(stopped.history)


def test_an_interrupt_in_the_very_last_step_finishes_the_run(tmp_path, undisturbed):
    result = run(tmp_path / "run", model=call_at_step(tiny_model(), STEPS, interrupt))
    assert_same_run(result, undisturbed()[0], tmp_path / "run", undisturbed()[1])


def test_an_interrupt_while_validating_ends_after_the_epoch(tmp_path, undisturbed):
    model, calls = tiny_model(), []

    def hook(module, *_):
        if not module.training and not calls:
            calls.append(1)
            interrupt()

    model.register_forward_hook(hook)
    stopped = run(tmp_path / "run", model=model)
    assert (stopped.finished, len(stopped.history), states(tmp_path / "run")) == (False, 1, [5])
    resumed = run(tmp_path / "run", resume=True)
    assert_same_run(resumed, undisturbed()[0], tmp_path / "run", undisturbed()[1])


def test_a_second_interrupt_stops_at_once(tmp_path, undisturbed):
    def twice():
        interrupt()
        interrupt()

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", model=call_at_step(tiny_model(), 8, twice))
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = run(tmp_path / "run", resume=True)
    assert_same_run(resumed, undisturbed()[0], tmp_path / "run", undisturbed()[1])


@pytest.mark.parametrize(
    ("step", "saved"),
    [
        (1, []),
        (4, [2]),
        (6, [5]),
        pytest.param(8, [6], marks=pytest.mark.slow),
        pytest.param(11, [10], marks=pytest.mark.slow),
    ],
)
def test_a_crash_loses_only_what_came_after_the_last_state(tmp_path, undisturbed, step, saved):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Crash):
        run(tmp_path / "run", model=call_at_step(tiny_model(), step, crash))
    assert signal.getsignal(signal.SIGINT) is handler
    assert (states(tmp_path / "run") if saved else []) == saved
    # without a state the caller's weights count, as in the example, which seeds them
    resumed = run(tmp_path / "run", model=tiny_model(0 if not saved else 99), resume=True)
    assert_same_run(resumed, undisturbed()[0], tmp_path / "run", undisturbed()[1])


def test_stopped_again_and_again(tmp_path, undisturbed):
    folder = tmp_path / "run"
    for i, (step, action) in enumerate(
        [(3, interrupt), (2, crash), (4, interrupt), (3, interrupt)]
    ):
        model = call_at_step(tiny_model(i), step, action)
        try:
            assert not run(folder, model=model, resume=i > 0).finished
        except Crash:
            assert action is crash
    resumed = run(folder, model=tiny_model(9), resume=True)
    assert_same_run(resumed, undisturbed()[0], folder, undisturbed()[1])


ONECYCLE = {"schedule": "onecycle", "warmup": 0.3}
OTHER_RECIPES = [({"workers": 1, "amp": True}, 3), ({**ONECYCLE, "ema": 0.0}, 7)]
ONE_BY_ONE = [({"workers": 1}, 7), ({"amp": True}, 7), (ONECYCLE, 3), ({"ema": 0.0}, 3)]


@pytest.mark.parametrize(
    ("recipe", "step"),
    OTHER_RECIPES + [pytest.param(*case, marks=pytest.mark.slow) for case in ONE_BY_ONE],
    ids=str,
)
def test_other_recipes_resume_too(tmp_path, undisturbed, recipe, step):
    stopped = run(tmp_path / "run", model=call_at_step(tiny_model(), step, interrupt), **recipe)
    assert not stopped.finished
    resumed = run(tmp_path / "run", model=tiny_model(99), resume=True, **recipe)
    assert_same_run(resumed, undisturbed(**recipe)[0], tmp_path / "run", undisturbed(**recipe)[1])


def test_metrics_written_before_a_lost_state_are_not_doubled(tmp_path, undisturbed, monkeypatch):
    save = RunDir.save

    def no_state_at_the_end_of_epoch_two(self, accelerator, step):
        if step == 10:
            raise Crash
        save(self, accelerator, step)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "save", no_state_at_the_end_of_epoch_two)
        with pytest.raises(Crash):
            run(tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert (len(lines), states(tmp_path / "run")) == (2, [8])
    resumed = run(tmp_path / "run", resume=True)
    assert_same_run(resumed, undisturbed()[0], tmp_path / "run", undisturbed()[1])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_kill_between_the_last_state_and_the_weights(tmp_path, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "finish", lambda *_: crash())
        with pytest.raises(Crash):
            run(tmp_path / "run")
    assert states(tmp_path / "run") == [STEPS]
    resumed = run(tmp_path / "run", resume=True)
    want, folder = undisturbed()
    assert numbers(resumed.history) == numbers(want.history)
    saved, wanted = weights(tmp_path / "run"), weights(folder)
    assert all(torch.equal(saved[k], wanted[k]) for k in wanted)
    assert (tmp_path / "run" / "curves.png").is_file()
    assert (tmp_path / "run" / "confusion.png").is_file()
    assert torch.equal(resumed.confusion, want.confusion)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = run(tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    again = run(tmp_path / "run", model=tiny_model(99), resume=True)
    assert again.finished
    assert again.history == first.history  # with its seconds
    assert again.test_accuracy == first.test_accuracy
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_seconds_go_on_counting(tmp_path):
    began = time.perf_counter()
    stopped = run(tmp_path / "run", model=call_at_step(tiny_model(), 7, interrupt))
    resumed = run(tmp_path / "run", resume=True)
    assert time.perf_counter() - began > resumed.seconds > stopped.seconds > 0
    counted = [h["seconds"] for h in resumed.history]
    assert counted == sorted(counted)


def test_without_a_folder_nothing_is_written_and_an_interrupt_still_stops(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(
        call_at_step(tiny_model(), 7, interrupt), tiny_data(), TrainConfig(**RECIPE), progress=False
    )
    assert (result.finished, len(result.history)) == (False, 1)
    assert list(tmp_path.iterdir()) == []
