"""Every public layer and network at a fixed seed, and folders saved by them.

`python -m tests.golden.cases` writes `golden.json` and `saved.tar.gz` beside this file. They were
written before the packages were rearranged and are not meant to be written again: a difference is a
change of what users compute or of what they have on disk.
"""

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from starlayers import DropPath, StarBlock, StarMLP, StarOp, starify, use_backend
from starlayers.activations import ACTIVATIONS
from starlayers.coefficients.modules import (
    DynamicStarMLP,
    DynamicStarOp,
    RankStarMLP,
    RankStarOp,
    ScaledStarMLP,
    ScaledStarOp,
    SumMLP,
    SumOp,
)
from starlayers.surgery import apply_record, gate_parameters, record_of
from starlayers.surgery.grown import Grown

FOLDER = Path(__file__).parent
NUMBERS, SAVED = FOLDER / "golden.json", FOLDER / "saved.tar.gz"
SEED = 20261128

Build = Callable[[], tuple[nn.Module, tuple[Any, ...]]]
CASES: dict[str, Build] = {}


def case(name: str) -> Callable[[Build], Build]:
    def enter(build: Build) -> Build:
        assert name not in CASES
        CASES[name] = build
        return build

    return enter


def tokens(vocabulary: int, length: int = 12) -> Tensor:
    return torch.randint(3, vocabulary, (2, length))


# the core

OP_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "sum": {"combine": "sum", "act": "gelu"},
    "offset": {"offset": 1.0, "act": "tanh"},
    "rank": {"rank": 3, "act": None},
    "scale": {"coefficients": "scale"},
    "dynamic": {"coefficients": "dynamic"},
    "no-bias": {"bias": False, "act": "silu"},
    **{f"act-{name}": {"act": name} for name in ACTIVATIONS},
}


#: option that chose a variant when these numbers were written -> the variant of today
VARIANTS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "combine": (SumOp, SumMLP),
    "rank": (RankStarOp, RankStarMLP),
    "scale": (ScaledStarOp, ScaledStarMLP),
    "dynamic": (DynamicStarOp, DynamicStarMLP),
}


def core_case(kind: str, options: dict[str, Any]) -> Build:
    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        chosen = dict(options)
        variant = chosen.pop("coefficients", None) or (
            "combine" if chosen.pop("combine", 0) else ""
        )
        variant = variant or ("rank" if "rank" in chosen else "")
        op, mlp = VARIANTS.get(variant, (StarOp, StarMLP))
        if kind == "op":
            layer: nn.Module = as_saved(op(6, 10, **chosen))
        elif kind == "mlp":
            layer = as_saved(mlp(6, 10, out_features=7, **chosen))
        else:
            parts = {"pre": nn.LayerNorm(6), "post": nn.Linear(6, 6), "layer_scale": 0.5}
            layer = StarBlock(6, as_saved(mlp(6, 12, **chosen)), **parts)
        return layer, (torch.randn(3, 5, 6),)

    return build


def as_saved(layer: nn.Module) -> nn.Module:
    """Load the weights that a layer drew as the state dict of the time of these numbers.

    Sums of products were laid out (rank, channels) then, in branches without a name of their own.
    """
    state = {k.removeprefix("star."): v.clone() for k, v in layer.state_dict().items()}
    layer.load_state_dict(state)
    return layer


for _kind in ("op", "mlp", "block"):
    for _name, _options in OP_OPTIONS.items():
        CASES[f"core/{_kind}/{_name}"] = core_case(_kind, _options)


@case("core/drop-path")
def _drop_path() -> tuple[nn.Module, tuple[Any, ...]]:
    return DropPath(0.3), (torch.ones(16, 2, requires_grad=True),)


# vision


def starnet_case(name: str) -> Build:
    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        from starlayers.vision.models import MODELS

        return MODELS[name](num_classes=5), (torch.randn(2, 3, 64, 64),)

    return build


for _name in ("s050", "s100", "s150", "s1", "s2", "s3", "s4"):
    CASES[f"vision/starnet_{_name}"] = starnet_case(f"starnet_{_name}")

