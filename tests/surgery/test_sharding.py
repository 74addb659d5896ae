"""Starified models divided over two processes: tensor parallelism, FSDP2 and DCP."""

import copy
import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

from starlayers import from_pretrained, starify
from starlayers.surgery import GatedMLP, apply_record, merge, record_of, report, revert
from tests.surgery.small import IDS, SIZES, gpt2, llama, train_gates
from tests.surgery.test_grown import old_state


def decoder(name):
    import transformers

    sizes = {**SIZES, "intermediate_size": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def fused(model):
    return starify(starify(model, include="model.layers.0", grow=2), mode="fuse")


#: name -> model, and how it is starified
MODELS = {
    "grown by 1": (llama, lambda model: starify(model, grow=1)),
    "grown by 2": (llama, lambda model: starify(model, grow=2, recompute=True)),
    "grown, packed": (lambda: decoder("Phi3"), lambda model: starify(model, grow=2)),
    "grown in one layer, fused": (llama, fused),
    "full gate": (lambda: decoder("Arcee"), starify),
    "low-rank gate": (lambda: decoder("Arcee"), lambda model: starify(model, gate="low_rank=3")),
    "scale gate": (lambda: decoder("Starcoder2"), lambda model: starify(model, gate="scale")),
    "gates in one layer": (
        lambda: decoder("Arcee"), lambda model: starify(model, include="model.layers.1")
    ),
}  # fmt: skip


def build(name):
    make, change = MODELS[name]
    return train_gates(change(make()))


def gradients(model):
    """The logits, and the gradients of a loss by the names of the parameters."""
    logits = model(IDS, use_cache=False).logits
    logits.square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values())
    return logits, {n: whole(g) for n, g in grads.items()}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_equal_to(model, expected):
    with torch.no_grad():
        torch.testing.assert_close(whole(model(IDS).logits), expected[0], rtol=1e-5, atol=1e-5)
    logits, grads = gradients(model)
    torch.testing.assert_close(whole(logits), expected[0], rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected[1].keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[1][name], rtol=1e-5, atol=1e-5, msg=name)


def tensor_parallel(name, folder):
    """Load a folder divided by columns and rows, save it, and load it whole again."""
    from transformers import AutoModelForCausalLM, DistributedConfig

    model = build(name)
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    two = {"distributed_config": DistributedConfig(tp_size=2)}
    divided = from_pretrained(AutoModelForCausalLM, folder, **two).eval()
    gates = [p for n, p in divided.named_parameters() if "star_grown" in n or ".gate." in n]
    shares = [p.to_local().shape[0] / p.shape[0] for p in gates if hasattr(p, "to_local")]
    assert set(shares) == {0.5}
    assert_equal_to(divided, gradients(model))
    divided.save_pretrained(f"{folder}-again")
    dist.barrier()
    again = from_pretrained(AutoModelForCausalLM, f"{folder}-again").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def other_ways_to_load(folder):
    """Load by FSDP2, by the older argument, and from what transformers saves in parts."""
    from transformers import AutoModelForCausalLM, DistributedConfig

    model = build("grown by 2")
    expected = gradients(copy.deepcopy(model))
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    columns = {"distributed_config": DistributedConfig(tp_size=2)}
    shards = {"distributed_config": DistributedConfig(fsdp_size=2)}
    for options in (shards, {"tp_plan": "auto"}, columns):
        divided = from_pretrained(AutoModelForCausalLM, folder, **copy.deepcopy(options)).eval()
        assert_equal_to(divided, expected)
    divided.save_pretrained(f"{folder}-parts", distributed_checkpoint=True)
    dist.barrier()
    again = from_pretrained(AutoModelForCausalLM, f"{folder}-parts", **columns).eval()
    assert_equal_to(again, expected)


def old_rows(folder):
    """Divide products that were saved with their rows in the order of version 2."""
    from transformers import AutoModelForCausalLM, DistributedConfig

    model = build("grown by 2")
    expected = gradients(copy.deepcopy(model))
    if dist.get_rank() == 0:
        model.config.star_mlp = record_of(model) | {"version": 2}
        model.save_pretrained(folder, state_dict=dict(old_state(model)))
    dist.barrier()
    two = {"distributed_config": DistributedConfig(tp_size=2)}
    assert_equal_to(from_pretrained(AutoModelForCausalLM, folder, **two).eval(), expected)


