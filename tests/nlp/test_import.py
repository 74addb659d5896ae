"""Importing starlayers.nlp needs transformers and nothing else beside torch."""

import subprocess
import sys

#: installed with the tests and used by examples, studies and data sets
OPTIONAL = (
    *("accelerate", "datasets", "matplotlib", "pandas", "peft", "sacrebleu", "scipy", "sklearn"),
    *("timm", "torchvision", "typer"),
)
SAVE_AND_LOAD = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # as if it were not installed
import torch
from starlayers.nlp import StarformerConfig, StarformerForCausalLM, from_llama, to_llama
config = StarformerConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
                          num_attention_heads=4, layer_types=["star_conv", "attention"])
model = StarformerForCausalLM(config).eval()
ids = torch.tensor([[1, 5, 7]])
model(ids, labels=ids).loss.backward()
model.save_pretrained("saved")
again = StarformerForCausalLM.from_pretrained("saved").eval()
assert torch.equal(model(ids).logits, again(ids).logits)
print(again.generate(ids, min_new_tokens=4, max_new_tokens=4).shape[1])
"""


def run(code, folder=None):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)


def test_transformers_is_enough(tmp_path):
    done = run(SAVE_AND_LOAD, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "7\n"


def test_the_extra_is_named_where_transformers_is_missing():
    code = "import sys; sys.modules['transformers'] = None; import starlayers.nlp"
    done = run(code)
    assert done.returncode == 1
    assert "ImportError: starlayers.nlp needs transformers: pip install 'starlayers[nlp]'" in (
        done.stderr
    )
