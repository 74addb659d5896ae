"""Spectra of products, and the factors that scale them."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from starlayers import StarBlock, StarMLP, StarOp
from starlayers.coefficients import Spectrum, SpectrumLogger, norms, plot_spectrum, spectrum
from starlayers.coefficients.modules import RankStarOp, ScaledStarOp, SumOp
from starlayers.coefficients.scaling import ProductScaler, star_layers
from tests.coefficients.layers import (
    CLOSE,
    DOUBLE,
    OPTIONS,
    dense_forms,
    star_mlp,
    star_of,
    star_op,
)
from tests.helpers import FORMULAS, branch_parameters, properties, randn

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 4))
ACTS = st.sampled_from([None, "relu6"])


@properties
@given(options=OPTIONS, size=SIZES, seed=st.integers(0, 99), act=ACTS)
def test_numbers_are_those_of_the_matrices(options, size, seed, act):
    op = star_op(*size, seed=seed, act=act, **options)
    found, q = spectrum(op)[""], dense_forms(op).detach()
    total = q.square().sum((1, 2))
    inner = q[:, :-1, :-1]
    squares = inner.diagonal(dim1=1, dim2=2).square().sum(1)
    p = q.square() / total[:, None, None]
    entries = (size[0] + 1) ** 2
    expected = {
        "norm": total.sqrt(),
        "absolute": q.abs().sum((1, 2)),
        "participation": total.square() / q.pow(4).sum((1, 2)) / entries,
        "square": squares / total,
        "cross": (inner.square().sum((1, 2)) - squares) / total,
        "linear": 2 * q[:, :-1, -1].square().sum(1) / total,
        "constant": q[:, -1, -1].square() / total,
        "entropy": -torch.where(p > 0, p * p.log(), 0).sum((1, 2)) / math.log(entries),
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(found, name), values, **CLOSE, msg=name)
    hoyer = (entries**0.5 - expected["absolute"] / expected["norm"]) / (entries**0.5 - 1)
    torch.testing.assert_close(found.sparsity, hoyer, **CLOSE)


@properties
@given(options=OPTIONS, size=SIZES, seed=st.integers(0, 99))
def test_eigenvalues_are_those_of_the_matrices(options, size, seed):
    op = star_op(*size, seed=seed, **options)
    found = spectrum(op)[""].eigenvalues
    assert found.shape == (op.out_features, min(2 * options.get("rank", 1), op.in_features + 1))
    assert torch.equal(found, found.sort(1).values)
    padded = nn.functional.pad(found, (0, op.in_features + 1 - found.shape[1])).sort(1).values
    torch.testing.assert_close(padded, torch.linalg.eigvalsh(dense_forms(op)).detach(), **CLOSE)


@pytest.mark.parametrize("rank", [1, 2])
def test_eigenvalues_of_branches_of_very_different_size(rank):
    # through the Gram matrix of the branches the square root of its rounding would be left
    op = star_op(6, 3, rank=rank, bias=False)
    with torch.no_grad():
        star_of(op).f1.weight.mul_(1e-9)
    dense = torch.linalg.eigvalsh(dense_forms(op)).detach()
    found = spectrum(op)[""].eigenvalues
    torch.testing.assert_close(found[:, 0], dense[:, 0], rtol=1e-10, atol=0)
    torch.testing.assert_close(found[:, -1], dense[:, -1], rtol=1e-10, atol=0)


def test_extremes():
    op = star_op(3, 4, bias=False)
    with torch.no_grad():
        for f in (op.f1, op.f2):
            f.weight.zero_()
        op.f1.weight[0] = op.f2.weight[0] = torch.tensor([0, 2.0, 0])  # x1^2
        op.f1.weight[1, 0] = op.f2.weight[1, 1] = 1.0  # x0 x1
        op.f1.weight[2] = op.f2.weight[2] = 1.0  # all products alike
    found = spectrum(op)[""]
    torch.testing.assert_close(found.square, torch.tensor([1, 0, 1 / 3, 0], dtype=DOUBLE))
    torch.testing.assert_close(found.cross, torch.tensor([0, 1, 2 / 3, 0], dtype=DOUBLE))
    torch.testing.assert_close(found.sparsity[[0, 3]], torch.ones(2, dtype=DOUBLE))
    torch.testing.assert_close(found.participation, torch.tensor([1, 2, 9, 0], dtype=DOUBLE) / 16)
    torch.testing.assert_close(found.eigenvalues[0], torch.tensor([0, 4.0], dtype=DOUBLE))
    torch.testing.assert_close(found.eigenvalues[1], torch.tensor([-0.5, 0.5], dtype=DOUBLE))
    assert found.eigenvalues[3].tolist() == [0, 0]  # a channel that computes nothing
    assert all(math.isfinite(v) for v in found.summary().values())


@pytest.mark.parametrize("rank", [1, 2])
def test_chunks_make_no_difference(rank, monkeypatch):
    op = star_mlp(5, 7, rank=rank)
    whole = spectrum(op)[""]
    monkeypatch.setattr(norms, "CHUNK_BYTES", 1)
    parts = spectrum(op)[""]
    for name in ("absolute", "participation", "entropy", "norm"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), **CLOSE)


SUMMARY = [
    *("norm", "positive", "negative", "sparsity", "participation"),
    *("square", "cross", "linear", "constant", "norm_variation"),
]


def test_small_weights_do_not_vanish():
    op = StarOp(8, 4, act=None)
    before = spectrum(op)[""].summary()
    with torch.no_grad():
        for p in op.parameters():
            p.mul_(1e-12)
    after = spectrum(op)[""].summary()
    for name in ("participation", "square", "cross", "linear", "constant", "sparsity", "entropy"):
        assert after[name] == pytest.approx(before[name], rel=1e-4), name


def test_layers_by_name_and_their_summaries():
    model = nn.Sequential(StarBlock(6), SumOp(6, 4), RankStarOp(6, 4, act=None, rank=2))
    found = spectrum(model)
    assert list(found) == ["0.mlp", "2"]
    assert found["0.mlp"].norm.shape == (24,)
    summary = found["2"].summary()
    assert summary["norm"] == pytest.approx(float(found["2"].norm.mean()))
    assert summary["positive"] == pytest.approx(float(found["2"].eigenvalues[:, -1].mean()))
    deviation = found["2"].norm.std(correction=0) / found["2"].norm.mean()
    assert summary["norm_variation"] == pytest.approx(float(deviation))
    assert summary["square"] + summary["cross"] + summary["linear"] + summary[
        "constant"
    ] == pytest.approx(1)
    quick = spectrum(model, entropy=False)["2"]
    assert quick.entropy is None
    assert set(summary) - set(quick.summary()) == {"entropy"}
    assert not found["2"].norm.requires_grad


def test_models_without_products():
    for model in (nn.Linear(3, 3), SumOp(3, 3)):
        for call in (spectrum, SpectrumLogger, plot_spectrum):
            with pytest.raises(ValueError, match="has no star layers"):
                call(model)


def test_a_matrix_too_large_is_needed_for_the_entropy_alone():
    op = StarOp(17_000, 1, act=None)
    with pytest.raises(ValueError, match=r"17001 x 17001 takes 1\.1 GiB.*entropy=False"):
        spectrum(op)
    assert 0.3 < float(spectrum(op, entropy=False)[""].participation) < 0.8


def test_a_figure_shows_every_layer():
    matplotlib = pytest.importorskip("matplotlib")
    model = nn.Sequential(StarBlock(6), RankStarOp(6, 4, act=None, rank=2))
    for source in (model, spectrum(model, entropy=False)):
        figure = plot_spectrum(source)
        assert isinstance(figure, matplotlib.figure.Figure)
        eigen, norms, kinds, spread = figure.axes
        assert [t.get_text() for t in eigen.get_xticklabels()] == ["0.mlp", "1"]
        assert [t.get_text() for t in norms.get_legend().get_texts()] == ["0.mlp", "1"]
        shares = sum(p.get_height() for p in kinds.patches if p.get_x() < 0.5)
        assert shares == pytest.approx(1)
        names = [t.get_text() for t in spread.get_legend().get_texts()]
        assert ("entropy" in names) == (source is model)
    with pytest.raises(ValueError, match="no layers"):
        plot_spectrum({})


class Writer:
    def __init__(self):
        self.rows = []

    def add_scalar(self, tag, value, step):
        self.rows.append((tag, value, step))


def test_a_logger_measures_in_steps_and_writes():
    model, writer = nn.Sequential(StarOp(4, 3), StarOp(3, 2)), Writer()
    log = SpectrumLogger(model, writer, every=10, entropy=True)
    seen = [step for step in range(4, 45, 4) if log.step(step)]  # steps may come in strides
    assert seen == [4, 12, 20, 32, 40]
    assert [step for step, _ in log.history] == seen
    assert {step for _, _, step in writer.rows} == set(seen)
    first = {tag: v for tag, v, step in writer.rows if step == 4}
    assert first == log.history[0][1]
    found = {name: s.summary() for name, s in spectrum(model).items()}
    assert first["coefficients/0/norm"] == found["0"]["norm"]
    mean = (found["0"]["entropy"] + found["1"]["entropy"]) / 2
    assert first["coefficients/mean/entropy"] == pytest.approx(mean)
    with torch.no_grad():
        model[0].f1.weight.zero_()
    assert log.step(50)["coefficients/0/norm"] < first["coefficients/0/norm"]
    assert "coefficients/StarOp/norm" in SpectrumLogger(StarOp(3, 2)).step(0)


def test_defaults_of_a_logger():
    log = SpectrumLogger(nn.Sequential(StarOp(4, 3)))
    assert (log.every, log.writer, log.history) == (100, None, [])
    seen = [step for step in range(250) if log.step(step)]
    assert seen == [0, 100, 200]
    assert set(log.history[0][1]) == {f"coefficients/0/{n}" for n in SUMMARY}  # no entropy, no mean
    assert log.measure() == log.history[-1][1]


def test_a_logger_wants_a_whole_number():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        SpectrumLogger(StarOp(3, 2), every=0)


def test_tensorboard_gets_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = SpectrumLogger(StarOp(3, 2), tmp_path, every=5)
    for step in range(12):
        log.step(step)
    log.writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    rows = events.Scalars("coefficients/StarOp/norm")
    assert [r.step for r in rows] == [0, 5, 10]
    assert rows[0].value == pytest.approx(log.history[0][1]["coefficients/StarOp/norm"])


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.star = StarMLP(3, 4, out_features=1)

    def forward(self, x, labels=None):
        y = self.star(x)
        return {"loss": (y[:, 0] - labels).square().mean(), "logits": y}


@pytest.mark.parametrize("with_trainer", [False, True])
def test_the_callback_of_a_trainer(with_trainer, monkeypatch):
    """Its steps on the main process are measured, and logged by the trainer if there is one."""
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(TrainerCallback=object))
    logged = []
    log = SpectrumLogger(StarOp(3, 2), every=2)
    callback = log.as_trainer_callback(SimpleNamespace(log=logged.append) if with_trainer else None)
    for step in range(1, 6):
        for main in (False, True):
            state = SimpleNamespace(is_world_process_zero=main, global_step=step)
            assert callback.on_step_end(None, state, None) is None
    assert [step for step, _ in log.history] == [1, 2, 4]
    assert logged == [s for _, s in log.history] * with_trainer


@pytest.mark.slow
def test_the_trainer_logs_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    data = [{"x": randn(3, seed=i), "labels": torch.tensor(1.0)} for i in range(24)]
    model = Regression()
    options = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=6, report_to=[], use_cpu=True,
        logging_strategy="no", save_steps=6, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, options, train_dataset=data)
    log = SpectrumLogger(model, every=2)
    trainer.add_callback(log.as_trainer_callback(trainer))
    trainer.train()
    assert [step for step, _ in log.history] == [1, 2, 4, 6]
    tag = "coefficients/star/norm"
    logged = [row for row in trainer.state.log_history if tag in row]
    assert [row["step"] for row in logged] == [1, 2, 4, 6]
    assert [row[tag] for row in logged] == [s[tag] for _, s in log.history]
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert any(tag in row for row in state["log_history"])


def test_stable_baselines_log_them(tmp_path):
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.logger import configure

    model = sb3.PPO(
        "MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, n_epochs=1, seed=0, device="cpu"
    )
    model.policy.mlp_extractor.policy_net = nn.Sequential(StarOp(4, 64, act="tanh"))
    model.set_logger(configure(str(tmp_path), ["csv"]))
    log = SpectrumLogger(model.policy, every=20)
    model.learn(64, callback=log.as_sb3_callback(), log_interval=1)
    assert [step for step, _ in log.history] == [1, 20, 40, 60]
    header, *rows = (tmp_path / "progress.csv").read_text().splitlines()
    column = header.split(",").index("coefficients/mlp_extractor.policy_net.0/norm")
    last = float(rows[-1].split(",")[column])
    assert last == pytest.approx(
        log.history[-1][1]["coefficients/mlp_extractor.policy_net.0/norm"], rel=1e-4
    )


@pytest.mark.parametrize(
    ("package", "call", "extra"),
    [
        ("matplotlib.figure", lambda: plot_spectrum(StarOp(3, 2)), "plots"),
        ("torch.utils.tensorboard", lambda: SpectrumLogger(StarOp(3, 2), "x"), "plots"),
        ("transformers", lambda: SpectrumLogger(StarOp(3, 2)).as_trainer_callback(), "nlp"),
        (
            "stable_baselines3.common.callbacks",
            lambda: SpectrumLogger(StarOp(3, 2)).as_sb3_callback(),
            "rl",
        ),
    ],
)
def test_what_is_missing_is_named(package, call, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'starlayers\[{extra}\]'"):
        call()


def test_a_spectrum_is_what_it_was_made_of():
    one = torch.ones(2)
    s = Spectrum(3, one[:, None], one, 4 * one, one, one, 0 * one, 0 * one, 0 * one)
    assert s.sparsity.tolist() == [0, 0]
    assert s.summary()["positive"] == 1


# --- factors of products, written into layers and taken back


X = randn(5, 4, dtype=torch.float64)


def star(**options):
    return RankStarOp(4, 3, rank=2, act="tanh", **options).double()


def products(op):
    """Each product on its own, (inputs, channels * rank)."""
    (w1, b1), (w2, b2) = branch_parameters(op.star)
    return FORMULAS["tanh"](X @ w1.T + b1) * (op.offset + X @ w2.T + b2)


@pytest.mark.parametrize("offset", [0.0, 0.7])
@pytest.mark.parametrize("packed", [False, True])
def test_a_factor_scales_its_product_and_is_of_the_start(offset, packed):
    op = star(offset=offset, packed=packed)
    parts, before = products(op).detach(), op(X)
    scaler = ProductScaler("test", "", op)
    assert scaler.products == 6
    for seed in range(2):  # the second factors replace the first
        s = randn(6, seed=seed, dtype=torch.float64)
        scaler.write(s)
        assert torch.allclose(op(X), (parts * s).unflatten(-1, (3, 2)).sum(-1))
    scaler.restore()
    assert torch.equal(op(X), before)


def test_layers_without_bias_and_with_a_scale():
    op = star(bias=False)
    before = op(X)
    ProductScaler("test", "", op).write(torch.full((6,), 3.0))
    assert torch.allclose(op(X), 3 * before)
    op = ScaledStarOp(4, 6, act="tanh", offset=1.0).double()
    before, f2 = op(X), op.f2.weight.clone()
    ProductScaler("test", "", op).write(torch.full((6,), 3.0))
    assert torch.allclose(op(X), 3 * before)
    assert torch.equal(op.f2.weight, f2)
    assert torch.equal(op.scale, torch.full_like(op.scale, 3))


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [6]), (2, [3, 3]), (4, [2, 2, 1, 1]), (9, [1] * 6)]
)
def test_groups(count, sizes):
    op = star()
    norms = op.star.f1.weight.norm(dim=1) * op.star.f2.weight.norm(dim=1)
    scaler = ProductScaler("test", "", op)
    groups = scaler.groups(count)
    assert [len(g) for g in groups] == sizes
    order = torch.cat(groups)
    assert torch.equal(norms[order], norms.sort(descending=True).values)
    assert [g.tolist() for g in scaler.groups(None)] == [[i] for i in order.tolist()]


def test_layers_by_name_and_pattern():
    model = nn.Sequential(StarOp(4, 4), nn.Sequential(StarMLP(4, 8)), SumOp(4, 4))
    assert list(star_layers("test", model)) == ["0", "1.0"]
    for patterns, names in (
        ("0", ["0"]),
        ("1", ["1.0"]),
        (["1", "0"], ["0", "1.0"]),
        ("*", ["0", "1.0"]),
    ):
        assert list(star_layers("test", model, patterns)) == names
    with pytest.raises(
        ValueError, match=r"test: layers='2' matches none of the 2 star layers, '0'"
    ):
        star_layers("test", model, ["0", "2"])


def test_a_layer_of_another_class_has_no_factors():
    class Vectors(nn.Module):
        def star_vectors(self):
            return []

    with pytest.raises(ValueError, match=r"test: Vectors has no star layers with factors"):
        star_layers("test", Vectors())
