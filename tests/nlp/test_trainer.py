"""`StarifyCallback` in real Trainers: gates are trained, saved, and too late is said."""

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from starlayers import from_pretrained, starify
from starlayers.nlp import StarifyCallback
from starlayers.surgery import GatedMLP, gate_parameters, gate_sizes, report
from tests.surgery.small import IDS, bert, gpt2, llama
from tests.surgery.test_forwards import patched


def trainer(model, folder, callback=None, options=None, kind=Trainer, **kwargs):
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(96).reshape(8, 12)]
    settings = {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "learning_rate": 1e-2}
    settings |= {"per_device_train_batch_size": 4, "disable_tqdm": True, "report_to": "none"}
    arguments = TrainingArguments(str(folder), use_cpu=True, **(settings | (options or {})))
    kwargs |= {"callbacks": [callback]} if callback is not None else {}
    return kind(model, arguments, train_dataset=rows, **kwargs)


def losses(run):
    return [row["loss"] for row in run.state.log_history if "loss" in row]


@pytest.mark.parametrize("options", [{}, {"torch_compile": True, "torch_compile_backend": "eager"}])
def test_gates_are_trained_saved_and_resumed(tmp_path, options):
    by_hand = starify(gpt2())
    want = trainer(by_hand, tmp_path / "hand", options=options)
    want.train()
    model = gpt2()
    run = trainer(model, tmp_path / "a", StarifyCallback(gate="full"), options)
    assert len(report(model).replaced) == 2
    assert gate_sizes(model) == dict.fromkeys(gate_sizes(model), 0.0)
    run.train()
    assert losses(run) == pytest.approx(losses(want), rel=1e-6)
    assert min(gate_sizes(model).values()) > 0
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in gate_parameters(model)} <= held
    for (name, a), (_, b) in zip(model.named_parameters(), by_hand.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)

    resumed = gpt2()
    again = trainer(resumed, tmp_path / "b", StarifyCallback(), options)
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-1"))
    for (name, a), (_, b) in zip(model.named_parameters(), resumed.named_parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    loaded = from_pretrained(type(model), tmp_path / "a/checkpoint-2").eval()
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


def test_fusing_trains_as_the_plain_model_does(tmp_path):
    plain = trainer(llama(), tmp_path / "plain")
    plain.train()
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    callback = StarifyCallback(mode="fuse", recompute=True)
    fused = trainer(model, tmp_path / "fused", callback, optimizers=(optimizer, None))
    before = fused.evaluate(fused.train_dataset)["eval_loss"]
    fused.train()
    assert [m.star.recompute for m in model.modules() if isinstance(m, GatedMLP)] == [True, True]
    assert losses(fused) == pytest.approx(losses(plain), rel=1e-5)
    assert before == pytest.approx(losses(plain)[0], rel=0.05)
    again = type(model).from_pretrained(tmp_path / "fused/checkpoint-2").eval()  # a plain Llama
    torch.testing.assert_close(again(IDS).logits, model.eval()(IDS).logits)


def test_gates_with_an_optimizer_that_exists_are_refused(tmp_path):
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="given an optimizer, which does not have the gates"):
        trainer(model, tmp_path, StarifyCallback(), optimizers=(optimizer, None))
    assert not report(model).replaced


@pytest.mark.parametrize("mode", ["star", "fuse"])
def test_too_late_is_refused(tmp_path, mode):
    build = gpt2 if mode == "star" else llama
    run = trainer(build(), tmp_path)
    run.add_callback(StarifyCallback(mode=mode))
    with pytest.raises(RuntimeError, match=r"added to a Trainer that exists.*callbacks=\["):
        run.train()
    run = trainer(None, tmp_path, StarifyCallback(mode=mode), model_init=build)
    with pytest.raises(RuntimeError, match=r"had 2 star layers .* and has 0 now.*model_init"):
        run.train()


def test_model_init_may_starify(tmp_path):
    run = trainer(None, tmp_path, model_init=lambda: starify(gpt2()))
    run.train()
    assert min(gate_sizes(run.model).values()) > 0


class Own(Trainer):
    """Trainer whose optimizer has what the model had by other names."""

    def create_optimizer(self, model=None):
        chosen = [p for n, p in self.model.named_parameters() if ".gate." not in n]
        self.optimizer = torch.optim.SGD(chosen, lr=0.1)
        return self.optimizer


