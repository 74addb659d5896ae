"""MLPs outside of transformers: those of installed libraries, and shapes that others have."""

from torch import Tensor, nn
from torch.nn import functional as F

N, HIDDEN = 8, 16


class Inline(nn.Module):
    """Gated MLP whose forward calls `silu`: w1 is activated, w3 not, w2 is last."""

    def __init__(
        self, bias: bool = False, names: tuple[str, str, str] = ("w1", "w3", "w2")
    ) -> None:
        super().__init__()
        for name, sizes in zip(names, ((N, HIDDEN), (N, HIDDEN), (HIDDEN, N))):
            setattr(self, name, nn.Linear(*sizes, bias=bias))


class LitGPTLike(Inline):
    """litgpt's LLaMAMLP: fc_1, fc_2 and proj, the activation in the forward."""

    def __init__(self) -> None:
        super().__init__(bias=True, names=("fc_1", "fc_2", "proj"))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fc_1(x), self.fc_2(x)
        return self.proj(F.silu(gate) * up)


class GemmaLike(Inline):
    """litgpt's GemmaMLP: as LLaMAMLP, with GELU by its tanh approximation if a config says so."""

    def __init__(self, approximate: str = "tanh") -> None:
        super().__init__(names=("fc_1", "fc_2", "proj"))
        self.config = {"approximate": approximate}

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.fc_1(x), approximate=self.config["approximate"])
        return self.proj(gate * self.fc_2(x))


class TorchtitanLike(Inline):
    """FeedForward of torchtitan and of Meta's Llama: one line of w1, w3 and w2."""

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class DinoHubSwiGLU(nn.Module):
    """DINOv2's SwiGLUFFN in torch.hub: w12 makes both branches, chunk splits it."""

    def __init__(self, w12: int = 2 * HIDDEN) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(N, w12), nn.Linear(HIDDEN, N)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(first) * second)


class DinoHubFused(DinoHubSwiGLU):
    """DINOv2's SwiGLUFFNFused without xformers: it leaves the forward to its base class."""


class NanoLike(nn.Module):
    """nanoGPT's MLP: c_fc, a GELU module and c_proj."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(N, HIDDEN), nn.Linear(HIDDEN, N)
        self.gelu, self.dropout = nn.GELU(), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Squared(nn.Module):
    """MLP of modded nanoGPTs: the square of relu in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(N, HIDDEN), nn.Linear(HIDDEN, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())
