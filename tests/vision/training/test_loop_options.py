"""Options of `TrainConfig`: each changes what it says and nothing else; bad values are refused."""

import re
import signal
import threading
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, get_worker_info

from starlayers.vision.training import RunDir, TrainConfig, train

from .util import CLASSES, SIDE, numbers, run, tiny_data, tiny_model, weights


def test_the_same_seed_gives_the_same_run(tmp_path):
    first = run(tmp_path / "a")
    torch.manual_seed(77)  # earlier draws do not matter
    torch.rand(5)
    second = run(tmp_path / "b")
    assert numbers(first.history) == numbers(second.history)
    assert torch.equal(first.confusion, second.confusion)
    one, other = (tmp_path / f / "model.safetensors" for f in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_another_seed_gives_another_run():
    histories = [numbers(run(seed=seed).history) for seed in (3, 4)]
    for one, other in zip(*histories, strict=True):
        assert one["train_loss"] != other["train_loss"]


#: a value of each field that changes numbers, other than the one in RECIPE
CHANGES = {
    "epochs": 2,
    "batch_size": 20,
    "accumulate": 2,
    "optimizer": "lamb",
    "lr": 1e-2,
    "weight_decay": 2.0,
    "schedule": "onecycle",
    "warmup": 0.4,
    "label_smoothing": 0.3,
    "clip": 0.02,
    "flip": 0.0,
    "crop": 0,
    "resized_crop": 0.5,
    "randaugment": 1,
    "erase": 0.9,
    "mixup": 0.9,
    "cutmix": 0.0,
    "ema": 0.5,
    "norm_batches": 0,
    "balance": "sampling",
    "amp": True,
    "seed": 4,
}


@pytest.fixture(scope="module")
def plain_loss():
    return run().history[-1]["test_loss"]


@pytest.mark.parametrize(("name", "value"), CHANGES.items(), ids=CHANGES)
def test_every_field_changes_the_result(plain_loss, name, value):
    # tests/vision/training/test_finetune.py has those of a StarNet, of a GPU and of a folder
    others = {"compile", "save_every", "workers", "log_with"}
    others |= {"layer_decay", "freeze", "amp_dtype", "sync_bn"}
    assert CHANGES.keys() | others == {f.name for f in fields(TrainConfig)}
    assert run(**{name: value}).history[-1]["test_loss"] != plain_loss


@pytest.mark.parametrize(("save_every", "want"), [(1, [1, 2, 3, 4]), (3, [3]), (5, []), (9, [])])
def test_states_are_saved_after_so_many_steps_and_each_epoch(
    tmp_path, monkeypatch, save_every, want
):
    steps, save = [], RunDir.save

    def record(self, accelerator, step):
        steps.append(step)
        save(self, accelerator, step)

    monkeypatch.setattr(RunDir, "save", record)
    run(tmp_path / "run", epochs=1, save_every=save_every)
    assert steps == [*want, 5]


class Watched(Dataset):
    """Images that hold the number of the process that loads them, and its view of Ctrl-C."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        worker = get_worker_info()
        image = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
        image[0, 0, 0] = 0 if worker is None else 1 + worker.id
        image[0, 0, 1] = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return image, index % CLASSES


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_load_the_images_and_ignore_ctrl_c(workers):
    watched = Watched()
    data = SimpleNamespace(
        train=watched,
        test=watched,
        classes=tuple("abcd"),
        shape=(1, SIDE, SIDE),
        mean=(0.0,),
        std=(1 / 255,),
    )
    seen, model = {True: [], False: []}, tiny_model()
    model.register_forward_pre_hook(lambda m, x: seen[m.training].append(x[0][:, 0, 0, :2]))
    run(
        model=model,
        data=data,
        workers=workers,
        epochs=1,
        flip=0.0,
        crop=0,
        mixup=0.0,
        cutmix=0.0,
        ema=0.0,
    )
    want = {(1, 1), (2, 1)} if workers else {(0, 0)}
    assert {tuple(pair) for x in seen[True] for pair in x.round().int().tolist()} == want
    # all test images are one batch, which one worker loads
    validated = {tuple(pair) for x in seen[False] for pair in x.round().int().tolist()}
    assert validated == {min(want)}


def test_epochs_are_augmented_and_ordered_differently():
    seen = []
    data = tiny_data(train=32)
    model = tiny_model()
    model.register_forward_pre_hook(
        lambda m, x: seen.append(x[0].detach().clone()) if m.training else None
    )
    options = {"ema": 0.0, "mixup": 0.0, "cutmix": 0.0, "flip": 0.0, "crop": 0, "norm_batches": 0}
    run(model=model, data=data, epochs=2, **options)
    epochs = [torch.cat(seen[:2]).flatten(1), torch.cat(seen[2:]).flatten(1)]
    assert not torch.equal(*epochs)
    for epoch in epochs:  # every image once in each
        want = (data.train.tensors[0].flatten(1) / 255 - data.mean[0]) / data.std[0]
        distance = (epoch[:, None] - want).abs().amax(2)
        assert sorted(distance.argmin(1).tolist()) == list(range(32))
        assert distance.min(1).values.max() < 1e-5


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_workers_change_nothing(tmp_path, workers):
    alone = run(tmp_path / "alone", epochs=2, randaugment=1)
    helped = run(tmp_path / "helped", epochs=2, randaugment=1, workers=workers)
    assert numbers(helped.history) == numbers(alone.history)
    one, other = (tmp_path / f / "model.safetensors" for f in ("alone", "helped"))
    assert one.read_bytes() == other.read_bytes()


def test_mixed_precision_differs_little_and_for_this_run_only():
    seen = []

    def history(amp):
        model = tiny_model()
        model[1].register_forward_hook(lambda m, x, y: seen.append((amp, y.dtype)))
        return numbers(run(model=model, amp=amp).history)

    full, mixed, again = history(False), history(True), history(False)
    assert again == full
    assert set(seen) == {(False, torch.float32), (True, torch.bfloat16)}
    assert mixed != full
    for one, other in zip(mixed, full, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.02)
        assert one["test_loss"] == pytest.approx(other["test_loss"], rel=0.02)


def test_weights_stay_in_single_precision_under_amp(tmp_path):
    run(tmp_path / "run", amp=True)
    dtypes = {v.dtype for v in weights(tmp_path / "run").values()}
    assert dtypes == {torch.float32, torch.int64}


def compiled_and_not(backend=None):
    # no dropout: a compiled one draws other numbers
    model, twin = tiny_model(dropout=0.0), tiny_model(dropout=0.0)
    if backend:
        plain, model.compile = model.compile, lambda: plain(backend=backend)
    compiled = run(model=model, compile=True, epochs=2).history
    for one, other in zip(compiled, run(model=twin, epochs=2).history, strict=True):
        for key in ("train_loss", "test_loss", "lr"):
            assert one[key] == pytest.approx(other[key], rel=1e-3)
        assert one["test_accuracy"] == pytest.approx(other["test_accuracy"], abs=1.5 / 37)
    return model


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_gives_the_same_run():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled_and_not(backend)
    assert graphs  # it was compiled


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_the_default_backend():
    model = compiled_and_not()
    assert model._compiled_call_impl is not None


def test_compiled_weights_have_their_plain_names(tmp_path, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)  # names do not need a compiler
    run(tmp_path / "run", compile=True, epochs=1)
    assert weights(tmp_path / "run").keys() == tiny_model().state_dict().keys()


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(SIDE**2, SIDE**2), nn.Linear(SIDE**2, SIDE**2)
        self.b.weight = self.a.weight
        self.c = nn.Linear(SIDE**2, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x.flatten(1)).tanh()).tanh())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_model_with_tied_weights_is_trained_and_saved(tmp_path, ema):
    model = Tied()
    assert run(tmp_path / "run", model=model, epochs=1, ema=ema).finished
    fresh = Tied()
    fresh.load_state_dict(weights(tmp_path / "run"))
    assert fresh.b.weight is fresh.a.weight
    if not ema:
        assert torch.equal(fresh.a.weight, model.a.weight)


def test_training_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(run(epochs=1)))
    thread.start()
    thread.join()
    assert numbers(results[0].history) == numbers(run(epochs=1).history)


def test_progress_is_shown_only_when_wanted(capfd):
    run(epochs=1)
    quiet = capfd.readouterr()
    assert (quiet.out, quiet.err) == ("", "")
    config = TrainConfig(epochs=2, batch_size=8)
    history = train(tiny_model(), tiny_data(), config).history
    out, err = capfd.readouterr()
    assert "epoch 1/2: " in err
    assert "epoch 2/2: 100%" in err
    assert "10/10" in err
    assert " images/s" in err
    for line in history:
        assert f"epoch {line['epoch']}: train loss {line['train_loss']:.4f}, " in out + err
        assert f"test accuracy {line['test_accuracy']:.2%}, " in out + err


def test_the_bar_shows_loss_accuracy_and_rate_every_ten_steps(capfd):
    shown = r"loss \d\.\d{3}, acc \d+\.\d%, \d+ images/s"
    for batch_size, steps in ((8, 10), (9, 9)):
        config = TrainConfig(epochs=1, batch_size=batch_size)
        train(tiny_model(), tiny_data(), config)
        err = capfd.readouterr().err
        assert f"{steps}/{steps}" in err
        assert bool(re.search(shown, err)) is (steps == 10)


BAD = [
    ({"epochs": 0}, "epochs must be at least 1, got 0"),
    ({"batch_size": -3}, "batch_size must be at least 1, got -3"),
    ({"save_every": 0}, "save_every must be at least 1, got 0"),
    ({"lr": -0.5}, "lr must not be negative, got -0.5"),
    ({"weight_decay": -1e-9}, "weight_decay must not be negative, got -1e-09"),
    ({"clip": -1.0}, "clip must not be negative, got -1.0"),
    ({"crop": -1}, "crop must not be negative, got -1"),
    ({"randaugment": -2}, "randaugment must not be negative, got -2"),
    ({"mixup": -0.1}, "mixup must not be negative, got -0.1"),
    ({"cutmix": -0.2}, "cutmix must not be negative, got -0.2"),
    ({"norm_batches": -1}, "norm_batches must not be negative, got -1"),
    ({"balance": "weights"}, "balance must be 'none', 'loss' or 'sampling', got 'weights'"),
    ({"warmup": 1.0}, r"warmup must be in \[0, 1\), got 1.0"),
    ({"warmup": -0.1}, r"warmup must be in \[0, 1\), got -0.1"),
    ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\), got 1.5"),
    ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
    ({"ema": float("nan")}, r"ema must be in \[0, 1\), got nan"),
    ({"schedule": "linear"}, "schedule must be 'cosine' or 'onecycle', got 'linear'"),
    ({"flip": 1.5}, "flip must be .*1.5"),
    ({"flip": -0.5}, "flip must be .*-0.5"),
    ({"resized_crop": 1.5}, r"resized_crop must be in \[0, 1\], got 1.5"),
    ({"erase": -0.1}, r"erase must be in \[0, 1\], got -0.1"),
    ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
    ({"freeze": -1}, "freeze must not be negative, got -1"),
    ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], got 0.0"),
    ({"layer_decay": 1.1}, r"layer_decay must be in \(0, 1\], got 1.1"),
    ({"amp_dtype": "fp16"}, "amp_dtype must be 'bfloat16' or 'float16', got 'fp16'"),
    ({"log_with": "paper"}, "log_with must be 'none', .* or .*, got 'paper'"),
    ({"workers": -1}, "workers must .*-1"),
    ({"lr": float("nan")}, "lr must .*nan"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=lambda v: str(v))
def test_a_bad_value_is_named_with_its_number(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize(
    "values",
    [{"epochs": 1}, {"clip": 0.0}, {"warmup": 0.0}, {"ema": 0.0}, {"flip": 1.0}, {"lr": 0.0}],
)
def test_values_at_the_border_are_fine(values):
    config = TrainConfig(**values)
    assert all(getattr(config, k) == v for k, v in values.items())