def test_gates_that_the_optimizer_lacks_are_counted(tmp_path):
    model = gpt2()
    run = trainer(model, tmp_path, StarifyCallback(), kind=Own)
    with pytest.raises(ValueError, match=r"4 of 4 parameters of gates are not in the optimizer"):
        run.train()
    for gate in gate_parameters(model):
        gate.requires_grad_(False)
    run.train()
    assert set(gate_sizes(model).values()) == {0.0}


def test_errors_of_starify_come_when_the_trainer_is_made(tmp_path):
    with pytest.raises(ValueError, match="mode='star' gives them gates"):
        trainer(bert(), tmp_path, StarifyCallback(mode="fuse"))
    with pytest.raises(ValueError, match="unknown gate 'half'"):
        trainer(bert(), tmp_path, StarifyCallback(gate="half"))
    with pytest.raises(TypeError, match="gates"):
        trainer(bert(), tmp_path, StarifyCallback(gates="full"))


def test_adapters_are_trained_beside_the_gates(tmp_path):
    model = get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"], r=2))
    with pytest.warns(UserWarning, match="saves its adapters only"):
        run = trainer(model, tmp_path, StarifyCallback(gate="scale"), {"save_strategy": "no"})
    run.train()
    assert min(gate_sizes(model).values()) > 0
    assert model.base_model.model.transformer.h[0].attn.c_attn.lora_B["default"].weight.any()


def test_liger_on_star_layers_is_refused_when_training_begins(tmp_path):
    """Where Liger comes in `train()`: after the constructor, before the first step."""

    class Patched(Trainer):
        def train(self, *args, **kwargs):
            patched(self.model)
            return super().train(*args, **kwargs)

    for options in ({"mode": "fuse"}, {"grow": 1}):
        run = trainer(llama(), tmp_path, StarifyCallback(**options), kind=Patched)
        with pytest.raises(ValueError, match=r"LigerSwiGLUMLP.*liger_kernel_config=\{'swiglu': F"):
            run.train()


def _rank(rank, port, folder):
    """Train on one of two processes, whose random gates differ before DDP makes them equal."""
    from torch.distributed.fsdp import fully_shard

    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(n) for name, n in places.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    model = gpt2()
    options = {"ddp_backend": "gloo", "save_strategy": "no"}
    run = trainer(model, folder, StarifyCallback(gate="low_rank=2"), options)
    with torch.no_grad():
        gate_parameters(model)[0].add_(rank)
    run.train()
    assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
    assert min(gate_sizes(model).values()) > 0
    gates = torch.cat([p.detach().flatten() for p in gate_parameters(model)])
    both = [torch.empty_like(gates) for _ in range(2)]
    torch.distributed.all_gather(both, gates)
    assert torch.equal(*both)

    # the Trainer has no FSDP on a CPU: its steps by hand, up to the callback's last check
    callback, sharded = StarifyCallback(grow=1), llama()
    callback.on_init_end(None, None, None, model=sharded)
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    callback.on_train_begin(None, None, None, model=sharded, optimizer=optimizer)
    sharded(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(p.full_tensor().any() for p in gate_parameters(sharded))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gates_are_synchronised_and_sharded(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)


@pytest.mark.slow
def test_the_trainers_own_switch_for_liger():
    """In a process of its own: Liger changes transformers' module for all models to come."""
    program = """
import tempfile
from pathlib import Path
from starlayers.nlp import StarifyCallback
from tests.nlp.test_trainer import losses, trainer
from tests.surgery.small import llama
first = Path(tempfile.mkdtemp())
plain = trainer(llama(), first / "plain")
plain.train()
none = dict.fromkeys(("swiglu", "rope", "rms_norm", "fused_linear_cross_entropy"), False)
options = {"use_liger_kernel": True, "liger_kernel_config": none}
both = trainer(llama(), first / "a", StarifyCallback(mode="fuse"), options)
late = trainer(llama(), first / "b", StarifyCallback(mode="fuse"), {"use_liger_kernel": True})
both.train()
assert losses(both) == losses(plain) or max(
    abs(a - b) for a, b in zip(losses(both), losses(plain))) < 1e-4
try:
    late.train()
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "replaced by LigerSwiGLUMLP.forward of liger_kernel" in done.stdout
