"""Recipes: parameter groups, learning rates, averages, shuffling and augmentation."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from starlayers.vision import StarNet
from starlayers.vision.training import TrainConfig
from starlayers.vision.training.augment import (
    Augmented,
    ShuffleSampler,
    batch_transform,
    image_transform,
    mix_seeds,
)
from starlayers.vision.training.recipe import ema_model, lr_scheduler, param_groups


def test_param_groups_decay_only_matrices_and_kernels():
    model = StarNet(8, (1, 1), num_classes=3, in_chans=1, stage_strides=(2, 2))
    model.head.bias.requires_grad_(False)
    decay, rest = param_groups(model, 0.3)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    groups = {id(p): "decay" for p in decay["params"]} | {id(p): "rest" for p in rest["params"]}
    want = {}
    for m in model.modules():
        for name, p in m.named_parameters(recurse=False):
            is_kernel = isinstance(m, nn.Linear | nn.Conv2d) and name == "weight"
            want[id(p)] = "decay" if is_kernel else "rest"
    del want[id(model.head.bias)]
    assert groups == want
    assert len(decay["params"]) + len(rest["params"]) == len(want)


def rates(total, steps=None, **recipe):
    """Return the rate of each step, and after the last one, for a peak of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = lr_scheduler(optimizer, TrainConfig(lr=1.0, **recipe), total)
    values = []
    for _ in range(steps or total):
        values += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return values + schedule.get_last_lr()


def half_cosine(start, end, fraction):
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


@pytest.mark.parametrize(
    ("total", "warmup", "want"),
    [
        (1, 0.0, [1, 1]),
        (2, 0.0, [1, 1, 0]),
        (4, 0.5, [0.5, 1, 1, 0.5, 0]),
        (6, 0.25, [0.5, 1, 1, *(half_cosine(1, 0, i / 4) for i in (1, 2, 3, 4))]),
        (4, 0.9, [0.25, 0.5, 0.75, 1, 1]),
    ],
)
def test_cosine(total, warmup, want):
    assert rates(total, warmup=warmup) == pytest.approx(want, abs=1e-7)


LOW, LAST = 1 / 25, 1 / 25 / 1e4


@pytest.mark.parametrize(
    ("total", "warmup", "want"),
    [
        (1, 0.1, [LOW, 1]),
        (2, 0.1, [LOW, 1, LAST]),
        (3, 0.1, [LOW, 1, LAST]),
        (4, 0.0, [LOW, 1, half_cosine(1, LAST, 0.5), LAST]),
        (4, 0.75, [LOW, half_cosine(LOW, 1, 0.5), 1, LAST]),
        (5, 0.4, [LOW, 1, half_cosine(1, LAST, 1 / 3), half_cosine(1, LAST, 2 / 3), LAST]),
    ],
)
def test_onecycle(total, warmup, want):
    values = rates(total, len(want) - 1, schedule="onecycle", warmup=warmup)
    assert values == pytest.approx(want, rel=1e-5, abs=1e-9)


def test_an_average_of_parameters_and_buffers_and_a_copy_of_counters():
    model = nn.BatchNorm1d(2)
    ema = ema_model(model, 0.6)
    want = {}
    # min(0.6, (1 + n) / (10 + n)): the decay is smaller than 0.6 up to n = 12
    for n, value in enumerate([1.0, 2.0, 5.0, 3.0]):
        with torch.no_grad():
            for t in (model.weight, model.running_mean):
                t.fill_(value)
            model.num_batches_tracked.fill_(int(value))
        ema.update_parameters(model)
        decay = (1 + n) / (10 + n) if n else 0.0
        for name in ("weight", "running_mean"):
            want[name] = decay * want.get(name, 0.0) + (1 - decay) * value
    for name, value in want.items():
        assert ema.module.state_dict()[name].tolist() == pytest.approx([value] * 2)
    assert int(ema.module.num_batches_tracked) == 3
    assert model.weight.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("decay", [0.05, 0.6])
def test_the_decay_of_the_average_is_limited(decay):
    model = nn.Linear(1, 1, bias=False)
    ema = ema_model(model, decay)
    for value in (0.0, 1.0):
        nn.init.constant_(model.weight, value)
        ema.update_parameters(model)
    assert ema.module.weight.item() == pytest.approx(1 - min(decay, 2 / 11))


# --- shuffling and augmentation: functions of seed, epoch and index, with the right pixels


N, SIDE = 24, 8


