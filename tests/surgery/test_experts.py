"""Star experts: mixtures of experts under transformers' experts interface."""

import copy
import io
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from starlayers import starify, use_backend
from starlayers.dispatch import Plan
from starlayers.kernels import registration
from starlayers.surgery import (
    GatedMLP,
    StarExperts,
    apply_record,
    from_pretrained,
    record_of,
    report,
    revert,
)
from starlayers.surgery import experts as module
from starlayers.surgery.experts_loop import _width as width
from tests.surgery.moe import (
    FAMILIES,
    IDS,
    IMPLEMENTATIONS,
    MoE,
    build,
    causal,
    decorated,
    experts_of,
)
from tests.surgery.small import MLP, Gated

SERVED = [name for name in FAMILIES if name != "GptOss"]
FIRST = "model.layers.0.mlp.experts"
GATE_REPLACED = "the _apply_gate of its class was replaced"
#: tokens, their experts and their weights
ARGS = torch.ones(6, 16), torch.tensor([[0, 1]] * 3 + [[2, 3]] * 3), torch.ones(6, 2)


def outputs(model, train=False):
    """Logits, and the gradients of all parameters."""
    model.train(train)
    model.zero_grad()
    torch.manual_seed(3)
    logits = model(IDS).logits
    logits.square().mean().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a, b, tolerance=0.0):
    """Logits and gradients agree, relative to the largest entry of each."""
    assert a[1].keys() == b[1].keys()
    for x, y in [(a[0], b[0]), *((a[1][n], b[1][n]) for n in a[1])]:
        assert (x - y).abs().max() <= tolerance * y.abs().max(), tolerance


@pytest.fixture
def mixtral():
    return causal("Mixtral")


QUICK = [("Mixtral", name) for name in IMPLEMENTATIONS] + [(f, "grouped_mm") for f in SERVED[1:]]
SLOW = [(f, name) for f in SERVED for name in IMPLEMENTATIONS if (f, name) not in QUICK]


@pytest.mark.parametrize(
    ("family", "implementation"),
    [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)],
)
def test_families(family, implementation):
    model = causal(family, experts_implementation=implementation)
    plain = copy.deepcopy(model)
    stars = [row for row in report(model).rows if row.form == "experts"]
    assert stars
    assert {row.state for row in stars} == {"is a star"}
    assert starify(model, mode="fuse", include="*.experts") is model
    kinds = {type(m) for m in experts_of(model)}
    assert all(issubclass(k, (StarExperts, type(experts_of(plain)[0]))) for k in kinds)
    for train in (False, True):
        assert_same(outputs(model, train), outputs(plain, train))
        with use_backend("eager"):
            assert_same(outputs(model, train), outputs(plain, train))
    rows = {row.name: row for row in report(model).rows if row.form == "experts"}
    assert {(row.state, row.detail) for row in rows.values()} == {
        ("fused", f"silu, {implementation}")
    }
    assert len(rows) == len(experts_of(model))
    revert(model)
    assert [type(m) for m in experts_of(model)] == [type(m) for m in experts_of(plain)]
    assert all("star" not in vars(m) for m in experts_of(model))
    assert_same(outputs(model), outputs(plain))


def test_bfloat16(mixtral):
    plain = mixtral.bfloat16()
    model = starify(copy.deepcopy(plain), mode="fuse")
    assert_same(outputs(model, True), outputs(plain, True))


def test_dense_and_shared_mlps_are_fused_beside_the_experts():
    model = starify(causal("Glm4Moe"), mode="fuse")
    assert [(row.name, row.state) for row in report(model).rows] == [
        ("model.layers.0.mlp.gate_proj", "fused"),
        ("model.layers.1.mlp.experts", "fused"),
        ("model.layers.1.mlp.shared_experts.gate_proj", "fused"),
    ]
    assert isinstance(model.model.layers[0].mlp, GatedMLP)


# what is left, and why


def test_gpt_oss_is_left_and_told():
    model = causal("GptOss")
    rows = report(model).rows
    assert [row.name for row in rows] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert {row.state for row in rows} == {"skipped"}
    assert all("interleaved" in row.detail for row in rows)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: its branches are interleaved"):
        starify(model, mode="fuse")
    assert not any(isinstance(m, StarExperts) for m in model.modules())


