"""Tiny mixtures of experts of transformers, and every class under its experts interface."""

import importlib
import inspect
import pkgutil
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

IDS = torch.tensor([[5, 17, 42, 3, 8, 77, 1], [9, 9, 61, 2, 30, 4, 11]])
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")

COMMON = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
GROUPED = ROUTED | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}

#: family -> options of its config
FAMILIES = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": ROUTED | {"head_dim": 8},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Glm4Moe": GROUPED | {"first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 8},
    "DeepseekV3": GROUPED
    | {
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
    },
    "Qwen3Next": ROUTED
    | {
        "head_dim": 8,
        "shared_expert_intermediate_size": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
}


def causal(family, seed=0, **options):
    """A tiny causal language model of a family, in eval mode."""
    config = getattr(transformers, f"{family}Config")(**COMMON | FAMILIES[family] | options)
    torch.manual_seed(seed)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def experts_of(model):
    """The modules of experts of a model."""
    return [m for name, m in model.named_modules() if name.endswith(".experts")]


class MoE(nn.Module):
    """Nothing but experts, with a fixed choice of two for every token."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        generator = torch.Generator().manual_seed(0)
        score = torch.rand(len(x), self.experts.num_experts, generator=generator)
        weights, index = score.topk(2, -1)
        return self.experts(x, index, weights.to(x.dtype))


def decorated():
    """Yield every class under the experts interface, and the module that defines it."""
    root = Path(transformers.__file__).parent / "models"
    for family in sorted(m.name for m in pkgutil.iter_modules([str(root)])):
        for path in sorted((root / family).glob("modeling_*.py")):
            if "@use_experts_implementation" not in path.read_text():
                continue
            module = importlib.import_module(f"transformers.models.{family}.{path.stem}")
            for kind in list(vars(module).values()):
                own = inspect.isclass(kind) and kind.__module__ == module.__name__
                if own and hasattr(kind, "_apply_gate") and hasattr(kind.forward, "__wrapped__"):
                    yield module, kind


#: sizes of stand-alone experts, under all names that configs use: rows of 16 bytes in bfloat16
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
}


def build(module, kind):
    """Experts of a class, small and random, from the config of its model."""
    hint = inspect.signature(kind.__init__).parameters["config"].annotation
    if not hasattr(hint, "model_type"):
        models = (m for m in vars(module).values() if inspect.isclass(m))
        hint = next(
            m.config_class
            for m in models
            if issubclass(m, PreTrainedModel) and m.__module__ == module.__name__ and m.config_class
        )
    config = vars(hint().get_text_config()) | SIZES | {"_experts_implementation": "eager"}
    torch.manual_seed(0)
    experts = kind(SimpleNamespace(**config))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return experts
