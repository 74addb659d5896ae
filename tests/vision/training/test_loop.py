"""Training loop against training written out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from starlayers.vision.training import TrainConfig, TrainResult
from starlayers.vision.training.augment import Augmented, ShuffleSampler, image_transform

from .util import CLASSES, RECIPE, SIDE, ByHand, numbers, run, tiny_data, tiny_model, weights

#: one batch with all images, nothing random
PLAIN = {"batch_size": 80, "flip": 0.0, "crop": 0, "mixup": 0.0, "cutmix": 0.0, "ema": 0.0}


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


def test_training_accuracy_counts_the_images_seen():
    data = tiny_data(train=70)
    for line in run(data=data, epochs=2).history:
        right = line["train_accuracy"] * 64  # 4 batches of 16; 6 images are left out
        assert right == pytest.approx(round(right), abs=1e-4)
        assert line["step"] == 4 * line["epoch"]


def test_each_step_sees_the_images_of_its_epoch_normalised():
    data, seen = tiny_data(train=32), []
    model = tiny_model()
    model.register_forward_pre_hook(
        lambda m, x: seen.append(x[0].detach().clone()) if m.training else None
    )
    options = {"flip": 0.5, "crop": 1, "randaugment": 0}
    run(model=model, data=data, epochs=2, mixup=0.0, cutmix=0.0, **options)
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
    run(model=model, epochs=2)
    assert seeds == [hash((RECIPE["seed"], step, 0)) & (2**63 - 1) for step in range(10)]


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