def test_mode_star_leaves_experts_and_says_why(mixtral):
    for grow in (0, 1):
        with pytest.raises(ValueError, match="2 modules of experts already are stars") as error:
            starify(mixtral, grow=grow)
        assert "grow is not offered for experts" in str(error.value)
    model = starify(causal("Glm4Moe"), grow=1)
    states = {row.name: (row.state, row.detail) for row in report(model).rows}
    assert states["model.layers.0.mlp.gate_proj"][0] == "star"
    state, detail = states["model.layers.1.mlp.experts"]
    assert state == "is a star"
    assert detail == "silu, mode='fuse' serves it, grow is not offered for experts"
    starify(model, mode="fuse")
    assert report(model).rows[1].state == "fused"


def test_patterns_reach_experts(mixtral):
    starify(mixtral, mode="fuse", include="*.1.mlp.experts")
    assert [row.state for row in report(mixtral).rows] == ["is a star", "fused"]
    assert [row.name for row in report(mixtral, exclude="*.1.*").rows] == [FIRST]
    with pytest.raises(ValueError, match="matches none of the 2 MLPs found, the first of which is"):
        starify(mixtral, mode="fuse", include="*.expert")
    with pytest.raises(ValueError, match="no module has the structure"):
        starify(causal("Mixtral"), mode="fuse", exclude="*.experts")
    starify(mixtral, mode="fuse", exclude="model.layers.1")
    assert [row.state for row in report(mixtral).rows] == ["fused", "fused"]


def test_twice_and_back(mixtral):
    plain = copy.deepcopy(mixtral)
    starify(mixtral, mode="fuse")
    before = [vars(m)["star"] for m in experts_of(mixtral)]
    starify(mixtral, mode="fuse", recompute=True)
    assert [vars(m)["star"] for m in experts_of(mixtral)] == before
    assert all(m.star.recompute for m in experts_of(mixtral))
    assert_same(outputs(mixtral, True), outputs(plain, True))
    assert list(mixtral.state_dict()) == list(plain.state_dict())
    revert(mixtral)
    with pytest.raises(ValueError, match="no star layer"):
        revert(mixtral)


def test_other_models_stay_plain(mixtral):
    starify(mixtral, mode="fuse")
    assert type(experts_of(causal("Mixtral"))[0]) is MixtralExperts
    other = MixtralForCausalLM(mixtral.config)
    assert type(experts_of(other)[0]) is MixtralExperts
    assert mixtral.config._experts_implementation == "grouped_mm"


def test_something_else_may_change_the_class(mixtral):
    starify(mixtral, mode="fuse")
    first = experts_of(mixtral)[0]
    first.__class__ = type("Wrapped", (type(first),), {})
    with pytest.raises(ValueError, match=r"a StarMixtralExperts is a Wrapped now"):
        revert(mixtral)
    assert all(isinstance(m, StarExperts) for m in experts_of(mixtral))


@pytest.mark.parametrize("first", ["starify", "hooks"])
def test_accelerate_replaces_forwards_on_instances(mixtral, first):
    plain = copy.deepcopy(mixtral)
    steps = [
        lambda: starify(mixtral, mode="fuse"),
        lambda: [add_hook_to_module(m, ModelHook()) for m in experts_of(mixtral)],
    ]
    for step in steps if first == "starify" else reversed(steps):
        step()
    detail = "silu, grouped_mm, by a forward that was replaced on the instance"
    assert {row.detail for row in report(mixtral).rows} == {detail}
    assert_same(outputs(mixtral), outputs(plain))
    revert(mixtral)
    assert_same(outputs(mixtral), outputs(plain))


@pytest.mark.slow
@pytest.mark.parametrize("first", ["starify", "shard"])
def test_fsdp2(mixtral, first, tmp_path):
    plain = copy.deepcopy(mixtral)
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        steps = [
            lambda: starify(mixtral, mode="fuse"),
            lambda: [fully_shard(m, mesh=mesh) for m in [*experts_of(mixtral), mixtral]],
        ]
        for step in steps if first == "starify" else reversed(steps):
            step()
        assert {row.detail for row in report(mixtral).rows} == {"silu, grouped_mm"}
        with torch.no_grad():
            assert torch.equal(mixtral(IDS).logits, plain(IDS).logits)
        revert(mixtral)
        assert type(experts_of(mixtral)[0]).__name__ == "FSDPMixtralExperts"
        with torch.no_grad():
            assert torch.equal(mixtral(IDS).logits, plain(IDS).logits)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["starify", "adapter"])
