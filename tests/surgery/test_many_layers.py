"""Verification of models with many layers: once for equal MLPs, in little time and memory."""

import subprocess
import sys

import pytest
import torch

from starlayers import starify
from starlayers.surgery import report
from tests.surgery.test_quantised import verified

#: measured in a process of its own, whose peak nothing else has raised
PROGRAM = """
import resource, sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from starlayers import starify

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB

device, sizes = sys.argv[1], [int(size) for size in sys.argv[2:]]
config = LlamaConfig(hidden_size=sizes[0], intermediate_size=sizes[1], num_hidden_layers=32,
                     num_attention_heads=8, num_key_value_heads=8, vocab_size=1000)
with torch.device(device):
    model = LlamaForCausalLM(config)
before, start = peak(), time.monotonic()
starify(model, mode="fuse")
stars = sum("Star" in type(m).__name__ for m in model.modules())
print(time.monotonic() - start, peak() - before, stars)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "hidden", "intermediate"), [("meta", 4096, 11008), ("cpu", 512, 1376)]
)
def test_32_layers_take_little_memory(device, hidden, intermediate):
    sizes = [str(hidden), str(intermediate)]
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, device, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _, memory, stars = map(float, done.stdout.split())
    assert stars == 32
    assert memory < 1  # GiB; one MLP of 7B's widths has 0.5 in float32


def test_equal_mlps_are_verified_once_however_many(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    seen = verified(monkeypatch)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32))
    starify(model, mode="fuse")
    names = [kind.__name__ for kind in seen]
    assert names == ["LlamaMLP"]
    assert [row.state for row in report(model).rows].count("eager") == 32


def test_gemma_3n_is_verified_once_for_each_sparsity(monkeypatch):
    from transformers import Gemma3nTextConfig
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

    seen = verified(monkeypatch)
    sparsity = [0.95, 0.95, 0.0, 0.0, 0.0, 0.0]
    config = Gemma3nTextConfig(
        hidden_size=8,
        num_hidden_layers=6,
        intermediate_size=16,
        activation_sparsity_pattern=sparsity,
    )
    model = torch.nn.ModuleList(Gemma3nTextMLP(config, layer_idx=i) for i in range(6))
    starify(model, mode="fuse")
    assert len(seen) == 2
    states = [row.state for row in report(model).rows]
    assert states == ["skipped"] * 2 + ["fused"] * 4
