"""Tiny configurations of every decoder and image-text type that the installed transformers knows.

A configuration is shrunk by the names of its fields, sub-configurations included; what a type needs beyond that stands
in `MORE`. `config(kind)` builds one, `model(kind)` a random model; `UNBUILT` lists what cannot be built, and why.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

CAUSAL, IMAGES = "AutoModelForCausalLM", "AutoModelForImageTextToText"
VOCABULARY = 160
TOKENS = 8
HIDDEN = 32

SIZES: tuple[tuple[str, int], ...] = (
    (r"(unpadded_)?(text_)?(decoder_)?vocab_size|vocab_size_per_layer_input|audio_vocab_size", VOCABULARY),
    (r"(num_)?(hidden_|encoder_|decoder_|conf_num_hidden_)?layers|n_layers?|num_hidden_layers|depth", 4),
    (r"num_layers|num_(encoder|decoder)_layers|decoder_num_layers", 4),
    (r"(num_|n_)?(encoder_|decoder_)?(attention_)?heads?|n_head|num_(encoder|decoder)_attention_heads", 4),
    (r"(swa_)?num_attention_heads|conf_num_attention_heads|num_sliding_attention_heads|linear_num_value_heads", 4),
    (r"(swa_)?(num_)?(key_value|kv)_heads|kv_n_heads|linear_num_key_heads|num_query_groups", 2),
    (r"(hidden_|n_|d_|embed_|emb_)?(size|embd|model|dim)|hidden_dim|embedding_(size|dim)|word_embed_proj_dim", HIDDEN),
    (r"hidden_size|(text|encoder|decoder|vision|projector|backbone|attention|downsample)_hidden_size", HIDDEN),
    (r"(out|output|projection|merged|patch_embed)_hidden_size|projection_(hidden_)?(dim|size)|out_hidden_size", HIDDEN),
    (
        r"(shared_|expert_)?intermediate_size(_mlp)?|ffn_dim|(encoder|decoder)_ffn_dim|n_inner|d_ff|dff|dim_ff|mlp_dim",
        48,
    ),
    (r"ffn_hidden_size|dense_intermediate_size|feed_forward_size|decoder_intermediate_size", 48),
    (r"(moe|shared_expert|shared_experts|moe_shared_expert)_intermediate_size|expert_ffn_hidden_size", 16),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"(swa_|linear_|index_|attention_|mamba_)?head_dim|linear_(key|value)_head_dim|d_head|kv_channels|d_kv", 8),
    (r"v_head_dim|qk_nope_head_dim|qk_rope_head_dim|q_lora_rank|kv_lora_rank|o_lora_rank|rotary_dim", 8),
    (r"qk_head_dim", 16),
    (r"max_position_embeddings|n_positions|n_ctx|max_sequence_length|model_max_length|context_length", 128),
    (r"original_max_position_embeddings|max_seq_len|max_target_positions|max_source_positions", 128),
    (r"image_size", 28),
    (r"patch_size", 14),
    (r"base_channels|adapter_(in|out)_dim|adapter_(input|output)_size", HIDDEN),
    (r"encoder_hash_byte_group_vocab", 50),
    (r"query_pre_attn_scalar", 8),
    (r"index_topk", 4),
    (r"zero_expert_num", 1),
)
"""Patterns of field names (whole), and what a field of that name becomes; the first that fits counts."""

MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
"""Rotary positions of three axes, for heads of 8."""
GEMMA4 = {"hidden_size_per_layer_input": 8, "global_head_dim": 8}
PIXELS = {"num_hidden_layers": 2, "depth": 2}
TOKENS_OF_IMAGES = {"<image>": 120, "<|extra_200|>": 121, "IMGIMGA": 122}

CLIP = {"model_type": "clip_vision_model", "num_hidden_layers": 2}
WINDOWS = {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2}

MORE: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2, "first_k_dense_replace": 1},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1, 3]},
    "chameleon": {"vocabulary_map": TOKENS_OF_IMAGES},
    "cosmos3_edge_text": MROPE,
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "emu3": {"vocabulary_map": TOKENS_OF_IMAGES},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 4},
    "gemma4_text": GEMMA4,
    "glm46v": {"text_config": MROPE},
    "glm4v_text": MROPE,
    "glm4v_moe_text": MROPE | {"partial_rotary_factor": 1.0},
    "glm_ocr_text": MROPE,
    "glmga_text": MROPE,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "hy_v4_vl_text": MROPE,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
    },
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl_text": MROPE,
    "qwen2_5_omni_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 2,
        "attention_head_size": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "musicgen": {},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": MROPE["rope_parameters"]}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "moe_intermediate_size": [16, 16],
    },
    "fast_vlm": {"vision_config": CLIP},
    "gemma3n": {"vision_config": CLIP},
    "perception_lm": {"vision_config": CLIP},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 4}},
    "hunyuan_vl_text": {"head_dim": 8, **MROPE},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 8,
        "attention_hidden_size": 64,
    },
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "blip-2": {"image_token_index": 159, "num_query_tokens": 2},
    "blt": {
        "num_hidden_layers": 4,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 16, "hidden_size": 32, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "swa_qk_rope_head_dim": 8,
        "shared_experts_intermediate_size": 16,
        "index_head_dim": 8,
        "index_n_heads": 2,
    },
    "instructblip": {"image_token_index": 159, "num_query_tokens": 2},
    "instructblipvideo": {"video_token_index": 159, "num_query_tokens": 2},
    "step3p5": {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "xlstm": {"qk_dim_factor": 2.0, "v_dim_factor": 2.0, "mode": "train", "chunk_size": 8},
    "florence_vision": {
        "depths": (1, 1, 1, 1),
        "embed_dim": (8, 8, 8, 32),
        "num_heads": (2,) * 4,
        "num_groups": (2,) * 4,
    },
    "granite4_vision": {
        "downsample_rate": "1/2",
        "spatial_target_layers": [0],
        "deepstack_layer_map": [(0, 0)],
        "vision_config": {"hidden_size": 64},
    },
    "kosmos-2": {"latent_query_num": 2},
    "muse_spark_audio": {"hidden_sizes": (32,) * 4, "depths": (1,) * 4},
    "mistral4": {"head_dim": 16},
    "apertus1p5": {
        "vision_config": {"codebook_size": 16},
        "audio_config": {"codebook_size": 16, "codebook_dim": 32},
        "image_token_offset": 100,
        "audio_token_offset": 116,
    },
    "dots3_note": {"vision_config": {"per_layer_config": {}, "mlp_layer_types": ["dense", "sparse"] * 2}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 4,
    },
    "glm5_next_text": {"qk_rope_head_dim": 0, "index_kpool": 2},
    "falcon_h1": {"mamba_chunk_size": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "index_topk": 2,
    },
}
"""Type -> further fields of its configuration."""

NEEDED = ("hidden_size_per_layer_input", "vocabulary_map", "text_config")
"""Fields without which a usual configuration of its class is refused."""

Inputs = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def _pixels(*shape: int, **more: torch.Tensor) -> Inputs:
    return lambda ids: {"pixel_values": torch.linspace(-1, 1, 3 * 28 * 28).view(*shape, 3, 28, 28), **more}


def _with_tokens(pixels: Inputs, token: int) -> Inputs:
    """Two ids of the text are places of the picture."""

    def made(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        placed = ids.clone()
        placed[:, :2] = token
        return {"input_ids": placed, **pixels(ids)}

    return made


def _beside(name: str) -> Inputs:
    """Hidden states of an encoder."""
    return lambda ids: {name: torch.linspace(-1, 1, 4 * HIDDEN).view(1, 4, HIDDEN)}


CROSS = "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart".split()
CROSS += "prophetnet trocr".split()
"""Decoders that attend to an encoder, if they are given its states."""

INPUTS: dict[str, Inputs] = {
    **{kind: _beside("encoder_hidden_states") for kind in CROSS},
    "whisper": lambda ids: {"encoder_outputs": (_beside("states")(ids)["states"],)},
    "mllama": _beside("cross_attention_states"),
    "blip": _pixels(1),
    "blip-2": _with_tokens(_pixels(1), 159),
    "idefics": lambda ids: {**_pixels(1, 1)(ids), "image_attention_mask": torch.ones(*ids.shape, 1)},
    "instructblip": lambda ids: {**_with_tokens(_pixels(1), 159)(ids), "qformer_input_ids": ids},
    "instructblipvideo": lambda ids: {**_with_tokens(_pixels(1, 1), 159)(ids), "qformer_input_ids": ids},
    "kosmos-2": lambda ids: {**_pixels(1)(ids), "image_embeds_position_mask": torch.arange(ids.shape[1])[None] < 2},
    "musicgen": lambda ids: {"input_ids": ids.repeat(4, 1), **_beside("encoder_hidden_states")(ids)},
    "musicgen_melody": lambda ids: {"input_ids": ids.repeat(4, 1), **_beside("encoder_hidden_states")(ids)},
    "pix2struct": lambda ids: {"flattened_patches": torch.ones(1, 4, 34), "decoder_input_ids": ids},
    "pp_formulanet": lambda ids: {**_pixels(1)(ids), "decoder_input_ids": ids},
    "t5gemma2": lambda ids: {"decoder_input_ids": ids},
    "florence2": lambda ids: {"decoder_input_ids": ids},
    "udop": lambda ids: {"bbox": torch.rand(1, ids.shape[1], 4), "decoder_input_ids": ids},
    "vision-encoder-decoder": lambda ids: {**_pixels(1)(ids), "decoder_input_ids": ids},
}
"""What types need beside ids."""

WITHOUT_TIMM = "its vision tower is timm's, which is not installed"
UNBUILT: dict[str, str] = {
    "evolla": "reads proteins, not images",
    "gemma3n": WITHOUT_TIMM,
    "gemma4_assistant": "drafts on another model's hidden states and keys: a forward takes no ids alone",
    "gemma4_unified_assistant": "drafts on another model's hidden states and keys: a forward takes no ids alone",
    "llama4": "its forward reads an output that its language model does not have (image_outputs)",
    "perception_lm": WITHOUT_TIMM,
    "pi0": "predicts the actions of a robot: it has no logits",
}
"""Types that cannot be built here, and why."""


def size(name: str) -> int | None:
    """What a field of this name becomes; None: it stays."""
    return next((value for pattern, value in SIZES if re.fullmatch(pattern, name)), None)


def shrunk(kind: type, **more: Any) -> Any:
    """A configuration of this class with small fields, those of sub-configurations included, and `more` of its own."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    usual = kind(**{k: v for k, v in more.items() if k in NEEDED})
    fields: dict[str, Any] = {}
    tokens = 0
    for name, value in vars(usual).items():
        if isinstance(value, PreTrainedConfig):
            inner = dict(more.get(name, {}))
            part = CONFIG_MAPPING[inner.pop("model_type")] if "model_type" in inner else type(value)
            fields[name] = shrunk(part, **{**MORE.get(part.model_type, {}), **inner})
        elif isinstance(value, bool):
            continue
        elif (
            isinstance(value, int) and re.search(r"(_token_id|_token_index|_index|_id)$", name) and value >= VOCABULARY
        ):
            tokens += 1
            fields[name] = VOCABULARY - tokens
        elif isinstance(value, int) and (small := size(name)) is not None:
            fields[name] = small
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:  # latent attention: a key/value head a query head
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    return kind(**{**fields, **{k: v for k, v in more.items() if not isinstance(fields.get(k), PreTrainedConfig)}})