def test_adapters_on_the_weights_of_experts(mixtral, first):
    config = LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    plain = get_peft_model(copy.deepcopy(mixtral), config)
    if first == "starify":
        starify(mixtral, mode="fuse")
    adapted = get_peft_model(mixtral, config)
    adapted.load_state_dict(plain.state_dict())
    if first == "adapter":
        starify(adapted, mode="fuse")
    assert [row.detail for row in report(adapted).rows] == ["silu, grouped_mm"] * 2
    assert_same(outputs(adapted, True), outputs(plain, True))
    revert(adapted)
    assert_same(outputs(adapted), outputs(plain))


# the gate, as it was verified or not


def test_obstacles(mixtral, monkeypatch):
    (first, second) = experts_of(starify(mixtral, mode="fuse"))
    assert first.star_obstacle() == ""
    handle = first.act_fn.register_forward_hook(lambda *_: None)
    assert first.star_obstacle() == "act_fn has hooks"
    handle.remove()
    assert first.star_obstacle() == ""
    first.act_fn.forward = torch.tanh
    assert first.star_obstacle() == "forward was set on act_fn, over its own"
    del first.act_fn.forward
    act, first.act_fn = first.act_fn, nn.SiLU()
    assert first.star_obstacle() == "act_fn is a SiLU, was a SiLUActivation"
    first.act_fn = act
    first.__dict__["act_fn"] = torch.tanh
    assert first.star_obstacle() == "act_fn was set on it, over its own"
    del first.__dict__["act_fn"]
    first.has_bias = True  # which the gate does not read
    first._apply_gate = torch.tanh
    assert first.star_obstacle() == "_apply_gate was set on it, over its own"
    del first._apply_gate
    assert first.star_obstacle() == ""
    monkeypatch.setattr(type(first.act_fn), "forward", torch.tanh)
    assert first.star_obstacle() == "the forward of act_fn is tanh, was SiLUActivation.forward"
    monkeypatch.undo()
    monkeypatch.setattr(MixtralExperts, "_apply_gate", lambda self, h: h.chunk(2, -1)[0])
    assert first.star_obstacle() == second.star_obstacle() == GATE_REPLACED
    words = f"silu, grouped_mm, the model's own gate runs: {GATE_REPLACED}"
    assert report(mixtral).rows[0].detail == words


def test_options_that_change_afterwards():
    model = starify(causal("Mixtral", hidden_act="gelu_pytorch_tanh"), mode="fuse")
    (first, second) = experts_of(model)
    first.act_fn.act = nn.functional.gelu
    assert first.star_obstacle().startswith("act_fn.act is gelu, was a partial")
    assert second.star_obstacle() == ""
    h = torch.randn(4, 48)
    assert torch.equal(first._apply_gate(h), nn.functional.gelu(h[:, :24]) * h[:, 24:])


def test_options_that_appear_afterwards(mixtral):
    kind = type("Guarded", (MixtralExperts,), {"_apply_gate": guarded})
    for experts in experts_of(mixtral):
        experts.__class__ = kind
    (first, _) = experts_of(starify(mixtral, mode="fuse"))
    assert first.star_obstacle() == ""
    first.limit = 0.1
    assert first.star_obstacle() == "limit is new"
    h = torch.randn(4, 48)
    assert torch.equal(first._apply_gate(h), guarded(first, h))


def guarded(self, h):
    gate, up = h.chunk(2, -1)
    limit = getattr(self, "limit", None)
    return self.act_fn(gate) * (up if limit is None else up.clamp(-limit, limit))


def test_another_loop_afterwards(mixtral, monkeypatch):
    """Our loop replaces that of the class as it was, not another one."""
    reasons = []

    def declined(reason, _):
        reasons.append(reason)
        return Plan("eager", reason)

    (first, _) = experts_of(starify(mixtral, mode="fuse"))
    first.config._experts_implementation_internal = "eager"
    monkeypatch.setattr("starlayers.surgery.experts.plan_early", lambda x: None)
    monkeypatch.setattr("starlayers.surgery.experts.declined", declined)
    assert first._star_loops(ARGS[0])
    monkeypatch.setattr(MixtralExperts, "forward", lambda self, *args: args[0])
    assert torch.equal(first(*ARGS), ARGS[0])
    (reason,) = reasons
    assert reason.endswith(", was MixtralExperts.forward")