def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp2_and_dcp(name, folder):
    """Starify, shard, save in parts, and load into a sharded model and into a whole one."""
    make, _ = MODELS[name]
    model = build(name)
    expected = gradients(copy.deepcopy(model))
    assert_equal_to(sharded(model), expected)
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)
    again = sharded(apply_record(make(), record_of(model)))
    state = get_model_state_dict(again)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(again, state)
    assert_equal_to(again, expected)
    one = apply_record(make(), record_of(model))
    state = one.state_dict()
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    one.load_state_dict(state)
    torch.testing.assert_close(one(IDS).logits, expected[0], rtol=1e-6, atol=1e-6)


def refused_once_divided():
    """New parameters would not be divided, nor their gradients shared."""
    for make, options in ((llama, {"grow": 1}), (lambda: decoder("Arcee"), {})):
        model = sharded(make())
        before = model.state_dict().keys()
        with pytest.raises(ValueError, match="divided by FSDP2 or tensor parallelism: starify bef"):
            starify(model, **options)
        assert model.state_dict().keys() == before
    grown = sharded(build("grown by 1"))
    with pytest.raises(ValueError, match=r"its gate_proj is a DTensor .* merge before quant"):
        merge(grown)


def sharded_mlps(model):
    for layer in model.model.layers:
        fully_shard(layer.mlp)
    return fully_shard(model)


def sharded_layers_of_mlps(model):
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            fully_shard(getattr(layer.mlp, name))
    return fully_shard(model)


def assert_fused_and_back(model, expected, state, detail=""):
    """The star computes what one process does, says so, and leaves by `revert`."""
    (row, other) = report(model).rows
    assert (row.state, other.state) == (state, state), row
    assert detail in row.detail
    assert_equal_to(model, expected)
    assert all(isinstance(layer.mlp, GatedMLP) for layer in model.model.layers)
    revert(model)
    assert not any(isinstance(layer.mlp, GatedMLP) for layer in model.model.layers)
    model.zero_grad()
    assert_equal_to(model, expected)


def fused_and_divided(folder):
    """Fuse before and after FSDP2, after tensor parallelism, and inside of DDP."""
    from transformers import AutoModelForCausalLM, DistributedConfig

    expected = gradients(llama())
    own = "gate_proj is a FSDPLinear, not nn.Linear"
    ways = ((sharded, "fused", "silu"), (sharded_mlps, "fused", "silu"))
    for shard, state, detail in (*ways, (sharded_layers_of_mlps, "eager", own)):
        for options in ({}, {"recompute": True}):
            before = shard(starify(llama(), mode="fuse", **options))
            assert_fused_and_back(before, expected, state, detail)
            after = starify(shard(llama()), mode="fuse", **options)
            assert_fused_and_back(after, expected, state, detail)
    # a class that FSDP2 derived from the star's becomes what it would have derived from the plain
    mlp = revert(sharded_mlps(starify(llama(), mode="fuse"))).model.layers[0].mlp
    assert type(mlp).__name__ == "FSDPLlamaMLP"
    assert isinstance(mlp, FSDPModule)
    if dist.get_rank() == 0:
        llama().save_pretrained(folder)
    dist.barrier()
    divided = "gate_proj is divided over processes, its weight is a DTensor"
    columns = {"distributed_config": DistributedConfig(tp_size=2)}
    shards = {"distributed_config": DistributedConfig(fsdp_size=2)}
    for options, state, detail in (
        (columns, "eager", divided), ({"tp_plan": "auto"}, "eager", divided), (shards, "fused", "")
    ):  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder, **copy.deepcopy(options)).eval()
        assert_fused_and_back(starify(model, mode="fuse"), expected, state, detail)
    for order in ("before", "after"):
        model = llama()
        model = starify(model, mode="fuse") if order == "before" else model
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped = starify(wrapped, mode="fuse") if order == "after" else wrapped
        assert [row.state for row in report(wrapped).rows] == ["fused", "fused"]
        assert_equal_to(wrapped, (expected[0], {f"module.{n}": g for n, g in expected[1].items()}))
        with pytest.raises(ValueError, match="wrap afterwards, or use mode='fuse'"):
            starify(wrapped, grow=1)


