"""Starify on tiny models of other libraries, and what starified models go through there."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from starlayers import from_pretrained
from starlayers.surgery import (
    GatedMLP,
    StarProjection,
    find_mlps,
    gate_names,
    gate_parameters,
    gate_sizes,
    load_adapter,
    param_groups,
    report,
    revert,
    starify,
)
from tests.surgery.architectures import ARCHITECTURES, run
from tests.surgery.small import IDS, bert, gpt2, llama, train_gates

#: one architecture of each kind for the quick tier: split, Conv1D, gated, packed, inline in a
#: layer, 1x1 convolutions, sequences, torch's inference path
QUICK = {
    "bert",
    "gpt2",
    "llama",
    "phi3",
    "bart",
    "timm-convnext-conv",
    "torchvision-convnext",
    "torch-encoder",
}


def architectures(*kinds):
    return pytest.mark.parametrize(
        "arch",
        [
            pytest.param(a, id=a.name, marks=[] if a.name in QUICK else pytest.mark.slow)
            for a in ARCHITECTURES
            if a.kind in kinds
        ],
    )


every = architectures("plain", "gated", "packed")
stars = architectures("gated", "packed")


def both_modes(model, arch):
    """Outputs in eval mode, and in train mode with seeded dropout."""
    inputs = arch.inputs(model)
    evaluated = run(model.eval(), inputs)
    torch.manual_seed(7)
    return evaluated, run(model.train(), inputs)


def growth(arch):
    return 0 if arch.kind == "plain" else 1


@every
@pytest.mark.parametrize("gate", ["full", "low_rank=3", "scale"])
def test_the_function_stays_and_the_gates_learn(arch, gate):
    model = arch.build()
    before = both_modes(model, arch)
    assert starify(model, gate=gate, grow=growth(arch)) is model
    after = both_modes(model, arch)
    assert [float((a - b).abs().max()) for a, b in zip(before, after)] == [0.0, 0.0]
    assert len(report(model).replaced) == arch.layers

    gates = gate_parameters(model)
    optimizer = torch.optim.SGD(param_groups(model, 0.1, weight_decay=0.0))
    old = [p.detach().clone() for p in gates]
    trained = after[1].float()
    (trained * torch.linspace(-1, 1, trained.numel()).reshape(trained.shape)).sum().backward()
    optimizer.step()
    moved = sum(bool((p != q).any()) for p, q in zip(gates, old))
    # of a low-rank gate the up half moves first, of grown products the second factor
    assert moved >= arch.layers
    assert not torch.equal(run(model.eval(), arch.inputs(model)), after[0])


@every
def test_bfloat16_is_exact_too(arch):
    if not arch.bf16:
        pytest.fail(f"{arch.name} does not run in bfloat16: say so in the table of docs/starify.md")
    model = arch.build().to(torch.bfloat16)
    before = both_modes(model, arch)
    starify(model, grow=growth(arch))
    assert {p.dtype for p in gate_parameters(model)} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(before, both_modes(model, arch)))


@every
def test_revert_leaves_no_trace(arch):
    model = arch.build()
    plain = copy.deepcopy(model)
    kinds = {name: type(m) for name, m in plain.named_modules()}
    revert(starify(model, grow=growth(arch)))
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(isinstance(m, (StarProjection, GatedMLP)) for m in model.modules())
    for a, b in zip(both_modes(plain, arch), both_modes(model, arch)):
        assert torch.equal(a, b)


def test_every_quick_architecture_exists():
    assert {a.name for a in ARCHITECTURES} >= QUICK
    assert len(ARCHITECTURES) == 50


@stars
def test_fuse_keeps_names_and_rounding(arch):
    model = arch.build()
    names = list(model.state_dict())
    before = both_modes(model, arch)
    starify(model, mode="fuse", recompute=True)
    assert list(model.state_dict()) == names
    assert gate_parameters(model) == []
    # a CPU has no op for packed layers, and dropout acts between product and last layer in training
    forms = {"gated": "fused", "packed": "eager"}
    rows = report(model.eval()).rows
    assert [row.state for row in rows] == [forms[row.form] for row in rows]
    assert len(rows) == arch.layers
    for a, b in zip(before, both_modes(model, arch)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@every
def test_on_the_meta_device(arch):
    real = arch.build()
    model = copy.deepcopy(real).to("meta")
    assert len([f for f in find_mlps(model) if f.reason is None]) == arch.layers
    starify(model, grow=growth(arch))
    assert {p.device.type for p in gate_parameters(model)} == {"meta"}
    starify(real, grow=growth(arch))
    assert list(model.state_dict()) == list(real.state_dict())


# --- starified models under adapters, compilers, checkpointing, the Trainer and exporters


TABLE = {arch.name: arch for arch in ARCHITECTURES}
LORA = {"target_modules": "all-linear", "r": 4}


def named(name):
    arch = TABLE[name]
    model = arch.build().eval()
    return model, arch.inputs(model), {"grow": 0 if arch.kind == "plain" else 1}


def train_lora(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("gate", ["full", "low_rank=2", "scale"])
def test_lora_around_a_starified_model(tmp_path, gate):
    base = starify(bert(), gate=gate)
    want = base(IDS).logits
    model = get_peft_model(base, LoraConfig(**LORA, modules_to_save=gate_names(base))).eval()
    assert torch.equal(model(IDS).logits, want)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2))
    for _ in range(2):  # of LoRA and of low-rank gates, one half starts at zero
        model(IDS).logits.square().sum().backward()
        optimizer.step()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(("lora_" in n) or ("modules_to_save" in n) for n in trained)
    assert all(size > 0 for size in gate_sizes(model).values())
    y = model(IDS).logits
    model.save_pretrained(tmp_path)
    again = load_adapter(starify(bert(), gate=gate), tmp_path).eval()
    if gate != "low_rank=2":  # whose random half belongs to the base model's own checkpoint
        assert torch.equal(again(IDS).logits, y)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, y, rtol=1e-5, atol=1e-6)
    assert [row.state for row in report(merged).rows] == ["star", "star"]
    merged.save_pretrained(tmp_path / "merged")
    loaded = from_pretrained(type(merged), tmp_path / "merged").eval()
    assert torch.equal(loaded(IDS).logits, merged(IDS).logits)


def test_starify_around_lora():
    model = get_peft_model(bert(), LoraConfig(**LORA)).eval()
    train_lora(model)
    want = model(IDS).logits
    with pytest.warns(UserWarning, match="saves its adapters only"):
        starify(model)
    assert torch.equal(model(IDS).logits, want)
    train_gates(model)
    y = model(IDS).logits
    assert not torch.allclose(y, want)
    with model.disable_adapter():
        assert not torch.allclose(model(IDS).logits, y)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, y, rtol=1e-5, atol=1e-6)
    assert type(merged.bert.encoder.layer[0].intermediate.dense.inp) is torch.nn.Linear


def test_a_layer_named_for_lora_must_be_the_inner_one():
    with pytest.raises(ValueError, match="StarProjection"):
        get_peft_model(starify(bert()), LoraConfig(r=4, target_modules=["intermediate.dense"]))
    model = get_peft_model(
        starify(bert()), LoraConfig(r=4, target_modules=["intermediate.dense.inp"])
    )
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2


def test_lora_works_on_a_fused_llama():
    plain = llama()
    fused = starify(copy.deepcopy(plain), mode="fuse")
    models = [get_peft_model(m, LoraConfig(**LORA)).eval() for m in (plain, fused)]
    for model in models:
        torch.manual_seed(1)
        train_lora(model)
    a, b = (model(IDS).logits for model in models)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    with models[1].disable_adapter():
        assert not torch.allclose(models[1](IDS).logits, b)
    # large enough inputs take the fused kernel, which must not read around the adapter
    with torch.no_grad():
        x = torch.randn(20_000, 32)
        mlps = [m.base_model.model.model.layers[0].mlp for m in models]
        torch.testing.assert_close(mlps[0](x), mlps[1](x), rtol=1e-5, atol=1e-6)
    merged = models[1].merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, b, rtol=1e-5, atol=1e-6)


def test_a_fused_llama_is_the_same_llama():
    plain = llama()
    want, names = plain(IDS).logits, list(plain.state_dict())
    text = plain.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)
    fused = starify(plain, mode="fuse", recompute=True)
    assert list(fused.state_dict()) == names
    torch.testing.assert_close(fused(IDS).logits, want, rtol=1e-6, atol=1e-6)
    again = fused.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(again, text)


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "llama",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("bert", "t5-gated", "bart", "timm-convnext")
        ),
    ],
)
def test_compile_without_graph_breaks_in_the_mlp(name):
    model, inputs, options = named(name)
    starify(model, **options)
    train_gates(model)
    want = run(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("build", [bert, gpt2, llama])
def test_gradient_checkpointing(build, reentrant, fused):
    def gradients(checkpointing):
        model = train_gates(starify(build(), grow=1)).train()
        if fused:
            starify(model, mode="fuse", recompute=True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model(IDS).logits.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    torch.manual_seed(0)
    plain = gradients(False)
    torch.manual_seed(0)
    checkpointed = gradients(True)
    for name, grad in plain.items():
        assert (grad is None) == (checkpointed[name] is None)
        if grad is not None:
            torch.testing.assert_close(checkpointed[name], grad)


def trainer(model, folder, **options):
    data = [{"input_ids": row, "labels": row} for row in torch.arange(96).reshape(8, 12)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_steps=2,
        logging_steps=1,
        **options,
    )
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, gate_lr=2e-2))
    return Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))


def test_the_trainer_trains_saves_and_resumes(tmp_path):
    whole = starify(gpt2())
    trainer(whole, tmp_path / "a", gradient_checkpointing=True).train()
    assert min(gate_sizes(whole).values()) > 0
    resumed = starify(gpt2())
    trainer(resumed, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    loaded = from_pretrained(type(whole), tmp_path / "a/checkpoint-4").eval()
    assert torch.equal(loaded(IDS).logits, whole.eval()(IDS).logits)


@pytest.mark.export
@pytest.mark.parametrize("name", ["bert", "gpt2", "timm-vit", "torchvision-convnext", "phi3"])
def test_export_and_onnx(name, tmp_path):
    import onnxruntime

    model, inputs, options = named(name)
    starify(model, **options)
    train_gates(model)

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return run(self.model, {key: x})

    key = "input_ids" if "input_ids" in inputs else next(iter(inputs))
    x = inputs[key]
    wrapped = Wrapped().eval()
    want = wrapped(x)
    program = torch.export.export(wrapped, (x,))
    torch.testing.assert_close(program.module()(x), want, rtol=1e-5, atol=1e-5)
    torch.onnx.export(wrapped, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-4)


def test_autocast():
    model = starify(bert(), gate="scale")
    with torch.autocast("cpu", torch.bfloat16):
        want = bert()(IDS).logits
        assert torch.equal(model(IDS).logits, want)
        model.train()(IDS).logits.square().mean().backward()
    assert all(p.grad is not None for p in gate_parameters(model))
    for gate in ("full", "low_rank=4"):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(starify(bert(), gate=gate)(IDS).logits, want)


@pytest.mark.parametrize(
    ("algorithm", "environment", "count"),
    [("PPO", "CartPole-v1", 4), ("SAC", "Pendulum-v1", 10), ("TD3", "Pendulum-v1", 12)],
)
def test_stable_baselines3(algorithm, environment, count):
    import stable_baselines3 as sb3

    model = getattr(sb3, algorithm)("MlpPolicy", environment, seed=0)
    observation, _ = model.env.envs[0].reset(seed=1)
    want, _ = model.predict(observation, deterministic=True)
    starify(model.policy)
    got, _ = model.predict(observation, deterministic=True)
    assert (got == want).all()
    assert len(report(model.policy).replaced) == count
    revert(model.policy)
    got, _ = model.predict(observation, deterministic=True)
    assert (got == want).all()