def config(kind: str) -> Any:
    """The tiny configuration of a `model_type`."""
    from transformers import CONFIG_MAPPING

    return shrunk(CONFIG_MAPPING[kind], **MORE.get(kind, {}))


def why_not(kind: str, auto: str) -> str | None:
    """Why a type is not built; None if it is."""
    return None if kind == "llama4" and auto == CAUSAL else UNBUILT.get(kind)


def kinds() -> list[tuple[str, str]]:
    """(type, auto class) of every decoder and image-text model that the installed transformers lists."""
    from transformers.models.auto import modeling_auto as auto

    causal, images = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return [(kind, CAUSAL) for kind in sorted(causal)] + [(kind, IMAGES) for kind in sorted(images)]


def model(kind: str, auto: str) -> Any:
    """A random model of a type, with weights large enough that mistakes show."""
    import transformers
    from transformers.models.auto import modeling_auto

    names = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if auto == CAUSAL
        else (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    )
    name = names[kind]
    wanted = getattr(transformers, name if isinstance(name, str) else name[0])
    whole = config(kind)
    torch.manual_seed(0)
    parts = [whole, *(getattr(whole, k) for k in whole.sub_configs)] if auto == CAUSAL else [whole]
    made = wanted(next((c for c in parts if isinstance(c, wanted.config_class)), whole)).eval()
    for p in made.parameters():
        p.data.add_(0.1 * torch.randn_like(p)) if p.dim() == 1 else p.data.normal_(std=0.15)
    return made


def inputs(kind: str, auto: str, rows: int = 1) -> dict[str, torch.Tensor]:
    """What a forward of this type needs: ids, and pictures where it does not go without."""
    ids = torch.randint(3, 90, (rows, TOKENS), generator=torch.Generator().manual_seed(3))
    more = INPUTS[kind](ids) if kind in INPUTS else {}
    return {"input_ids": ids, **more}


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T, V) of one forward."""
    out = model(**inputs)
    return out[0] if isinstance(out, tuple) else out.logits
