"""Products of grown MLPs, and the order of their rows in old files."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from starlayers import from_pretrained, starify
from starlayers.surgery import apply_record, record_of
from starlayers.surgery.adopted import adopt
from starlayers.surgery.gated import GatedMLP, Role
from starlayers.surgery.grown import Grown, grow
from starlayers.surgery.site import Site
from tests.helpers import randn
from tests.surgery.small import IDS, Gated, Net, Packed, llama, train_gates

SITE = Site("gated", "gated", "gate", "act", "down", up="up")
SILU = nn.functional.silu


def test_grown_products():
    grown = Grown(4, 6, 3, bias=True, dtype=torch.float64)
    assert grown.f1.weight.shape == grown.f2.weight.shape == (18, 4)
    assert grown.f1.weight.any()
    assert not grown.f2.weight.any()
    assert not grown.f2.bias.any()
    before = grown.f1.weight.clone()
    nn.init.ones_(grown.f2.weight)
    grown.reset()
    assert not grown.f2.weight.any()
    assert not torch.equal(grown.f1.weight, before)


@pytest.mark.parametrize("rank", [1, 3])
def test_grow_adds_products_of_the_same_kind(rank):
    mlp = adopt(Gated().double().eval(), GatedMLP, Role(SITE, Gated, "silu"))
    grow(mlp, rank)
    assert mlp.star.grown == rank
    assert not mlp.star_grown.training
    assert mlp.star_grown.f1.weight.shape == (16 * rank, 8)
    assert mlp.star_grown.f1.weight.dtype == torch.float64
    assert mlp.star_grown.f1.bias is None  # as its own layers
    x = randn(5, 8, dtype=torch.float64)
    y = mlp(x)
    train_gates(mlp, 1.0)
    products = sum(SILU(f1 @ x.T) * (f2 @ x.T) for f1, f2 in by_product(mlp.star_grown)).T
    expected = mlp.down(SILU(mlp.gate(x)) * mlp.up(x) + products)
    torch.testing.assert_close(mlp(x), expected)
    assert not torch.allclose(mlp(x), y)


def by_product(grown):
    """Return the two matrices of each product."""
    return [(grown.f1.weight[j :: grown.rank], grown.f2.weight[j :: grown.rank])
            for j in range(grown.rank)]  # fmt: skip


def test_grow_has_a_bias_where_the_first_layer_has_one():
    mlp = starify(Packed(), grow=1)
    assert mlp.star_grown.f1.bias is not None
    assert mlp.star_grown.f1.weight.shape == (16, 8)


def test_a_slice_of_rows_holds_whole_products(x):
    whole = train_gates(starify(Gated(), grow=3)).star_grown
    part = copy.deepcopy(whole)
    for f in (part.f1, part.f2):
        f.weight = nn.Parameter(f.weight[: 3 * 5])
    expected = whole(x, torch.mul)[:, :5]
    torch.testing.assert_close(part(x, torch.mul), expected)


def test_hooks_on_the_products_run(x):
    mlp = train_gates(starify(Gated(), grow=2))
    seen = []
    mlp.star_grown.register_forward_hook(lambda *call: seen.append(call[-1].shape))
    mlp(x)
    assert seen == [(5, 16)]


# --- files of the time when a row was (product, channel)


def old_state(model):
    """The state dict that an earlier version would have saved for the function of `model`."""
    state = model.state_dict()
    ranks = {n: m.rank for n, m in model.named_modules() if isinstance(m, Grown)}
    for key, rows in state.items():
        for name, rank in ranks.items():
            if key.startswith(f"{name}."):
                state[key] = rows.unflatten(0, (-1, rank)).transpose(0, 1).flatten(0, 1)
    for name in ranks:
        state._metadata[name]["version"] = 1
    return state


def old_record(model):
    return record_of(model) | {"version": 2}


def nets(rank=2):
    model = train_gates(starify(Net(Gated(), Packed(), Gated()), exclude="blocks.2", grow=rank))
    return model, Net(Gated(), Packed(), Gated())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("assign", [False, True])
def test_old_weights_load_after_an_old_record(x, version, rank, assign):
    model, plain = nets(rank)
    state = dict(old_state(model))  # as from safetensors: no versions of modules
    kept = {key: value.clone() for key, value in state.items()}
    loaded = apply_record(plain, record_of(model) | {"version": version})
    loaded.load_state_dict(state, assign=assign)
    assert torch.equal(loaded(x), model(x))
    assert all(torch.equal(state[key], kept[key]) for key in kept)
    # once: what is saved from here on is new
    assert record_of(loaded) == record_of(model)
    loaded.load_state_dict(dict(loaded.state_dict()))
    assert torch.equal(loaded(x), model(x))


def test_old_weights_in_several_files(x):
    model, plain = nets()
    state = dict(old_state(model))
    loaded = apply_record(plain, old_record(model))
    for key in sorted(state, key=lambda key: key[::-1]):
        loaded.load_state_dict({key: state[key]}, strict=False)
    assert torch.equal(loaded(x), model(x))


def test_a_state_dict_tells_its_version_itself(x):
    model, plain = nets()
    file = io.BytesIO()
    torch.save(old_state(model), file)
    file.seek(0)
    starify(plain, exclude="blocks.2", grow=2).load_state_dict(torch.load(file))
    assert torch.equal(plain(x), model(x))
    # new weights beside an old record
    _, other = nets()
    apply_record(other, old_record(model)).load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    other.load_state_dict(dict(model.state_dict()))
    assert torch.equal(other(x), model(x))


def test_old_weights_of_another_size_are_an_error():
    model, plain = nets()
    state = dict(old_state(model))
    state["blocks.0.star_grown.f1.weight"] = torch.zeros(31, 8)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.star_grown\.f1\.weight: copying a param"):
        apply_record(plain, old_record(model)).load_state_dict(state)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("rank", [1, 2])
def test_old_folders_load(tmp_path, version, rank):
    from transformers import AutoModelForCausalLM

    model = train_gates(starify(llama(), grow=rank))
    expected = model(IDS).logits
    model.config.star_mlp = record_of(model) | {"version": version}
    model.save_pretrained(tmp_path, state_dict=dict(old_state(model)))
    loaded = from_pretrained(AutoModelForCausalLM, tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, expected)
    assert loaded.config.star_mlp["version"] == 3
    loaded.save_pretrained(tmp_path / "again")
    again = from_pretrained(AutoModelForCausalLM, tmp_path / "again").eval()
    assert torch.equal(again(IDS).logits, expected)
    half = from_pretrained(AutoModelForCausalLM, tmp_path, dtype=torch.bfloat16)
    names = [name for name, _ in model.named_parameters() if "star_grown" in name]
    assert len(names) == 4
    for name in names:
        whole = model.get_parameter(name).to(torch.bfloat16)
        assert torch.equal(half.get_parameter(name), whole)


def test_quantised_old_weights_are_refused():
    grown = Grown(4, 6, 2, bias=False)
    grown.expect_old_rows()

    class Quantised(nn.Parameter):
        pass

    grown.f1.weight = Quantised(grown.f1.weight.detach())
    with pytest.raises(ValueError, match=r"f1\.weight .* its 12 rows .* a Quantised cannot be"):
        grown.rearrange_old_rows()


@pytest.mark.parametrize("rank", [1, 2])
def test_an_old_pickle_computes_the_same(x, rank):
    model = train_gates(starify(Gated(), grow=rank))
    expected = model(x)
    model.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, rows in old_state(model).items():
            model.get_parameter(name).copy_(rows)
    del model.star_grown.rank, model.star_grown.old_rows
    again = pickle.loads(pickle.dumps(model))
    assert isinstance(again, GatedMLP)
    assert torch.equal(again(x), expected)
    assert torch.equal(copy.deepcopy(again)(x), expected)
