"""Folders of runs, in which no half-written file is ever read, and figures of runs."""

import json
import sys
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from starlayers.vision import StarNet, load_run
from starlayers.vision.training import plots
from starlayers.vision.training.plots import plot_confusion
from starlayers.vision.training.rundir import RunDir

CONFIG = {"epochs": 3, "lr": 0.1, "shape": (1, 2), "path": None, "name": "a"}
READ = {**CONFIG, "shape": [1, 2]}
HISTORY = [
    {
        "epoch": e,
        "step": 10 * e,
        "train_loss": 1 / e,
        "test_loss": 1.1 / e,
        "train_accuracy": 0.5,
        "test_accuracy": 1 / 3,
    }
    for e in (1, 2, 3)
]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_configuration_comes_back(tmp_path):
    run = RunDir(str(tmp_path / "some" / "run"), CONFIG)
    assert run.path == tmp_path / "some" / "run"
    assert RunDir.read_config(run.path) == READ
    assert names(run.path) == ["config.json"]
    assert RunDir(run.path, CONFIG, resume=True).path == run.path
    assert RunDir(run.path, READ, resume=True).path == run.path
    assert json.loads((run.path / "config.json").read_text()) == READ


def test_an_empty_folder_is_taken(tmp_path):
    RunDir(tmp_path, CONFIG)
    assert RunDir.read_config(tmp_path) == READ


def test_a_folder_with_a_run_is_refused_and_left_alone(tmp_path):
    RunDir(tmp_path, CONFIG)
    with pytest.raises(FileExistsError, match=f"{tmp_path} already has a run"):
        RunDir(tmp_path, {**CONFIG, "lr": 0.2})
    assert RunDir.read_config(tmp_path) == READ


@pytest.mark.parametrize("content", [None, "config.json.partial"])
def test_no_run_to_resume(tmp_path, content):
    folder = tmp_path / "run"
    if content:
        folder.mkdir()
        (folder / content).write_text("{")
    with pytest.raises(FileNotFoundError, match=f"no run to resume in {folder}"):
        RunDir(folder, CONFIG, resume=True)
    with pytest.raises(FileNotFoundError, match=f"no run to resume in {folder}"):
        RunDir.read_config(folder)
    RunDir(folder, CONFIG)  # a killed attempt is no obstacle
    assert RunDir.read_config(folder) == READ


def test_another_recipe_is_refused_with_every_difference(tmp_path):
    RunDir(tmp_path, CONFIG)
    other = {**CONFIG, "lr": 0.25, "shape": (1, 3), "new": True}
    del other["name"]
    with pytest.raises(ValueError, match="has another recipe") as error:
        RunDir(tmp_path, other, resume=True)
    message = str(error.value)
    for difference in (
        "lr was 0.1, now 0.25",
        "name was 'a', now None",
        "new was None, now True",
        "shape was [1, 2], now [1, 3]",
    ):
        assert difference in message
    assert str(tmp_path) in message
    assert "epochs" not in message
    assert RunDir.read_config(tmp_path) == READ


def test_metrics_come_back_up_to_a_step(tmp_path):
    run = RunDir(tmp_path, CONFIG)
    assert run.metrics(100) == []
    run.write_metrics(HISTORY)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    for step, epochs in ((0, 0), (9, 0), (10, 1), (29, 2), (30, 3), (99, 3)):
        assert run.metrics(step) == HISTORY[:epochs]
    run.write_metrics(HISTORY[:1])
    assert run.metrics(99) == HISTORY[:1]
    assert names(tmp_path) == ["config.json", "metrics.jsonl"]


