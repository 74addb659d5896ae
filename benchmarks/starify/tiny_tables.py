"""Tables of `tiny_models`: sizes by the names of fields, and what single families need."""

from collections.abc import Callable
from typing import Any

#: pattern of a field's name -> its largest value; the first that matches decides. Lists of one
#: size a stage are divided so that their least is that
SIZES: list[tuple[str, int]] = [
    (r".*(token_id|token_index|_id|_idx|num_labels)", 10**12),
    (r".*vocab_size.*|n_tokens|.*vocab_size_base|codebook_vocab_size", 128),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_dense_layers|mlp_only_layers", 0),
    (r"first_k_dense_replace", 1),
    (r"num_feat_extract_layers|layer_list_out_channels|stage_.*|acoustic_tokenizer_chunk_size", 10**12),
    (r"conv_dim", 32),
    (r"depths|.*num_blocks|num_res_blocks", 1),
    (r".*(num_hidden_layers|num_layers|_layers|_layer|_depth)|depth|layers|n_layers?|num_blocks", 2),
    (r"hidden_size_per_layer_input", 8),
    (r".*(kv_heads|key_value_heads|num_key_heads|n_kv_head|kv_n_heads)", 2),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r".*(num_attention_heads|attention_heads|num_heads|n_heads?|_heads|mamba_n_heads)", 4),
    (r"qk_head_dim", 32),
    (r".*(head_dim|d_kv|d_head|dim_head|head_dim.*)|kv_channels|rotary_dim", 16),
    (r".*lora_rank|laurel_rank", 16),
    (r"moe_intermediate_size|.*expert.*intermediate_size|.*expert_dim", 48),
    (r".*(intermediate.*size|ffn_dim|ffn_hidden_size|mlp_dim|d_ff|dff|d_inner|linear_units|dim_ff|dim_feedforward|feedforward_dim|mlp_hidden_size|intermediate_dim)", 96),
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
    (r".*(hidden_size|hidden_sizes|hidden_dim|d_model|n_embd|embed_dim|embed_dims|embedding_size|embedding_dim|emb_dim|projection_dim|projection_size|projector_hidden_size|condition_dim|output_dim|out_hidden_size|project_dim|output_size|proj_size|proj_dim|channels_list|decoder_dim|proj_codevector_dim|codevector_dim|fpn_hidden_size|output_channels|_in_channels)|dim|channels|hidden_channels|backbone_channel_list|embed_dim_per_stage|tdnn_dim|d_embed|neck_hidden_sizes|width", 64),
]
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
    "swin": {"num_heads": [2, 2, 4, 4]},
    "swinv2": {"num_heads": [2, 2, 4, 4]},
    "donut-swin": {"num_heads": [2, 2, 4, 4]},
    "maskformer-swin": {"num_heads": [2, 2, 4, 4]},
    "bit": {"num_groups": 8},
    "bailing_hybrid": {"linear_head_dim": 16, "n_group": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
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
    "zamba": {"num_hidden_layers": 6},
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
#: model type -> how strong the noise on its parameters is, where the usual one is too strong
NOISE: dict[str, float] = {}
#: model type -> input, made from its config
INPUTS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {}
