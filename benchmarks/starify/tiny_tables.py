"""Tables of `tiny_models`: sizes by the names of fields, and what single families need."""

from collections.abc import Callable
from typing import Any

import torch

#: pattern of a field's name -> its largest value; the first that matches decides. Lists of one
#: size a stage are divided so that their least is that
SIZES: list[tuple[str, int]] = [
    (r".*(token_id|token_index|_id|_idx|num_labels)", 10**12),
    (r".*vocab_size.*|n_tokens|.*vocab_size_base|codebook_vocab_size", 128),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_dense_layers|mlp_only_layers", 0),
    (r"first_k_dense_replace", 1),
    (
        r"num_feat_extract_layers|layer_list_out_channels|stage_.*|acoustic_tokenizer_chunk_size",
        10**12,
    ),
    (r"conv_dim", 32),
    (r"depths|.*num_blocks|num_res_blocks", 1),
    (
        r".*(num_hidden_layers|num_layers|_layers|_layer|_depth)|depth|layers|n_layers?|num_blocks",
        2,
    ),
    (r"hidden_size_per_layer_input|ple_embed_dim", 8),
    (r".*(kv_heads|key_value_heads|num_key_heads|n_kv_head|kv_n_heads)", 2),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r".*(num_attention_heads|attention_heads|num_heads|n_heads?|_heads|mamba_n_heads)", 4),
    (r"qk_head_dim", 32),
    (r".*(head_dim|d_kv|d_head|dim_head|head_dim.*)|kv_channels|rotary_dim", 16),
    (r".*lora_rank|laurel_rank", 16),
    (
        r"moe_intermediate_size|.*expert.*intermediate_size|.*expert_dim|intermediate_size_moe|moe_hidden_size",
        80,
    ),
    (
        r".*(intermediate.*size|ffn_dim|ffn_hidden_size|mlp_dim|d_ff|dff|d_inner|linear_units|dim_ff|dim_feedforward|feedforward_dim|mlp_hidden_size|intermediate_dim)",
        96,
    ),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r".*(experts_per_tok|experts_per_token|moe_topk|moe_top_k|moe_k|topk_group)", 2),
    (r"topk_group", 1),
    (r"n_group", 2),
    (r".*(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_expert)", 4),
    (r".*max_position_embeddings|n_positions|n_ctx|max_seq_len|max_source_positions", 512),
    (r".*(state_size|ssm_state_size|d_state)", 8),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"mamba_n_groups|n_groups", 1),
    (r".*chunk_size", 16),
    (r".*image_size|img_size|pretrain_image_size|input_size|resolution", 64),
    (r"num_queries|num_denoising|.*num_latents|num_query_tokens", 8),
    (r".*codebook_size|num_embeddings", 64),
    (
        r".*(hidden_size|hidden_sizes|hidden_dim|d_model|n_embd|embed_dim|embed_dims|embedding_size|embedding_dim|emb_dim|projection_dim|projection_size|projector_hidden_size|condition_dim|output_dim|out_hidden_size|project_dim|output_size|proj_size|proj_dim|channels_list|decoder_dim|proj_codevector_dim|codevector_dim|fpn_hidden_size|output_channels|_in_channels)|dim|channels|hidden_channels|backbone_channel_list|embed_dim_per_stage|tdnn_dim|d_embed|neck_hidden_sizes|width",
        64,
    ),
]
#: model type -> why it is not tried
UNTRIED: dict[str, str] = {"tapas": "a forward takes more than 40 s at any width"}
#: model type -> class that is built, where the first of the tables is not the one to build
CLASSES: dict[str, str] = {
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForConditionalGeneration",
    "emu3": "Emu3ForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = ROPE | {"mrope_section": [4, 2, 2]}
HALF = ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
HEAD = {"head_dim": 16}
EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
LINEAR_FIRST = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
SWIN = {"num_heads": [2, 2, 4, 4], "window_size": 2, "embed_dim": 32}
#: backbone of detectors that would take one of timm's
RESNET = {
    "use_timm_backbone": False,
    "backbone": None,
    "backbone_kwargs": None,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage2", "stage3", "stage4"],
    },
}
#: model type -> fields of its config that differ from what SIZES makes of it
FIELDS: dict[str, dict[str, Any]] = {
    "recurrent_gemma": {"intermediate_size": 192},
    "nemotron": {"num_key_value_heads": 2},
    "ministral": HEAD,
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": HEAD,
    "hunyuan_vl_text": HEAD,
    "dots1": EXPERTS,
    "qwen2_vl_text": {"rope_parameters": MROPE},
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    "qwen2_5_omni_text": {"rope_parameters": MROPE},
    "paddleocr_vl_text": {"rope_parameters": MROPE},
    "glm4v_text": {"rope_parameters": MROPE},
    "glm4v_moe_text": {"rope_parameters": HALF},
    "glm_image_text": {"rope_parameters": MROPE},
    "glm_ocr_text": {"rope_parameters": MROPE},
    "mistral4": {"rope_parameters": ROPE, "head_dim": 32},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 2},
    "mamba2": {"num_heads": 8},
    "granitemoehybrid": LINEAR_FIRST | {"mamba_n_heads": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "swin": SWIN,
    "swinv2": SWIN,
    "donut-swin": SWIN,
    "maskformer-swin": SWIN,
    "clap_audio_model": {"num_attention_heads": [2, 2, 4, 4]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    "align_vision_model": {"width_coefficient": 0.25, "depth_coefficient": 0.1},
    "mobilevit": {
        "hidden_sizes": [48, 64, 80],
        "neck_hidden_sizes": [8, 8, 16, 24, 32, 40, 64],
    },
    "zamba2": {
        "num_hidden_layers": 13,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
    },
    "perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "hgnet_v2": {"hidden_sizes": [256, 512, 1024, 2048]},
    "bridgetower_vision_model": {"hidden_size": 64, "num_attention_heads": 4},
    "udop": {"num_heads": 4},
    "bit": {"num_groups": 8},
    "bailing_hybrid": {"linear_head_dim": 16, "n_group": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "esmc": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "glm5_next_text": {"num_key_value_heads": 4},
    "lilt": {"max_2d_position_embeddings": 1024, "hidden_size": 96},
    "xmod": {"default_language": "en_XX"},
    "wav2vec2-bert": {"vocab_size": 128},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "mobilebert": {"embedding_size": 64, "true_hidden_size": 64, "intra_bottleneck_size": 64},
    "gemma3n_text": {"laurel_rank": 8, "vocab_size_per_layer_input": 128},
    "siglip2_vision_model": {"num_patches": 16, "patch_size": 8},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "qk_dim_factor": 0.5},
    "zamba": {"num_hidden_layers": 12, "attention_hidden_size": 128, "attention_head_dim": 32},
    "detr": RESNET,
    "conditional_detr": RESNET,
    "dab-detr": RESNET,
    "deformable_detr": RESNET,
    "table-transformer": RESNET,
    "autoformer": {"prediction_length": 4, "context_length": 8},
    "informer": {"prediction_length": 4, "context_length": 8},
    "time_series_transformer": {"prediction_length": 4, "context_length": 8},
    "reformer": {
        "hidden_size": 64,
        "axial_pos_embds_dim": [16, 48],
        "axial_pos_shape": [4, 4],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "is_decoder": False,
    },
    "funnel": {"block_sizes": [1, 1, 1]},
}


def _patches(config: Any, generator: torch.Generator) -> dict[str, Any]:
    vision = getattr(config, "vision_config", config)
    channels = vision.num_channels * vision.patch_size**2
    return {
        "pixel_values": torch.randn(1, 16, channels, generator=generator),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }


def _codebooks(config: Any, generator: torch.Generator) -> dict[str, Any]:
    rows = 2 * config.decoder.num_codebooks
    return {
        "input_ids": torch.randint(5, 90, (2, 12), generator=generator),
        "decoder_input_ids": torch.randint(5, 60, (rows, 6), generator=generator),
    }


def _series(config: Any, generator: torch.Generator) -> dict[str, Any]:
    past = config.context_length + max(config.lags_sequence)
    values = torch.randn(2, past, generator=generator)
    return {
        "past_values": values,
        "past_time_features": torch.zeros(2, past, config.num_time_features),
        "past_observed_mask": torch.ones(2, past),
        "future_values": values[:, : config.prediction_length],
        "future_time_features": torch.zeros(2, config.prediction_length, config.num_time_features),
    }


def _patched_series(config: Any, generator: torch.Generator) -> dict[str, Any]:
    shape = 2, config.context_length, config.num_input_channels
    return {"past_values": torch.randn(shape, generator=generator)}


def _queries(config: Any, generator: torch.Generator) -> dict[str, Any]:
    return {
        "query_embeds": torch.randn(1, 8, config.hidden_size, generator=generator),
        "encoder_hidden_states": torch.randn(1, 6, config.encoder_hidden_size, generator=generator),
    }


def _audio(name: str, length: int) -> Callable[[Any, torch.Generator], dict[str, Any]]:
    def make(config: Any, generator: torch.Generator) -> dict[str, Any]:
        size = getattr(config, "input_feat_per_channel", None) or config.num_mel_bins
        return {
            name: torch.randn(1, length, size, generator=generator),
            "decoder_input_ids": torch.tensor([[2, 5, 6, 7]]),
        }

    return make


def _values_and_text(config: Any, generator: torch.Generator) -> dict[str, Any]:
    return {
        "input_values": torch.randn(1, 4000, generator=generator),
        "decoder_input_ids": torch.tensor([[2, 5, 6, 7]]),
    }


def _regions(config: Any, generator: torch.Generator) -> dict[str, Any]:
    return {
        "input_ids": torch.randint(5, 90, (2, 12), generator=generator),
        "visual_feats": torch.randn(2, 4, config.visual_feat_dim, generator=generator),
        "visual_pos": torch.rand(2, 4, config.visual_pos_dim, generator=generator),
    }


def _text_and_picture(config: Any, generator: torch.Generator) -> dict[str, Any]:
    vision = getattr(config, "vision_config", config)
    size = vision.image_size
    return {
        "input_ids": torch.randint(5, 90, (1, 12), generator=generator),
        "attention_mask": torch.ones(1, 12, dtype=torch.long),
        "pixel_values": torch.randn(1, 3, size, size, generator=generator),
    }


#: model type -> input, made from its config, where the usual ones do not fit
INPUTS: dict[str, Callable[[Any, torch.Generator], dict[str, Any]]] = {
    "siglip2": _patches,
    "siglip2_vision_model": _patches,
    "musicgen": _codebooks,
    "musicgen_melody": _codebooks,
    "autoformer": _series,
    "informer": _series,
    "time_series_transformer": _series,
    "patchtst": _patched_series,
    "patchtsmixer": _patched_series,
    "blip_2_qformer": _queries,
    "speech_to_text": _audio("input_features", 64),
    "moonshine": _values_and_text,
    "lxmert": _regions,
    "vilt": _text_and_picture,
    "bridgetower": _text_and_picture,
}

#: model types that cannot be built this small or run on no input that is tried; the records of the
#: study have the reasons
NOT_BUILT = frozenset(
    """
    align apertus1p5 audioflamingo3_encoder autoformer bark blip-2 blt canary chameleon chmv2
    clap clvp cohere_asr conditional_detr csm cvt d_fine dab-detr decision_transformer
    deepseek_ocr2 deformable_detr deimv2 depth_anything depth_pro detr diffusion_gemma dinat
    dots3_note dots3_note_text dpt edgetam edgetam_video edgetam_vision_model efficientloftr
    emu3 ernie4_5_vl_moe fast_vlm fun_asr_nano fun_asr_nano_encoder gemma3n gemma3n_audio
    gemma3n_vision gemma4_assistant gemma4_audio gemma4_unified_assistant gemma4_vision
    glm_image_vqmodel granite4_vision granite_speech5_ctc granite_speech5_encoder grounding-dino
    higgs_audio_v2_tokenizer hunyuan_vl hunyuan_vl_text idefics inkling2_vision instructblip
    instructblipvideo janus kosmos-2 kyutai_speech_to_text layoutlmv2 lightglue llama4 lw_detr
    mask2former maskformer mimi mimi_decoder minicpm_ocr_vision minicpmv4_7_vision mistral4
    mm-grounding-dino molmo2 moonshine_streaming muse_glimmer_assistant muse_glimmer_vision
    muse_spark muse_spark_audio muse_spark_vision nemo_speechlm nemotron_h_omni neucodec
    omdet-turbo oneformer paligemma pe_audio_video pe_audio_video_encoder pe_video
    pe_video_encoder perception_lm pi0 pix2struct pocket_tts_audio_tokenizer
    pocket_tts_audio_tokenizer_decoder pp_doclayout_v2 pp_doclayout_v3 pp_doclayout_v4
    pp_ocrv5_mobile_det pp_ocrv5_server_det pp_ocrv6_medium_det pp_ocrv6_small_det
    prompt_depth_anything qwen2_5_omni qwen3_asr_encoder qwen3_omni_moe qwen4_exp qwen4_exp_text
    rt_detr rt_detr_v2 sam sam2 sam2_video sam3 sam3_lite_text sam3_tracker sam3_tracker_video
    sam3_video sam_hq sapiens2 seggpt shieldgemma2 step3p7 t5gemma2_encoder table-transformer
    tapas timesfm timesfm2_5 timm_backbone timm_wrapper tipsv2_dpt tvp udop upernet uvdoc
    vibevoice vibevoice_acoustic_tokenizer vibevoice_acoustic_tokenizer_decoder
    vibevoice_acoustic_tokenizer_encoder vibevoice_asr voxtral_realtime voxtral_realtime_text
    wav2vec2-conformer wavtokenizer wavtokenizer_encoder xcodec xcodec2 xlstm zoedepth
    """.split()  # noqa: SIM905
)
