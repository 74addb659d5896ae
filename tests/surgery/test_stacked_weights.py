"""Experts with stacked weights outside of the interface are told, and nothing else is."""

import pytest
import torch
import torchvision
from torch import nn
from transformers import (
    DbrxConfig,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    ViTConfig,
    ViTModel,
)
from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU
from transformers.models.moshi.modeling_moshi import MoshiFlexibleLinear

from starlayers import starify
from starlayers.surgery import report
from starlayers.surgery.stacked_weights import stacked_experts
from tests.surgery.moe import COMMON, causal
from tests.surgery.small import MLP

INTERFACE = "starify serves experts of transformers' experts interface (use_experts_implementation)"


class Stack(nn.Module):
    """Stacked weights by name, and nothing else."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x):
        return x


class StackedExperts(Stack):
    pass


class HeadsAttention(Stack):
    pass


@pytest.mark.parametrize(
    "shapes",
    [
        {"w1": (4, 8, 12), "w2": (4, 12, 8), "w3": (4, 8, 12)},
        {"gate_up_proj": (4, 24, 8), "down_proj": (4, 8, 12)},
        {"gate_up_proj": (4, 8, 24), "down_proj": (4, 12, 8)},
        {"up_proj": (4, 12, 8), "down_proj": (4, 8, 12)},
        {"wi": (6, 8, 12), "wo": (4, 12, 8)},
    ],
)
def test_names_of_weights(shapes):
    assert stacked_experts("mlp", Stack(**shapes)) == (
        f"Stack holds stacked weights and computes its experts itself: {INTERFACE}"
    )
    other = {f"tensor_{i}": shape for i, shape in enumerate(shapes.values())}
    assert stacked_experts("mlp", Stack(**other)) == ""
    assert stacked_experts("layers.0.experts", Stack(**other)) != ""
    assert stacked_experts("mlp", StackedExperts(**other)) != ""
    assert stacked_experts("mlp", HeadsAttention(**shapes)) == ""


@pytest.mark.parametrize(
    "module",
    [
        Stack(q=(4, 8, 2), k=(4, 8, 2), v=(4, 8, 2), o=(4, 2, 8)),  # heads of an attention
        Stack(cls=(1, 1, 8), pos=(1, 5, 8)),
        StackedExperts(cls=(1, 1, 8), pos=(1, 5, 8)),
        StackedExperts(w1=(4, 8, 12)),
        StackedExperts(w1=(4, 8, 12), w2=(4, 5, 7)),
        StackedExperts(w1=(8, 12), w2=(8, 12)),
        StackedExperts(scale=(4, 1, 1), shift=(4, 1, 1)),
        nn.Bilinear(8, 8, 4),
        nn.Conv1d(8, 8, 3),
        nn.MultiheadAttention(8, 2),
        nn.LSTM(8, 8, 2),
        nn.EmbeddingBag(8, 8),
        nn.TransformerEncoderLayer(8, 2, 16),
        MoshiFlexibleLinear(8, 8, 3),
        MLP(),
    ],
)
def test_what_holds_no_experts(module):
    names = [stacked_experts(path, m) for path, m in module.named_modules()]
    assert set(names) == {""}


def test_rows_of_all_experts_in_one_matrix():
    config = DbrxConfig().ffn_config
    config.hidden_size, config.ffn_hidden_size, config.moe_num_experts = 8, 12, 4
    found = DbrxExpertGLU(config)
    assert stacked_experts("experts.mlp", found) == (
        f"DbrxExpertGLU holds the rows of all experts in one matrix: {INTERFACE}"
    )
    router = StackedExperts(weight=(4, 8), noise=(4, 8))
    router.num_experts = 4
    assert stacked_experts("gate", router) == ""


def test_models():
    llama4 = Llama4ForCausalLM(
        Llama4TextConfig(**COMMON, head_dim=8, num_local_experts=4, intermediate_size_mlp=24)
    )
    rows = {row.name: row for row in report(llama4).rows}
    for i in range(2):
        row = rows[f"model.layers.{i}.feed_forward.experts"]
        assert (row.recipe, row.form, row.state) == ("experts", "experts", "skipped")
        assert row.detail.startswith("Llama4TextExperts holds stacked weights")
        assert rows[f"model.layers.{i}.feed_forward.shared_expert.gate_proj"].state == "is a star"
    jetmoe = JetMoeForCausalLM(
        JetMoeConfig(**COMMON, kv_channels=8, num_local_experts=4, num_experts_per_tok=1)
    )
    rows = [row for row in report(jetmoe).rows if row.form == "experts"]
    assert [row.name for row in rows] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert all(row.detail.startswith("JetMoeMoE holds stacked linear") for row in rows)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp: JetMoeMoE holds stacked"):
        starify(jetmoe, mode="fuse", include="*.mlp")
    assert report(causal("Mixtral")).skipped == []


@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision.models.vit_b_16(),
        lambda: torchvision.models.convnext_tiny(),
        lambda: ViTModel(ViTConfig(num_hidden_layers=1)),
    ],
)
def test_vision_models_have_no_experts(build):
    with torch.device("meta"):
        model = build()
    assert {stacked_experts(path, m) for path, m in model.named_modules()} == {""}
