"""Figures of a run: every number of the history and of the confusion matrix."""

import pytest
import torch
from matplotlib.layout_engine import ConstrainedLayoutEngine

from starlayers.vision.training import plots


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
