"""Small MLPs of every form, a net of them, and tiny models of transformers."""

import torch
from torch import nn

from starlayers.surgery import gate_parameters


class MLP(nn.Module):
    def __init__(self, n=8, f=16, act=None, dropout=0.0):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(n, f), nn.Linear(f, n)
        self.act = nn.GELU() if act is None else act
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Twice(MLP):
    def forward(self, x):
        return self.fc2(self.act(self.act(self.fc1(x))))


class Gated(nn.Module):
    """SwiGLU; `first` is the branch that is defined first, `gate` the one that is activated."""

    def __init__(self, first="gate", act=None, scale=1.0):
        super().__init__()
        for name in ("gate", "up") if first == "gate" else ("up", "gate"):
            setattr(self, name, nn.Linear(8, 16, bias=False))
        self.down = nn.Linear(16, 8, bias=False)
        self.act = nn.SiLU() if act is None else act
        self.scale = scale

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x) * self.scale)


class Packed(nn.Module):
    def __init__(self, gate_last=False):
        super().__init__()
        self.both, self.down, self.act = nn.Linear(8, 32), nn.Linear(16, 8), nn.SiLU()
        self.gate_last = gate_last

    def forward(self, x):
        a, b = self.both(x).chunk(2, -1)
        return self.down(a * self.act(b) if self.gate_last else self.act(a) * b)


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def train_gates(model, size=0.1):
    """Draw the gates of a model as if they had learned something, and return the model."""
    for parameter in gate_parameters(model):
        nn.init.normal_(parameter, std=size)
    return model


# --- transformers, imported where a test needs them

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
IDS = torch.arange(14).reshape(2, 7)


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=64)).eval()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64)).eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99)).eval()