def images(n: int = N, channels: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    # no zeros, so that padding can be told from pixels
    return torch.randint(1, 256, (n, channels, SIDE, SIDE), dtype=torch.uint8, generator=g)


def augmented(seed: int = 5, **kwargs: object) -> Augmented:
    options = {"flip": 0.5, "crop": 2, "randaugment": 2, **kwargs}
    data = TensorDataset(images(), torch.arange(N))
    return Augmented(data, image_transform(SIDE, **options), seed)


def in_order(data: Augmented, order: list[int] | None = None) -> torch.Tensor:
    """Return all images by index, loaded in `order`."""
    items = {i: data[i] for i in (order or range(N))}
    assert all(label == i for i, (_, label) in items.items())
    return torch.stack([items[i][0] for i in range(N)])


def test_seeds_are_mixed_as_python_hashes_a_tuple():
    assert mix_seeds(3, 5) == hash((3, 5)) & (2**63 - 1)
    seeds = {mix_seeds(*key) for key in [(0,), (1,), (0, 1), (1, 0), (0, 1, 0), (0, 1, 1)]}
    assert len(seeds) == 6
    assert all(0 <= mix_seeds(0, n) < 2**63 for n in range(50))
    assert any(mix_seeds(0, n) >= 2**62 for n in range(50))


def order_by_hand(length, seed, epoch):
    generator = torch.Generator().manual_seed(hash((seed, epoch)) & (2**63 - 1))
    return torch.randperm(length, generator=generator).tolist()


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    sampler = ShuffleSampler(50, seed=4)
    assert len(sampler) == 50
    assert list(sampler) == order_by_hand(50, 4, 0)
    orders = []
    for epoch in (0, 1, 2, 1):
        sampler.set_epoch(epoch)
        torch.manual_seed(epoch)
        orders.append(list(sampler))
        assert orders[-1] == order_by_hand(50, 4, epoch)
        assert sorted(orders[-1]) == list(range(50))
    assert orders[1] == orders[3]
    assert orders[0] != orders[1] != orders[2]
    assert list(ShuffleSampler(50, seed=5)) != orders[0]


def test_the_change_of_an_image_is_drawn_from_seed_epoch_and_index():
    data = augmented(seed=6)
    data.set_epoch(3)
    for index in (0, 7):
        got, label = data[index]
        torch.manual_seed(hash((6, 3, index)) & (2**63 - 1))
        assert torch.equal(got, data.transform(images()[index]))
        assert label == index


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_neither_order_nor_what_was_drawn_before_matters(epoch):
    data = augmented()
    data.set_epoch(epoch)
    want = in_order(data)
    torch.manual_seed(99)
    torch.rand(13)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(in_order(data, order), want)
    assert torch.equal(data[7][0], want[7])
    assert len(data) == N


def test_workers_change_nothing():
    data = augmented()
    for epoch in (0, 3):
        data.set_epoch(epoch)
        want = in_order(data)
        for batch_size in (5, 8):
            batches = list(DataLoader(data, batch_size, num_workers=2))
            assert torch.equal(torch.cat([x for x, _ in batches]), want)
            assert torch.cat([y for _, y in batches]).tolist() == list(range(N))


def test_epochs_seeds_and_images_differ_and_an_epoch_comes_back():
    data, other = augmented(seed=5), augmented(seed=6)
    by_epoch = []
    for epoch in range(4):
        data.set_epoch(epoch)
        by_epoch.append(in_order(data))
    for a in range(4):
        for b in range(a):
            same = (by_epoch[a] == by_epoch[b]).flatten(1).all(1).sum()
            assert same < N / 4  # a few may draw the same by chance
    data.set_epoch(1)
    assert torch.equal(in_order(data), by_epoch[1])
    assert not torch.equal(in_order(other), by_epoch[0])
    alike = Augmented([(images()[0], 0)] * N, data.transform, 5)
    assert len({alike[i][0].numpy().tobytes() for i in range(N)}) > N / 2


def test_the_data_set_itself_is_not_changed():
    data = augmented(crop=0, randaugment=0, flip=1.0)
    in_order(data)
    assert torch.equal(data.dataset.tensors[0], images())


@pytest.mark.parametrize("channels", [1, 3])
def test_flip_mirrors_left_and_right(channels):
    x = images(channels=channels)
    always = image_transform(SIDE, flip=1.0, crop=0, randaugment=0)
    assert torch.equal(always(x[0]), x[0].flip(-1))
    data = Augmented([(x[0], 0)] * 400, image_transform(SIDE, flip=0.25, crop=0, randaugment=0), 0)
    flipped = 0
    for i in range(400):
        y = data[i][0]
        assert torch.equal(y, x[0]) or torch.equal(y, x[0].flip(-1))
        flipped += torch.equal(y, x[0].flip(-1))
    assert flipped == pytest.approx(100, abs=35)  # four standard deviations


@pytest.mark.parametrize("crop", [1, 2])
def test_crop_shifts_by_up_to_that_many_pixels(crop):
    x = images()[0]
    padded = torch.nn.functional.pad(x, [crop] * 4)
    shifts = {
        padded[:, i : i + SIDE, j : j + SIDE].numpy().tobytes()
        for i in range(2 * crop + 1)
        for j in range(2 * crop + 1)
    }
    data = Augmented([(x, 0)] * 300, image_transform(SIDE, flip=0.0, crop=crop, randaugment=0), 1)
    assert {data[i][0].numpy().tobytes() for i in range(300)} == shifts


@pytest.mark.parametrize("operations", [1, 3])
def test_randaugment_is_torchvisions_with_that_many_operations(operations):
    ours = image_transform(SIDE, flip=0.0, crop=0, randaugment=operations)
    theirs = v2.RandAugment(num_ops=operations)
    changed = 0
    for seed in range(20):
        x = images(channels=3)[seed]
        torch.manual_seed(seed)
        got = ours(x)
        torch.manual_seed(seed)
        assert torch.equal(got, theirs(x))
        assert got.dtype == torch.uint8
        changed += not torch.equal(got, x)
    assert changed > 10


def test_all_options_take_part_in_turn():
    x = images(channels=3)[0]
    ours = image_transform(SIDE, flip=0.3, crop=2, randaugment=2)
    steps = [v2.RandomHorizontalFlip(0.3), v2.RandomCrop(SIDE, padding=2), v2.RandAugment(2)]
    for seed in range(10):
        torch.manual_seed(seed)
        got = ours(x)
        torch.manual_seed(seed)
        assert torch.equal(got, v2.Compose(steps)(x))


MIXERS = {
    "mixup": ({"mixup": 0.3, "cutmix": 0.0}, [v2.MixUp(alpha=0.3, num_classes=5)]),
    "cutmix": ({"mixup": 0.0, "cutmix": 0.4}, [v2.CutMix(alpha=0.4, num_classes=5)]),
    "both": (
        {"mixup": 0.2, "cutmix": 3.0},
        [v2.MixUp(alpha=0.2, num_classes=5), v2.CutMix(alpha=3.0, num_classes=5)],
    ),
}


@pytest.mark.parametrize(("options", "mixers"), MIXERS.values(), ids=MIXERS)
def test_mixing_has_torchvisions_values_for_these_parameters(options, mixers):
    x, labels = images().float(), torch.arange(N) % 5
    ours, theirs = batch_transform(5, **options), v2.RandomChoice(mixers)
    for seed in range(8):
        torch.manual_seed(seed)
        got = ours(x, labels)
        torch.manual_seed(seed)
        torch.testing.assert_close(got, theirs(x, labels), rtol=0, atol=0)


def test_nothing_asked_for_is_no_transform():
    assert image_transform(28, flip=0.0, crop=0, randaugment=0) is None
    assert batch_transform(10, mixup=0.0, cutmix=0.0) is None


def mixed(mixup: float, cutmix: float, seed: int):
    torch.manual_seed(seed)
    x = images().float()
    labels = torch.arange(N) % 5
    y, targets = batch_transform(5, mixup=mixup, cutmix=cutmix)(x, labels)
    assert y.shape == x.shape
    torch.testing.assert_close(targets.sum(1), torch.ones(N))
    assert bool((targets >= 0).all())
    # with 24 images of 5 classes in turn no neighbours but the ends share a class
    share = targets[1, 1].item()
    one_hot = torch.nn.functional.one_hot(labels, 5).float()
    torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot.roll(1, 0))
    return x, y, share