@pytest.mark.parametrize("act", [nn.Tanh(), nn.GELU(), torch.sin])
def test_another_activation_afterwards(mixtral, act):
    plain = copy.deepcopy(mixtral)
    starify(mixtral, mode="fuse")
    for model in (mixtral, plain):
        for experts in experts_of(model):
            del experts.act_fn
            experts.act_fn = act
    for implementation in IMPLEMENTATIONS:
        for model in (mixtral, plain):
            model.set_experts_implementation(implementation)
        assert_same(outputs(mixtral), outputs(plain))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hooks_see_what_they_saw(mixtral, implementation):
    starify(mixtral, mode="fuse")
    mixtral.set_experts_implementation(implementation)
    calls = []
    experts_of(mixtral)[0].register_forward_hook(lambda m, args, y: calls.append(y.shape))
    experts_of(mixtral)[0].act_fn.register_forward_hook(lambda m, args, y: calls.append("act"))
    mixtral(IDS)
    assert calls[-1] == (14, 16)
    assert "act" in calls


def test_the_report_tells_the_implementation(mixtral):
    starify(mixtral, mode="fuse")
    mixtral.set_experts_implementation("batched_mm")
    assert report(mixtral).rows[0].detail == "silu, batched_mm"
    mixtral.config._experts_implementation_internal = "sonicmoe"
    assert report(mixtral).rows[0].detail == "silu, sonicmoe, which has its own product"
    mixtral.config._experts_implementation_internal = "eager"
    experts_of(mixtral)[0].star.loop = "the loop of its class computes other bits"
    assert report(mixtral).rows[0].detail == (
        "silu, eager, where the loop of its class computes other bits"
    )


# copies and files


def test_deepcopy(mixtral):
    starify(mixtral, mode="fuse")
    again = copy.deepcopy(mixtral)
    for a, b in zip(experts_of(mixtral), experts_of(again)):
        assert type(a) is type(b)
        assert b.star is not a.star
        assert b.star_obstacle() == ""
        assert b.star.gate.module is b
        assert dict(b.star.gate.parts)["act_fn"] is b.act_fn
    assert_same(outputs(again), outputs(mixtral))
    revert(again)
    assert isinstance(experts_of(mixtral)[0], StarExperts)
    assert type(experts_of(again)[0]) is MixtralExperts