def fused_in_parts(folder):
    """Save a fused, sharded model in parts, and load them into a plain one and a sharded one."""
    model = llama()
    expected = gradients(copy.deepcopy(model))
    dcp.save(get_model_state_dict(sharded(starify(model, mode="fuse"))), checkpoint_id=folder)
    torch.manual_seed(1)
    plain, again = (type(llama())(llama().config).eval() for _ in range(2))
    state = plain.state_dict()
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(IDS).logits, expected[0], rtol=1e-6, atol=1e-6)
    again = starify(sharded_mlps(again), mode="fuse")
    state = get_model_state_dict(again)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(again, state)
    assert_equal_to(again, expected)


def in_process(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        for i, name in enumerate(MODELS):
            tensor_parallel(name, f"{folder}/tp{i}")
        for i, name in enumerate(SHARDED):
            fsdp2_and_dcp(name, f"{folder}/dcp{i}")
        other_ways_to_load(f"{folder}/ways")
        old_rows(f"{folder}/old")
        refused_once_divided()
        fused_and_divided(f"{folder}/fused")
        fused_in_parts(f"{folder}/fused-parts")
    finally:
        dist.destroy_process_group()


#: those that are sharded by FSDP2 as well
SHARDED = ("grown by 2", "grown in one layer, fused", "low-rank gate", "scale gate")


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    mp.spawn(in_process, args=(str(tmp_path),), nprocs=2)


# --- the plans, in one process


def rules(model):
    """The rules of a model's plan for what is in its MLPs."""
    start = "model.layers.*.mlp."
    return {n.removeprefix(start): s for n, s in model.tp_plan.items() if n.startswith(start)}


def test_grown_products_are_divided_as_their_layer_is():
    model = llama()
    plain = dict(model.tp_plan)
    own = rules(model)
    starify(model, grow=2)
    f = {f"star_grown.{name}": "colwise" for name in ("f1", "f2")}
    assert rules(model) == own | f
    assert model.model.tp_plan.keys() == {
        name.removeprefix("model.") for name in model.tp_plan if name != "lm_head"
    }
    starify(model, mode="fuse")
    assert rules(model) == own | f
    assert (revert(copy.deepcopy(model))).tp_plan == plain
    assert merge(model).tp_plan == plain
    assert "star_tp_plan" not in vars(model)
    packed = starify(decoder("Phi3"), grow=1)
    assert rules(packed)["star_grown.f1"] == rules(packed)["gate_up_proj"]
    packed = decoder("Phi3")
    packed.tp_plan = packed.tp_plan | {"model.layers.*.mlp.gate_up_proj": "packed_colwise"}
    assert rules(starify(packed, grow=1))["star_grown.f2"] == "colwise"


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ("full", {"gate": "colwise"}),
        ("low_rank=2", {"gate.up": "colwise"}),
        ("scale", {"gate": "local_params", "gate.weight": "colwise"}),
    ],
)
def test_gates_are_divided_as_their_layer_is(gate, expected):
    model = decoder("Arcee")
    plain = dict(model.tp_plan)
    rest = {"down_proj": "rowwise", "up_proj.inp": "colwise"}
    rest |= {f"up_proj.{name}": style for name, style in expected.items()}
    starify(model, gate=gate, include="model.layers.1")
    assert rules(model) == rest | {"up_proj": "colwise"}  # of the other layer
    starify(model, gate=gate)
    assert rules(model) == rest
    assert revert(model).tp_plan == plain


def test_rules_of_the_user_stay():
    model = starify(llama(), grow=1)
    model.tp_plan = model.tp_plan | {"lm_head": "colwise"}
    assert revert(model).tp_plan == llama().tp_plan | {"lm_head": "colwise"}


def test_models_without_a_plan_have_none():
    assert starify(gpt2()).tp_plan == {}