def is_mixup(x, y, share) -> bool:
    return torch.allclose(y, share * x + (1 - share) * x.roll(1, 0), atol=1e-3)


def is_cutmix(x, y, share) -> bool:
    own, other = (y == x).all(1), (y == x.roll(1, 0)).all(1)
    kept = own.float().mean((1, 2))
    # pixels that two images share by chance count for both
    same = (x == x.roll(1, 0)).all(1).float().mean((1, 2))
    return bool((own | other).all()) and bool((kept - share <= same + 1e-6).all())


def test_mixup_mixes_pixels_and_labels_in_one_proportion():
    shares = []
    for seed in range(10):
        x, y, share = mixed(0.8, 0.0, seed)
        assert is_mixup(x, y, share)
        shares.append(share)
    assert max(shares) - min(shares) > 0.2


def test_cutmix_replaces_the_area_that_its_labels_say():
    for seed in range(10):
        x, y, share = mixed(0.0, 1.0, seed)
        assert is_cutmix(x, y, share)
        assert (share * SIDE * SIDE) == pytest.approx(round(share * SIDE * SIDE), abs=1e-3)


def test_both_take_turns_at_random():
    kinds = []
    for seed in range(30):
        x, y, share = mixed(1.0, 1.0, seed)
        assert is_mixup(x, y, share) or is_cutmix(x, y, share)
        kinds.append(is_mixup(x, y, share))
    assert 5 <= sum(kinds) <= 25