def test_pickle(mixtral, monkeypatch):
    expected = outputs(starify(mixtral, mode="fuse"))
    file = io.BytesIO()
    torch.save(mixtral, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert type(experts_of(again)[0]) is type(experts_of(mixtral)[0])
    assert experts_of(again)[0].star_obstacle() == ""
    assert_same(outputs(again), expected)
    revert(again)

    def another(self, h):
        return torch.tanh(h.chunk(2, -1)[0])

    monkeypatch.setattr(MixtralExperts, "_apply_gate", another)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert experts_of(again)[0].star_obstacle() == GATE_REPLACED


def test_gelu_tanh_survives_copies():
    """Its activation is a `functools.partial`, which has no equality."""
    model = causal("Mixtral", hidden_act="gelu_pytorch_tanh")
    starify(model, mode="fuse")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for m in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert experts_of(m)[0].star.act_name == "gelu_tanh"
        assert experts_of(m)[0].star_obstacle() == ""


def test_save_and_load(mixtral, tmp_path):
    plain = copy.deepcopy(mixtral)
    starify(mixtral, mode="fuse").save_pretrained(tmp_path)
    assert not hasattr(mixtral.config, "star_mlp")  # nothing was added
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(experts_of(again)[0]) is MixtralExperts
    assert_same(outputs(again), outputs(plain))
    with pytest.raises(ValueError, match="holds no starified model"):
        from_pretrained(AutoModelForCausalLM, tmp_path)


def test_a_checkpoint_loaded_afterwards(mixtral):
    starify(mixtral, mode="fuse")
    other = causal("Mixtral", seed=1)
    assert mixtral.load_state_dict(other.state_dict()).missing_keys == []
    assert_same(outputs(mixtral, True), outputs(other, True))


def test_records(mixtral):
    starify(mixtral, mode="fuse", recompute=True, include="*.1.*")
    record = record_of(mixtral)
    entry = {"owner": "model.layers.1.mlp.experts", "act": "silu", "recompute": True}
    assert record == {"version": 3, "layers": [], "experts": [entry]}
    again = apply_record(causal("Mixtral"), record)
    assert record_of(again) == record
    assert record_of(apply_record(again, record)) == record
    with torch.device("meta"):
        assert record_of(apply_record(causal("Mixtral"), record)) == record
    with pytest.raises(
        ValueError, match=r"with silu, but of this MixtralExperts it says: act.* gelu"
    ):
        apply_record(causal("Mixtral", hidden_act="gelu"), record)
    headless = {**record, "experts": [entry | {"owner": "layers.1.mlp.experts"}]}
    assert record_of(apply_record(causal("Mixtral"), headless, prefix="model")) == record
    revert(mixtral)
    assert record_of(mixtral) == {}
    with pytest.raises(ValueError, match="it says: no experts interface"):
        apply_record(nn.ModuleDict({"a": MLP()}), {**record, "experts": [entry | {"owner": "a"}]})


def test_grown_mlps_are_loaded_with_star_experts(tmp_path):
    model = starify(starify(causal("Glm4Moe"), grow=1), mode="fuse").eval()
    model.save_pretrained(tmp_path)
    again = from_pretrained(AutoModelForCausalLM, tmp_path).eval()
    assert record_of(again) == record_of(model)
    assert isinstance(experts_of(again)[0], StarExperts)
    assert experts_of(again)[0].star_obstacle() == ""
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_default_dtypes(mixtral, dtype):
    """transformers builds models under the dtype of their weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        starify(mixtral, mode="fuse")
    finally:
        torch.set_default_dtype(before)
    assert {row.detail for row in report(mixtral).rows} == {"silu, grouped_mm"}
    assert [m.star.loop for m in experts_of(mixtral)] == ["", ""]


def test_meta_models():
    with torch.device("meta"):
        model = causal("Mixtral")
        starify(model, mode="fuse")
    assert all(isinstance(m, StarExperts) for m in experts_of(model))
    model.to_empty(device="cpu").load_state_dict(causal("Mixtral").state_dict())
    assert experts_of(model)[0].star_obstacle() == ""


# training and compilers


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_checkpointing(mixtral, reentrant, recompute):
    plain = copy.deepcopy(mixtral)
    starify(mixtral, mode="fuse", recompute=recompute)
    for model in (mixtral, plain):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(outputs(mixtral, True), outputs(plain, True))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_compile(mixtral, implementation, fresh_compiler):
    starify(mixtral, mode="fuse")
    mixtral.set_experts_implementation(implementation)
    experts = experts_of(mixtral)[0]
    with torch.no_grad():
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*ARGS), experts(*ARGS))


@pytest.mark.export
def test_export(mixtral):
    starify(mixtral, mode="fuse")
    mixtral.set_experts_implementation("batched_mm")
    experts = experts_of(mixtral)[0]
    n = torch.export.Dim("n")
    program = torch.export.export(experts, ARGS, dynamic_shapes=({0: n}, {0: n}, {0: n}))
    torch.testing.assert_close(program.module()(*ARGS), experts(*ARGS))


def test_autocast(mixtral):
    plain = copy.deepcopy(mixtral)
    starify(mixtral, mode="fuse")
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(outputs(mixtral), outputs(plain))


# every class of the interface

CLAMPED = "both branches pass through functions, silu(clamp(x, None, 10.0)) and clamp(x, "
GATED_CLAMP = "both branches pass through functions, add(clamp(x, -7.0, 7.0), 1"
TANHS = "both branches pass through functions, mul(mul(tanh("
REFUSED = {
    "DeepseekV4Experts": CLAMPED,
    "Glm5NextTextExperts": CLAMPED,
    "HYV4Experts": CLAMPED,
    "HYV4VLExperts": CLAMPED,
    "MiniMaxM3VLExperts": GATED_CLAMP,
    "OpenAIPrivacyFilterExperts": GATED_CLAMP,
    "GptOssExperts": "its branches are interleaved",
    "Inkling2Experts": TANHS,
    "Inkling2LoopExperts": TANHS,
    "NemotronHExperts": "its experts are plain",
}


@pytest.mark.slow
@pytest.mark.hf
def test_every_class():
    served, refused = [], []
    for source, kind in decorated():
        moe = MoE(build(source, kind))
        (row,) = report(moe).rows
        if row.state == "skipped":
            refused.append(kind.__name__)
            assert row.detail.startswith(REFUSED[kind.__name__]), (kind, row.detail)
            continue
        served.append(kind.__name__)
        star = starify(copy.deepcopy(moe), mode="fuse")
        assert star.experts.star.loop in ("", "the loop of its class calls the gate")
        for dtype in (torch.float32, torch.bfloat16):
            _check_class(moe.to(dtype), star.to(dtype))
    assert len(served) > 40  # 58 in transformers 5.24
    assert set(refused) <= set(REFUSED)


def _check_class(plain, star):
    x = torch.randn(9, width(plain.experts))
    for implementation in IMPLEMENTATIONS:
        for train in (False, True):
            results = []
            for moe in (plain, star):
                moe.experts.config._experts_implementation = implementation
                y = x.to(plain.experts.down_proj.dtype).requires_grad_()
                out = moe.train(train)(y)
                grads = torch.autograd.grad(out.square().sum(), [y, *moe.parameters()])
                results.append([out, *grads])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), type(
                plain.experts
            )


# the kernel, in Triton's interpreter


@pytest.fixture
def counted(monkeypatch):
    """Count the products that the kernel computes."""
    calls, packed = [], module.star_packed_product
    monkeypatch.setattr(
        module, "star_packed_product", lambda h, act: calls.append(h.shape) or packed(h, act)
    )
    return calls


@pytest.mark.interpret
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_kernel(mixtral, counted, implementation, recompute):
    assert registration.INTERPRET
    mixtral.set_experts_implementation(implementation)
    plain = copy.deepcopy(mixtral)
    starify(mixtral, mode="fuse", recompute=recompute)
    for train in (False, True):
        expected = outputs(plain, train)
        counted.clear()
        with use_backend("triton"):
            actual = outputs(mixtral, train)
        rows = sum(shape[0] for shape in counted)
        assert rows == 2 * 14 * 2 * (1 + recompute)  # layers, tokens, experts a token
        assert_same(actual, expected, 1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "relu", "quick_gelu", "linear"])
def test_the_kernel_of_other_activations(counted, act):
    model = causal("Mixtral", hidden_act=act)
    plain = copy.deepcopy(model)
    starify(model, mode="fuse")
    with use_backend("triton"):
        actual = outputs(model, True)
    assert counted
    assert_same(actual, outputs(plain, True), 2e-6)


@pytest.mark.interpret
def test_the_kernel_in_bfloat16(mixtral, counted):
    experts = experts_of(starify(mixtral, mode="fuse"))[0].bfloat16()
    h = torch.randn(20, 48)
    exact = nn.functional.silu(h[:, :24].bfloat16().float()) * h[:, 24:].bfloat16().float()
    with use_backend("triton"):
        y = experts._apply_gate(h.bfloat16())
    own = (experts.act_fn(h[:, :24].bfloat16()) * h[:, 24:].bfloat16()).float()
    assert counted
    assert (y.float() - exact).abs().max() <= (own - exact).abs().max()


@pytest.mark.interpret
def test_where_no_kernel_may_stand_in(mixtral, counted):
    first, second = experts_of(starify(mixtral, mode="fuse"))
    h = torch.randn(4, 48)
    first.act_fn.register_forward_hook(lambda *_: None)
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="cannot serve these experts: act_fn has hooks"):
            first._apply_gate(h)
        first.config._experts_implementation_internal = "eager"
        with pytest.raises(RuntimeError, match="cannot serve these experts: act_fn has hooks"):
            first(*ARGS)
        with pytest.raises(
            RuntimeError, match=r"not verified for torch\.float32 of shape \(1, 4, 48"
        ):
            second._apply_gate(h[None])
        second.star.width = 24  # as a gate that names its number of channels
        with pytest.raises(RuntimeError, match=r"not verified for torch\.float32 of shape \(4, 48"):
            second._apply_gate(h)
        second.star.width, second.star.autocast = 48, False
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(RuntimeError, match="autocast changes the model's own gate"),
        ):
            second._apply_gate(h)
        assert not counted
        second._apply_gate(h)
    assert len(counted) == 1


@pytest.mark.interpret
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hooks_keep_the_kernel_out_of_the_loop(mixtral, counted, implementation, monkeypatch):
    """Under "auto" experts with hooks run the model's own gate, and the hooks see it."""
    plain = copy.deepcopy(mixtral)
    starify(mixtral, mode="fuse")
    monkeypatch.setattr("starlayers.plans.MIN_ELEMENTS_STAR", 0)
    seen = []
    for model in (mixtral, plain):
        model.set_experts_implementation(implementation)
        for experts in experts_of(model):
            experts.act_fn.register_forward_hook(lambda m, a, y: seen.append(1) or 2 * y)
    assert_same(outputs(mixtral), outputs(plain))
    assert not counted
    assert seen


def test_a_gated_mlp_is_no_experts():
    net = nn.ModuleDict({"experts": Gated()})
    assert [row.form for row in report(net).rows] == ["gated"]
