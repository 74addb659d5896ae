"""Tiny models with MLPs, from configurations alone, one of each architecture worth trying."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.convnext import ConvNeXt as TorchvisionConvNeXt
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT
from transformers import AutoConfig, AutoModel

Inputs = dict[str, Tensor]

VOCAB = 99
BATCH = 2
LENGTH = 12
WIDTH = 32
HIDDEN = 64
DEPTH = 2
HEADS = 4
DROPOUT = 0.1
IMAGE = 32
OUTPUTS = ("last_hidden_state", "encoder_last_hidden_state", "image_embeds", "text_embeds")


@dataclass(frozen=True)
class Architecture:
    """A model to build, what to call it with, and how many MLPs it has.

    `kind` is "plain" (up, activation, down), "gated" (gate, up, down) or "packed" (gate and up in
    one projection of twice the width).
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Inputs]
    layers: int
    kind: str = "plain"
    bf16: bool = True


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's output as one tensor, flattened if there is more than one."""
    output = model(**inputs)
    if isinstance(output, Tensor):
        return output
    parts = [output[name] for name in OUTPUTS if output.get(name) is not None]
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """`make` with the same weights at every call, and none of them constant.

    Biases, norms and some heads start as zeros and ones, which would hide a bias that is lost or a
    layer that no longer reaches the output.
    """

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = make()
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return build


def noise(model: nn.Module, *shape: int, seed: int = 0) -> Tensor:
    parameter = next(model.parameters())
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(parameter.device, parameter.dtype)


def tokens(model: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
    return values.to(next(model.parameters()).device)


def text(model: nn.Module) -> Inputs:
    ids = tokens(model)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def text_pair(model: nn.Module) -> Inputs:
    return {**text(model), "decoder_input_ids": tokens(model, seed=1)}


def pixels(model: nn.Module) -> Inputs:
    return {"pixel_values": noise(model, BATCH, 3, IMAGE, IMAGE)}


def text_and_pixels(model: nn.Module) -> Inputs:
    return {**text(model), **pixels(model)}


def spectrogram(model: nn.Module) -> Inputs:
    features = noise(model, BATCH, 8, 2 * LENGTH)
    return {"input_features": features, "decoder_input_ids": tokens(model)}


def waveform(model: nn.Module) -> Inputs:
    return {"input_values": noise(model, BATCH, 400)}


def tensor(name: str, *shape: int) -> Callable[[nn.Module], Inputs]:
    return lambda model: {name: noise(model, *shape)}


def tensors(first: str, second: str, *shape: int) -> Callable[[nn.Module], Inputs]:
    return lambda model: {first: noise(model, *shape), second: noise(model, *shape, seed=1)}


image = tensor("x", BATCH, 3, IMAGE, IMAGE)

SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
}
TEXT = {**SPECIAL_TOKENS, "vocab_size": VOCAB, "max_position_embeddings": 64}
HF_DROPOUT = {"hidden_dropout_prob": DROPOUT, "attention_probs_dropout_prob": DROPOUT}
BERT = {**TEXT, **SIZES, **HF_DROPOUT}
LLAMA = {**TEXT, **SIZES, "num_key_value_heads": 2, "attention_dropout": DROPOUT}
GPT_NEOX = {**TEXT, **SIZES, "hidden_dropout": DROPOUT, "attention_dropout": DROPOUT}
BART = {
    **TEXT,
    "decoder_start_token_id": 2,
    "d_model": WIDTH,
    "encoder_layers": DEPTH,
    "decoder_layers": DEPTH,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
    "dropout": DROPOUT,
    "attention_dropout": DROPOUT,
    "activation_dropout": DROPOUT,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
T5 = {
    **SPECIAL_TOKENS,
    "decoder_start_token_id": 2,
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": WIDTH // HEADS,
    "d_ff": HIDDEN,
    "num_layers": DEPTH,
    "num_decoder_layers": DEPTH,
    "num_heads": HEADS,
    "dropout_rate": DROPOUT,
}
VIT = {**SIZES, **HF_DROPOUT, "image_size": IMAGE, "patch_size": 8}
DINO = {**VIT, "mlp_ratio": HIDDEN // WIDTH, "layerscale_value": 1.0, "drop_path_rate": DROPOUT}
SWIN = {
    "patch_size": 4,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
    "mlp_ratio": 2.0,
}


def hf(
    model_type: str,
    inputs: Callable[[nn.Module], Inputs],
    options: dict[str, Any],
    *,
    name: str = "",
    layers: int = DEPTH,
    kind: str = "plain",
    **more: Any,
) -> Architecture:
    """An architecture of transformers, found by its model type."""

    def make() -> nn.Module:
        return AutoModel.from_config(AutoConfig.for_model(model_type, **{**options, **more}))

    return Architecture(name or model_type, seeded(make), inputs, layers, kind)


def torch_encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, DROPOUT, **options)
    return nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)