def test_a_file_half_written_is_never_read(tmp_path, monkeypatch):
    run = RunDir(tmp_path, CONFIG)
    run.write_metrics(HISTORY[:2])
    path = type(tmp_path)
    write = path.write_text

    def killed_half_way(self, text):
        write(self, text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(path, "write_text", killed_half_way)
        with pytest.raises(KeyboardInterrupt):
            run.write_metrics(HISTORY)
    assert "metrics.jsonl.partial" in names(tmp_path)
    assert run.metrics(99) == HISTORY[:2]
    run.write_metrics(HISTORY)
    assert run.metrics(99) == HISTORY
    assert "metrics.jsonl.partial" not in names(tmp_path)


@pytest.fixture
def prepared():
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(nn.Linear(2, 2))
    yield accelerator, model
    accelerator.free_memory()


def fill(model, value):
    with torch.no_grad():
        model.weight.fill_(value)


def test_the_newest_whole_state_is_loaded(tmp_path, prepared):
    accelerator, model = prepared
    run = RunDir(tmp_path, CONFIG)
    assert run.load(accelerator) is False
    for step in (9, 100, 20):  # 20 is saved last: older states go, whatever their number
        fill(model, step)
        run.save(accelerator, step)
        assert names(tmp_path / "state") == [f"step_{step:08d}"]
    # what a kill while saving leaves
    partial = tmp_path / "state" / "step_00000030.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    fill(model, -1)
    assert run.load(accelerator) is True
    assert model.weight.unique().tolist() == [20]
    fill(model, 30)
    run.save(accelerator, 30)  # over the remains
    assert names(tmp_path / "state") == ["step_00000030"]
    fill(model, -1)
    assert RunDir(tmp_path, CONFIG, resume=True).load(accelerator) is True
    assert model.weight.unique().tolist() == [30]


def test_of_two_states_the_later_is_loaded(tmp_path, prepared):
    accelerator, model = prepared
    run = RunDir(tmp_path, CONFIG)
    fill(model, 9)
    run.save(accelerator, 9)
    (tmp_path / "state" / "step_00000009").rename(tmp_path / "kept")
    fill(model, 10)
    run.save(accelerator, 10)
    (tmp_path / "kept").rename(tmp_path / "state" / "step_00000009")  # killed before it went
    fill(model, -1)
    run.load(accelerator)
    assert model.weight.unique().tolist() == [10]


def test_saving_a_step_again_replaces_it(tmp_path, prepared):
    accelerator, model = prepared
    run = RunDir(tmp_path, CONFIG)
    for value in (1, 2):
        fill(model, value)
        run.save(accelerator, 7)
    fill(model, -1)
    run.load(accelerator)
    assert model.weight.unique().tolist() == [2]


DATA = SimpleNamespace(classes=tuple("abc"), shape=(1, 4, 6), mean=(0.25,), std=(0.5,))


def holder(**tensors):
    """Return a module whose state dict is `tensors`."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def test_weights_say_what_they_are_of(tmp_path):
    run = RunDir(tmp_path, CONFIG)
    torch.manual_seed(0)
    model = StarNet(8, (1,), num_classes=3, in_chans=1, stem_stride=1, stage_strides=(2,)).eval()
    run.write_weights("best.safetensors", model, DATA)
    with pytest.raises(FileNotFoundError, match=r"has not finished; .*best\.safetensors"):
        load_run(tmp_path)
    net = load_run(tmp_path / "best.safetensors")
    assert (net.classes, net.mean, net.std, net.size) == (("a", "b", "c"), (0.25,), (0.5,), (4, 6))
    images = torch.randint(0, 256, (5, 1, 4, 6), dtype=torch.uint8)
    want = model((images.float() / 255 - 0.25) / 0.5)
    torch.testing.assert_close(net.logits(images), want, rtol=0, atol=0)


def test_finish_writes_equal_weights_and_pictures(tmp_path):
    run = RunDir(tmp_path, CONFIG)
    tensors = {
        "plain": torch.randn(3, 2),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "count": torch.tensor(7),
        "short": torch.randn(4).bfloat16(),
    }
    model = holder(**tensors)
    run.finish(model, DATA, HISTORY, torch.tensor([[8, 0, 2], [0, 0, 0], [1, 2, 3]]))
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for name, want in tensors.items():
        assert saved[name].dtype == want.dtype
        assert torch.equal(saved[name], want)
    assert names(tmp_path) == ["config.json", "confusion.png", "curves.png", "model.safetensors"]
    with Image.open(tmp_path / "curves.png") as curves:
        assert (curves.format, curves.size) == ("PNG", (1080, 420))
        assert colours(curves) > 3  # axes and two lines
    with Image.open(tmp_path / "confusion.png") as confusion:
        assert (confusion.format, confusion.size) == ("PNG", (744, 624))
        assert colours(confusion) > 3


def test_without_matplotlib_the_weights_are_saved_and_a_warning_names_the_extra(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = RunDir(tmp_path, CONFIG)
    message = rf"no figures in {tmp_path}: curves\.png needs matplotlib: .*'starlayers\[plots\]'"
    with pytest.warns(UserWarning, match=message):
        run.finish(holder(w=torch.ones(2)), DATA, HISTORY, torch.eye(3).long())
    assert names(tmp_path) == ["config.json", "model.safetensors"]
    assert load_file(tmp_path / "model.safetensors")["w"].tolist() == [1.0, 1.0]
    with pytest.raises(ImportError, match=r"confusion\.png needs matplotlib: .*\[plots\]"):
        plot_confusion(torch.eye(2).long(), "ab", tmp_path / "confusion.png")
    monkeypatch.undo()
    run.finish(holder(w=torch.ones(2)), DATA, HISTORY, torch.eye(3).long())  # as a resumed run does
    assert names(tmp_path) == ["config.json", "confusion.png", "curves.png", "model.safetensors"]


def colours(picture):
    return len(picture.convert("RGB").getcolors(maxcolors=1 << 24))


def test_finish_without_a_confusion(tmp_path):
    RunDir(tmp_path, CONFIG).finish(holder(w=torch.ones(1)), DATA, HISTORY, None)
    assert names(tmp_path) == ["config.json", "curves.png", "model.safetensors"]


def test_a_fresh_path_is_named_by_the_time(tmp_path):
    before = datetime.now()
    path = RunDir.fresh_path(tmp_path / "runs")
    assert path.parent == tmp_path / "runs"
    named = datetime.strptime(path.name, "%Y%m%d-%H%M%S")
    assert before - timedelta(seconds=1) < named <= datetime.now()
    assert not path.exists()


# --- figures of a run: every number of the history and of the confusion matrix


@pytest.fixture
def drawn(monkeypatch):
    """Draw a figure without writing it, and return it."""

    def draw(function, *args):
        figures = []
        with monkeypatch.context() as patch:
            patch.setattr(
                plots, "_save_figure", lambda figure, file: figures.append((figure, file))
            )
            function(*args, "a file")
        ((figure, file),) = figures
        assert file == "a file"
        return figure

    return draw


def history(epochs):
    keys = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    return [
        {"epoch": e, **{k: e + i / 10 for i, k in enumerate(keys)}} for e in range(1, epochs + 1)
    ]


def test_curves_show_loss_and_accuracy_of_both_parts(drawn):
    figure = drawn(plots.plot_curves, history(3))
    assert isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine)
    left, right = figure.axes
    for axes, metric in ((left, "loss"), (right, "accuracy")):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", metric)
        assert [t.get_text() for t in axes.get_legend().get_texts()] == ["train", "test"]
        for line, part in zip(axes.get_lines(), ("train", "test"), strict=True):
            assert line.get_label() == part
            assert line.get_xdata().tolist() == [1, 2, 3]
            want = [epoch[f"{part}_{metric}"] for epoch in history(3)]
            assert line.get_ydata().tolist() == want


@pytest.mark.parametrize(("epochs", "each"), [(1, True), (20, True), (21, False)])
def test_curves_have_a_tick_per_epoch_up_to_20(drawn, epochs, each):
    ticks = drawn(plots.plot_curves, history(epochs)).axes[0].get_xticks().tolist()
    assert (ticks == list(range(1, epochs + 1))) is each


def test_the_confusion_shows_shares_of_each_true_class(drawn):
    counts = torch.tensor([[8, 0, 2], [0, 0, 0], [1, 2, 1]])
    axes = drawn(plots.plot_confusion, counts, "abc").axes[0]
    want = torch.tensor([[0.8, 0.0, 0.2], [0.0, 0.0, 0.0], [0.25, 0.5, 0.25]])
    (image,) = axes.get_images()
    torch.testing.assert_close(torch.as_tensor(image.get_array().data), want)
    assert image.get_clim() == (0, 1)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["a", "b", "c"]
    texts = {t.get_position(): (t.get_text(), t.get_color()) for t in axes.texts}
    assert texts == {
        (0, 0): (".80", "white"),
        (2, 0): (".20", "black"),
        (0, 2): (".25", "black"),
        (1, 2): (".50", "black"),
        (2, 2): (".25", "black"),
    }


@pytest.mark.parametrize(("classes", "numbers"), [(20, 20), (21, 0)])
def test_more_than_20_classes_are_shown_without_numbers(drawn, classes, numbers):
    confusion = torch.eye(classes, dtype=torch.int64)
    axes = drawn(plots.plot_confusion, confusion, [str(c) for c in range(classes)]).axes[0]
    assert len(axes.texts) == numbers
    assert all(t.get_text() == "1.00" for t in axes.texts)


@pytest.mark.parametrize(
    ("classes", "size"), [(2, (5.8, 4.8)), (21, (13.4, 12.4)), (50, (25, 24)), (60, (25, 24))]
)
def test_the_confusion_grows_with_the_classes_up_to_24_inches(drawn, classes, size):
    names = [str(c) for c in range(classes)]
    figure = drawn(plots.plot_confusion, torch.eye(classes, dtype=torch.int64), names)
    assert figure.get_size_inches().tolist() == pytest.approx(size)


def test_a_figure_is_written_beside_its_name_and_renamed(tmp_path):
    written = []

    class Figure:
        def savefig(self, file, dpi):
            written.append((file.name, dpi))
            file.write_bytes(b"figure")

    plots._save_figure(Figure(), tmp_path / "curves.png")
    assert written == [("curves.partial.png", 120)]
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_bytes() == b"figure"


def test_a_run_of_an_earlier_version_goes_on_with_new_settings(tmp_path):
    RunDir(tmp_path, {"epochs": 3})
    RunDir(tmp_path, {"epochs": 3, "norm_batches": 20, "balance": "none"}, resume=True)
    with pytest.raises(ValueError, match=r"lr was None, now 0\.1"):
        RunDir(tmp_path, {"epochs": 3, "lr": 0.1}, resume=True)