SMALL = {"stem_stride": 1, "stage_strides": (1, 1, 2, 2), "kernel_size": 3, "in_chans": 1}


@case("vision/starnet_small")
def _starnet_small() -> tuple[nn.Module, tuple[Any, ...]]:
    from starlayers.vision import starnet_s050

    net = starnet_s050(num_classes=10, drop_path_rate=0.2, drop_rate=0.1, act="gelu", **SMALL)
    return net, (torch.randn(3, 1, 8, 8),)


@case("vision/starnet_dynamic")
def _starnet_dynamic() -> tuple[nn.Module, tuple[Any, ...]]:
    from starlayers.vision import StarNet

    return StarNet(8, (1, 2), stage_strides=(2, 2), mlp_layer=DynamicStarMLP), (
        torch.randn(2, 3, 32, 32),
    )


@case("vision/demonet_star")
def _demonet_star() -> tuple[nn.Module, tuple[Any, ...]]:
    from starlayers.vision import DemoNet

    return DemoNet(depth=2, dim=16, num_classes=5, patch_size=8, layer_scale=1.0), (
        torch.randn(2, 3, 32, 32),
    )


@case("vision/demonet_sum")
def _demonet_sum() -> tuple[nn.Module, tuple[Any, ...]]:
    from starlayers.vision import DemoNet

    net = DemoNet(depth=2, dim=16, combine="sum", act=None, num_classes=5, patch_size=8)
    return net, (torch.randn(2, 3, 32, 32),)


# language

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
STARFORMERS: dict[str, dict[str, Any]] = {
    "default": {},
    "silu": {"hidden_act": "silu"},
    "rank": {"hidden_act": None, "mlp_rank": 2, "mlp_offset": 1.0},
    "sum": {"mlp_type": "sum"},
    "plain": {"mlp_type": "plain", "hidden_act": "gelu"},
    "gate-head": {"attention_gate": "head"},
    "gate-channel": {"attention_gate": "channel", "attention_gate_act": "silu"},
    "hybrid": {"layer_types": ["star_conv", "attention"], "conv_act": "silu", "conv_bias": True},
}
HEADS = (
    "StarformerModel",
    "StarformerForSequenceClassification",
    "StarformerForTokenClassification",
    "StarformerForQuestionAnswering",
)
ENCODER_HEADS = (
    "StarformerEncoderModel",
    "StarformerForMaskedLM",
    "StarformerEncoderForSequenceClassification",
    "StarformerEncoderForTokenClassification",
    "StarformerEncoderForQuestionAnswering",
)


def starformer_case(model: str, config: str, options: dict[str, Any]) -> Build:
    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        from starlayers import nlp

        if config == "StarformerSeq2SeqConfig" and "layer_types" in options:
            options["encoder_layer_types"] = options["layer_types"]
        if options.get("mlp_type") == "plain":  # each layer drew a star MLP first then
            _ = [StarMLP(32, 48, bias=False) for _ in range(SIZES["num_hidden_layers"])]
        net = getattr(nlp, model)(getattr(nlp, config)(**SIZES, **options))
        ids = (tokens(99),)
        if "Seq2Seq" in config:
            return net, (*ids, torch.ones(2, 12, dtype=torch.long), tokens(99, 7))
        return net, ids

    return build


for _name, _options in STARFORMERS.items():
    CASES[f"nlp/causal/{_name}"] = starformer_case(
        "StarformerForCausalLM", "StarformerConfig", _options
    )
for _head in HEADS:
    CASES[f"nlp/{_head}"] = starformer_case(_head, "StarformerConfig", {})
for _head in ENCODER_HEADS:
    CASES[f"nlp/{_head}"] = starformer_case(_head, "StarformerEncoderConfig", {})
for _head in ("StarformerForConditionalGeneration", "StarformerSeq2SeqModel"):
    CASES[f"nlp/{_head}"] = starformer_case(_head, "StarformerSeq2SeqConfig", {})


# surgery