def torch_decoder(**options: Any) -> nn.Module:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, DROPOUT, **options)
    return nn.TransformerDecoder(layer, DEPTH)


def torch_sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))


def plain(
    name: str,
    make: Callable[..., nn.Module],
    inputs: Callable[[nn.Module], Inputs],
    layers: int = DEPTH,
    **options: Any,
) -> Architecture:
    """An architecture from anything that makes a module out of options."""
    return Architecture(name, seeded(lambda: make(**options)), inputs, layers)


ENCODERS = (
    hf("bert", text, BERT),
    hf("bert", text, BERT, name="bert-chunked", chunk_size_feed_forward=4),
    hf("roberta", text, BERT),
    hf("xlm-roberta", text, BERT),
    hf("bert-generation", text, BERT),
    hf("electra", text, BERT, embedding_size=16),
    hf("deberta-v2", text, BERT, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    hf(
        "distilbert",
        text,
        TEXT,
        dim=WIDTH,
        hidden_dim=HIDDEN,
        n_layers=DEPTH,
        n_heads=HEADS,
        dropout=DROPOUT,
        attention_dropout=DROPOUT,
    ),
    hf(
        "modernbert",
        text,
        {**TEXT, **SIZES},
        kind="packed",
        mlp_dropout=DROPOUT,
        embedding_dropout=DROPOUT,
        attention_dropout=DROPOUT,
        mlp_bias=True,
        local_attention=8,
        cls_token_id=1,
        sep_token_id=2,
    ),
)
DECODERS = (
    hf(
        "gpt2",
        text,
        SPECIAL_TOKENS,
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=WIDTH,
        n_layer=DEPTH,
        n_head=HEADS,
        n_inner=HIDDEN,
        resid_pdrop=DROPOUT,
        embd_pdrop=DROPOUT,
        attn_pdrop=DROPOUT,
    ),
    hf(
        "opt",
        text,
        TEXT,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=HIDDEN,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        dropout=DROPOUT,
        attention_dropout=DROPOUT,
        layerdrop=0.0,
    ),
    hf("gpt_neox", text, GPT_NEOX),
    hf("phi", text, LLAMA, resid_pdrop=DROPOUT, embd_pdrop=DROPOUT),
    hf("falcon", text, GPT_NEOX, ffn_hidden_size=HIDDEN, bias=True),
    hf("llama", text, LLAMA, kind="gated", mlp_bias=True),
    hf("mistral", text, LLAMA, kind="gated"),
    hf("qwen3", text, LLAMA, kind="gated", head_dim=8),
    hf(
        "gemma3_text",
        text,
        LLAMA,
        name="gemma3",
        kind="gated",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    hf("phi3", text, LLAMA, kind="packed", resid_pdrop=DROPOUT, embd_pdrop=DROPOUT),
)
ENCODER_DECODERS = (
    hf("bart", text_pair, BART, layers=2 * DEPTH),
    hf("mbart", text_pair, BART, layers=2 * DEPTH),
    hf("pegasus", text_pair, BART, layers=2 * DEPTH, activation_function="relu"),
    hf("marian", text_pair, BART, layers=2 * DEPTH, activation_function="swish"),
    hf("m2m_100", text_pair, BART, layers=2 * DEPTH),
    hf("t5", text_pair, T5, layers=2 * DEPTH, feed_forward_proj="relu"),
    hf(
        "t5",
        text_pair,
        T5,
        name="t5-gated",
        layers=2 * DEPTH,
        kind="gated",
        feed_forward_proj="gated-gelu",
    ),
    hf(
        "whisper",
        spectrogram,
        BART,
        layers=2 * DEPTH,
        num_mel_bins=8,
        max_source_positions=LENGTH,
        max_target_positions=2 * LENGTH,
    ),
)
VISION_AND_SPEECH = (
    hf("vit", pixels, VIT),
    hf("deit", pixels, VIT),
    hf("beit", pixels, VIT, layer_scale_init_value=1.0, use_relative_position_bias=True),
    hf("dinov2", pixels, DINO),
    hf("dinov2", pixels, DINO, name="dinov2-swiglu", kind="gated", use_swiglu_ffn=True),
    hf(
        "swin",
        pixels,
        {**SWIN, **HF_DROPOUT},
        layers=4,
        image_size=IMAGE,
        drop_path_rate=DROPOUT,
    ),
    hf(
        "clip",
        text_and_pixels,
        {},
        layers=2 * DEPTH,
        projection_dim=16,
        text_config={**TEXT, **SIZES, "attention_dropout": DROPOUT},
        vision_config={**VIT, "attention_dropout": DROPOUT},
    ),
    hf(
        "wav2vec2",
        waveform,
        SIZES,
        conv_dim=(16, 16),
        conv_kernel=(8, 8),
        conv_stride=(4, 4),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        hidden_dropout=DROPOUT,
        activation_dropout=DROPOUT,
        attention_dropout=DROPOUT,
        layerdrop=0.0,
        apply_spec_augment=False,  # draws from numpy's generator
    ),
)
CLASSES = {"num_classes": 10}
TIMM_CONVNEXT = {
    **CLASSES,
    "depths": (1, 1, 1, 1),
    "dims": (16, 16, 32, 32),
    "ls_init_value": 1.0,
    "drop_rate": DROPOUT,
    "drop_path_rate": DROPOUT,
}
TIMM_DROPOUT = {"attn_drop_rate": DROPOUT, "proj_drop_rate": DROPOUT, "drop_path_rate": DROPOUT}
TIMM = (
    plain(
        "timm-vit",
        timm.models.VisionTransformer,
        image,
        img_size=IMAGE,
        patch_size=8,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=2.0,
        **TIMM_DROPOUT,
        **CLASSES,
    ),
    plain(
        "timm-swin",
        timm.models.SwinTransformer,
        image,
        4,
        img_size=IMAGE,
        **SWIN,
        **TIMM_DROPOUT,
        **CLASSES,
    ),
    plain("timm-convnext", timm.models.ConvNeXt, image, 4, **TIMM_CONVNEXT),
    plain("timm-convnext-conv", timm.models.ConvNeXt, image, 4, conv_mlp=True, **TIMM_CONVNEXT),
    plain(
        "timm-mixer",
        timm.models.MlpMixer,
        image,
        2 * DEPTH,
        img_size=IMAGE,
        patch_size=8,
        embed_dim=WIDTH,
        num_blocks=DEPTH,
        mlp_ratio=(1.0, 2.0),
        proj_drop_rate=DROPOUT,
        drop_path_rate=DROPOUT,
        **CLASSES,
    ),
)
TORCHVISION = (
    plain(
        "torchvision-vit",
        TorchvisionViT,
        image,
        image_size=IMAGE,
        patch_size=8,
        num_layers=DEPTH,
        num_heads=HEADS,
        hidden_dim=WIDTH,
        mlp_dim=HIDDEN,
        dropout=DROPOUT,
        attention_dropout=DROPOUT,
        **CLASSES,
    ),
    plain(
        "torchvision-swin",
        TorchvisionSwin,
        image,
        4,
        **{**SWIN, "patch_size": [4, 4], "window_size": [4, 4]},
        dropout=DROPOUT,
        attention_dropout=DROPOUT,
        stochastic_depth_prob=DROPOUT,
        **CLASSES,
    ),
    plain(
        "torchvision-convnext",
        TorchvisionConvNeXt,
        image,
        block_setting=[CNBlockConfig(16, WIDTH, 1), CNBlockConfig(WIDTH, None, 1)],
        layer_scale=1.0,
        stochastic_depth_prob=0.5,  # of two blocks and two images: less would seldom show
        **CLASSES,
    ),
)
SEQUENCE = (BATCH, LENGTH, WIDTH)
TORCH = (
    plain("torch-encoder", torch_encoder, tensor("src", *SEQUENCE), batch_first=True),
    plain(
        "torch-encoder-gelu",
        torch_encoder,
        tensor("src", *SEQUENCE),
        activation="gelu",
        norm_first=True,
    ),
    plain("torch-encoder-module", torch_encoder, tensor("src", *SEQUENCE), activation=nn.SiLU()),
    plain("torch-decoder", torch_decoder, tensors("tgt", "memory", *SEQUENCE), batch_first=True),
    # torch's copies of a decoder layer hold the module given and compute relu all the same
    plain(
        "torch-decoder-module",
        torch_decoder,
        tensors("tgt", "memory", *SEQUENCE),
        activation=nn.SiLU(),
        norm_first=True,
    ),
    plain(
        "torch-transformer",
        nn.Transformer,
        tensors("src", "tgt", *SEQUENCE),
        2 * DEPTH,
        d_model=WIDTH,
        nhead=HEADS,
        num_encoder_layers=DEPTH,
        num_decoder_layers=DEPTH,
        dim_feedforward=HIDDEN,
        dropout=DROPOUT,
        batch_first=True,
    ),
    plain("torch-sequential", torch_sequential, tensor("input", *SEQUENCE), 1),
)
ARCHITECTURES: tuple[Architecture, ...] = (
    *ENCODERS,
    *DECODERS,
    *ENCODER_DECODERS,
    *VISION_AND_SPEECH,
    *TIMM,
    *TORCHVISION,
    *TORCH,
)