def plain_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def randomised_gates(model: nn.Module) -> nn.Module:
    for parameter in gate_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model


def starified_case(gate: str) -> Build:
    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        return randomised_gates(starify(plain_mlp(), gate=gate)), (torch.randn(3, 8),)

    return build


for _gate in ("full", "low_rank=2", "scale"):
    CASES[f"surgery/{_gate}"] = starified_case(_gate)


@case("surgery/grown-llama")
def _grown_llama() -> tuple[nn.Module, tuple[Any, ...]]:
    model, inputs = randomised_gates(starify(tiny_llama(), grow=2)), (tokens(99),)
    # rows of grown products were laid out (rank, channels) then: records up to version 2
    old = apply_record(tiny_llama(), record_of(model) | {"version": 2})
    old.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return old, inputs


@case("surgery/fused-llama")
def _fused_llama() -> tuple[nn.Module, tuple[Any, ...]]:
    return starify(tiny_llama(), mode="fuse"), (tokens(99),)


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {k: v for k, v in SIZES.items() if k != "pad_token_id"}
    return LlamaForCausalLM(LlamaConfig(**sizes))


def tiny_bert() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=32, max_position_embeddings=32)
    )  # fmt: skip


# reinforcement learning


class Rewarding(gym.Env[Any, Any]):
    """Observations from a seeded generator, rewards from the action, episodes of ten steps."""

    def __init__(self, observation: spaces.Space[Any], action: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        reward = float(np.sum(np.asarray(action, float)))
        return self.observation_space.sample(), reward, False, self.steps >= 10, {}

    def action_masks(self) -> np.ndarray:
        return np.ones(3, bool)


def box() -> spaces.Box:
    return spaces.Box(-1, 1, (3,))


def image() -> spaces.Box:
    return spaces.Box(0, 255, (1, 36, 36), dtype=np.uint8)


def mixed() -> spaces.Dict:
    return spaces.Dict({"vector": box(), "image": image(), "kind": spaces.Discrete(3)})


ON = {"n_steps": 32, "batch_size": 16, "n_epochs": 2}
OFF = {"learning_starts": 30, "batch_size": 8, "buffer_size": 300}
#: name -> (algorithm, policy, observations, is the action a box, policy_kwargs)
AGENTS: dict[str, tuple[str, str, Callable[[], Any], bool, dict[str, Any]]] = {
    **{
        f"PPO-{net}": ("PPO", "StarMlpPolicy", box, False, {"net": net, "net_arch": [16, 16]})
        for net in ("star", "star_residual", "mlp", "d2rl", "simba")
    },
    "PPO-norm": ("PPO", "StarMlpPolicy", box, True, {"norm": "layer", "net_arch": [16]}),
    "PPO-sides": ("PPO", "StarMlpPolicy", box, False, {"net": {"pi": "mlp", "vf": "star"}}),
    "PPO-image": ("PPO", "StarCnnPolicy", image, False, {}),
    "PPO-dict": ("PPO", "StarMultiInputPolicy", mixed, False, {}),
    "PPO-extractor": ("PPO", "StarMlpPolicy", box, False, {"net_arch": [8]}),
    "A2C": ("A2C", "StarMlpPolicy", box, False, {}),
    "SAC": ("SAC", "StarMlpPolicy", box, True, {"net_arch": [16, 16]}),
    "SAC-product": (
        "SAC",
        "StarMlpPolicy",
        box,
        True,
        {"net": {"pi": "mlp", "qf": "product"}, "net_arch": [16, 16]},
    ),
    "TD3": ("TD3", "StarMlpPolicy", box, True, {"net_arch": [16, 16]}),
    "DDPG": ("DDPG", "StarMlpPolicy", box, True, {"net_arch": [16, 16]}),
    "DQN": ("DQN", "StarMlpPolicy", box, False, {"net_arch": [16, 16]}),
    "DQN-dict": ("DQN", "StarMultiInputPolicy", mixed, False, {"net_arch": [16]}),
    "TRPO": ("TRPO", "StarMlpPolicy", box, False, {"net_arch": [16]}),
    "MaskablePPO": ("MaskablePPO", "StarMlpPolicy", box, False, {"net_arch": [16]}),
    "RecurrentPPO": ("RecurrentPPO", "StarMlpPolicy", box, False, {"lstm_hidden_size": 8}),
    "TQC": ("TQC", "StarMlpPolicy", box, True, {"net_arch": [16]}),
    "QRDQN": ("QRDQN", "StarMlpPolicy", box, False, {"net_arch": [16]}),
    "CrossQ": ("CrossQ", "StarMlpPolicy", box, True, {"net_arch": [16]}),
    "ARS": ("ARS", "StarMlpPolicy", box, False, {"net_arch": [16]}),
}


SAVED_AGENTS = (
    "PPO-star",
    "PPO-norm",
    "PPO-extractor",
    "SAC-product",
    "DQN",
    "TQC",
    "RecurrentPPO",
    "MaskablePPO",
    "CrossQ",
)


def settings(name: str) -> dict[str, Any]:
    if name in ("SAC", "TD3", "DDPG", "DQN", "TQC", "QRDQN", "CrossQ"):
        return OFF
    if name in ("PPO", "MaskablePPO", "RecurrentPPO"):
        return ON
    return {"A2C": {"n_steps": 16}, "TRPO": {"n_steps": 32, "batch_size": 16}}.get(
        name, {"n_delta": 1, "zero_policy": False}
    )


def make_agent(name: str) -> Any:
    import sb3_contrib
    import stable_baselines3

    import starlayers.rl

    algorithm, policy, observation, boxed, kwargs = AGENTS[name]
    cls = getattr(stable_baselines3, algorithm, None) or getattr(sb3_contrib, algorithm)
    action = spaces.Box(-2, 1, (2,)) if boxed else spaces.Discrete(3)
    if name == "PPO-extractor":
        kwargs = {**kwargs, "features_extractor_class": starlayers.rl.StarExtractor}
    return cls(
        policy,
        Rewarding(observation(), action),
        policy_kwargs=dict(kwargs),
        seed=3,
        device="cpu",
        **settings(algorithm),
    )


class Predicts(nn.Module):
    """The actions of a policy, and its value where it has one, as a module of one input."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: Any) -> list[Tensor]:
        p = self.policy
        p.set_training_mode(False)
        tensors, _ = p.obs_to_tensor(observations)
        if hasattr(p, "lstm_actor"):
            rows, _ = p.predict(observations, deterministic=True)
            return [torch.as_tensor(rows).float()]
        if hasattr(p, "predict_values"):
            return [p.get_distribution(tensors).get_actions(deterministic=True).float(),
                    p.predict_values(tensors)]  # fmt: skip
        out = [p._predict(tensors, deterministic=True).float()]
        if hasattr(p, "q_net"):
            out.append(p.q_net(tensors))
        if hasattr(p, "quantile_net"):
            out.append(p.quantile_net(tensors))
        if getattr(p, "critic", None) is not None:
            critic = p.critic
            values = critic(tensors, out[0])
            out.extend(values if isinstance(values, tuple) else [values])
        return out


def observations_of(agent: Any, n: int = 4) -> Any:
    space = agent.observation_space
    space.seed(5)
    rows = [space.sample() for _ in range(n)]
    if isinstance(rows[0], dict):
        return {k: np.stack([row[k] for row in rows]) for k in rows[0]}
    return np.stack(rows)


def agent_case(name: str) -> Build:
    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        agent = make_agent(name)
        return Predicts(agent.policy), (observations_of(agent),)

    return build


for _name in AGENTS:
    CASES[f"rl/{_name}"] = agent_case(_name)


# what is compared


#: parts of names that changed since, and what they were; old state dicts load all the same
OLD_NAMES = {"star.f": "f", ".f12.": ".proj."}


def digest(module: nn.Module) -> str:
    """Names of that time, shapes and types of a state dict, in order."""
    rows = []
    for key, value in module.state_dict().items():
        for now, then in OLD_NAMES.items():
            key = key.replace(now, then)
        rows.append(f"{key} {tuple(value.shape)} {value.dtype}")
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for key in value:
            if key not in ("past_key_values", "cache"):
                yield from leaves(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)


def sums(tensors: list[Tensor]) -> list[float]:
    """Two numbers for each tensor: the sum of absolute values, and a weighted sum of all."""
    out = []
    for t in tensors:
        flat = t.detach().double().flatten()
        weights = torch.cos(torch.arange(len(flat), dtype=torch.float64))
        out += [flat.abs().sum().item(), (flat * weights).sum().item()]
    return out


def measure(module: nn.Module, args: tuple[Any, ...]) -> dict[str, list[float]]:
    """Sums of the outputs in evaluation and in training mode, and of the gradients."""
    found = {}
    with use_backend("eager"):
        for mode in ("eval", "train"):
            module.train(mode == "train")
            torch.manual_seed(7)
            outputs = list(leaves(module(*args)))
            found[mode] = sums(outputs)
        parameters = [p for p in module.parameters() if p.requires_grad]
        ranks = {
            id(p): part.rank
            for part in module.modules()
            if isinstance(part, (RankStarOp, Grown))
            for p in (part if isinstance(part, Grown) else part.star).parameters()
        }
        loss = sum((t * t).sum() for t in outputs if t.requires_grad)
        if parameters and isinstance(loss, Tensor):
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            # sums of products in the order of their rows then, (rank, channels)
            grads = [
                g if g is None else g.unflatten(0, (-1, ranks.get(id(p), 1))).transpose(0, 1)
                for p, g in zip(parameters, grads)
            ]
            flat = torch.cat([g.flatten().double() for g in grads if g is not None])
            found["gradient"] = sums([flat])
    return found


def golden(name: str) -> dict[str, Any]:
    torch.manual_seed(SEED)
    module, args = CASES[name]()
    return {"keys": digest(module), "sums": measure(module, args)}


# what is on disk


def run_net() -> nn.Module:
    from starlayers.vision import StarNet

    torch.manual_seed(0)
    return StarNet(8, (1,), stage_strides=(2,), num_classes=10, in_chans=1, stem_stride=1)


def train_digits(folder: Path, *, resume: bool) -> Any:
    """Train `run_net` on the digits for an epoch, or find that the run in `folder` is finished."""
    from starlayers.datasets.images import load_images
    from starlayers.vision.training import TrainConfig, train
    from starlayers.vision.training.rundir import RunDir

    config = TrainConfig(epochs=1, batch_size=64, lr=2e-2, ema=0.8)
    run = RunDir(folder, vars(config), resume=resume)
    return train(run_net(), load_images("digits"), config, run, progress=False)


def save_all(folder: Path) -> None:
    """One of everything the library leaves on disk."""
    from safetensors.torch import save_file

    from starlayers.nlp import (
        StarformerConfig,
        StarformerForCausalLM,
        StarformerForConditionalGeneration,
        StarformerSeq2SeqConfig,
        save_with_code,
    )
    from starlayers.vision import StarNet, to_timm_state_dict

    torch.manual_seed(SEED)
    save_file(ScaledStarMLP(6, 10).state_dict(), folder / "star_mlp.safetensors")
    torch.save(StarBlock(6, StarMLP(6, 12)), folder / "star_block.pt")
    net = StarNet(8, (1, 1), stage_strides=(2, 2), num_classes=5)
    torch.save(net, folder / "starnet_module.pt")
    torch.save(net.state_dict(), folder / "starnet_state.pt")
    timm_state = {k: v.contiguous() for k, v in to_timm_state_dict(net).items()}
    save_file(timm_state, folder / "starnet_timm.safetensors")
    hybrid = STARFORMERS["hybrid"]
    StarformerForCausalLM(StarformerConfig(**SIZES, **hybrid)).save_pretrained(folder / "causal")
    save_with_code(StarformerForCausalLM(StarformerConfig(**SIZES)), folder / "with_code")
    seq2seq = StarformerSeq2SeqConfig(**SIZES)
    StarformerForConditionalGeneration(seq2seq).save_pretrained(folder / "seq2seq")
    randomised_gates(starify(tiny_bert(), gate="low_rank=2")).save_pretrained(folder / "bert")
    randomised_gates(starify(tiny_llama(), grow=1)).save_pretrained(folder / "llama")
    torch.save(randomised_gates(starify(plain_mlp())), folder / "starified_module.pt")
    torch.save(starify(tiny_llama(), mode="fuse"), folder / "fused_module.pt")
    for name in SAVED_AGENTS:
        make_agent(name).learn(64).save(folder / f"agent-{name}")
    train_digits(folder / "run", resume=False)


def load_all(folder: Path) -> dict[str, list[float]]:
    """Sums of what each saved thing computes, after it is loaded as a user would."""
    import sb3_contrib
    import stable_baselines3
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    # both enter their classes in tables of their frameworks
    import starlayers.nlp
    import starlayers.rl  # noqa: F401
    from starlayers import from_pretrained
    from starlayers.vision import StarNet, load_checkpoint

    found: dict[str, list[float]] = {}

    def note(name: str, module: nn.Module, *args: Any) -> None:
        with use_backend("eager"), torch.no_grad():
            found[name] = sums(list(leaves(module.eval()(*args))))

    torch.manual_seed(SEED)
    x, images, ids = torch.randn(3, 5, 6), torch.randn(2, 3, 32, 32), tokens(99)
    digits = torch.randn(4, 1, 8, 8)
    mlp = ScaledStarMLP(6, 10)
    mlp.load_state_dict(load_file(folder / "star_mlp.safetensors"))
    note("star_mlp", mlp, x)
    note("star_block", torch.load(folder / "star_block.pt", weights_only=False), x)
    note("starnet_module", torch.load(folder / "starnet_module.pt", weights_only=False), images)
    for name in ("starnet_state.pt", "starnet_timm.safetensors"):
        net = StarNet(8, (1, 1), stage_strides=(2, 2), num_classes=5)
        load_checkpoint(net, folder / name)
        note(name, net, images)
    note("causal", AutoModelForCausalLM.from_pretrained(folder / "causal"), ids)
    note("with_code", AutoModelForCausalLM.from_pretrained(folder / "with_code"), ids)
    seq2seq = AutoModelForSeq2SeqLM.from_pretrained(folder / "seq2seq")
    note("seq2seq", seq2seq, ids, torch.ones_like(ids), ids[:, :5])
    note("bert", from_pretrained(AutoModel, folder / "bert"), ids)
    note("llama", from_pretrained(AutoModelForCausalLM, folder / "llama"), ids)
    starified = torch.load(folder / "starified_module.pt", weights_only=False)
    note("starified_module", starified, torch.randn(3, 8))
    note("fused_module", torch.load(folder / "fused_module.pt", weights_only=False), ids)
    for file in sorted(folder.glob("agent-*.zip")):
        algorithm = AGENTS[file.stem.removeprefix("agent-")][0]
        cls = getattr(stable_baselines3, algorithm, None) or getattr(sb3_contrib, algorithm)
        agent = cls.load(file, device="cpu")
        found[file.stem] = sums(Predicts(agent.policy)(observations_of(agent)))
    net = run_net()
    load_checkpoint(net, folder / "run" / "model.safetensors")
    note("run", net, digits)
    found["resumed run"] = [train_digits(folder / "run", resume=True).test_accuracy]
    return found


def main() -> None:
    numbers: dict[str, Any] = {name: golden(name) for name in CASES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_all(folder)
        loaded = load_all(folder)
        for picture in folder.rglob("*.png"):
            picture.unlink()
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            archive.add(folder, arcname=".")
    SAVED.write_bytes(packed.getvalue())
    NUMBERS.write_text(json.dumps({"modules": numbers, "saved": loaded}, indent=1) + "\n")
    print(len(numbers), "modules,", len(loaded), "saved,", SAVED.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
