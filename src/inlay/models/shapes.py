"""Shapes of well-known decoders, to count them without a network: their public `config.json`, in a row each.

Every row carries the total that its authors publish; tests build the model on the meta device and compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """One known model: what `AutoConfig.for_model` needs, and what must come out."""

    model_type: str
    total: int
    """Parameters of the model, tied weights counted once."""
    hub: str
    """Where its weights are."""
    config: Mapping[str, Any] = field(default_factory=dict)


def _llama(
    total: int, hub: str, vocab: int, width: int, mlp: int, layers: int, heads: int, kv: int = 0, **more: Any
) -> Shape:
    kind = more.pop("model_type", "llama")
    config = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv or heads,
        "tie_word_embeddings": False,
        **more,
    }
    return Shape(kind, total, hub, config)


def _bloom(total: int, size: str, width: int, layers: int, heads: int) -> Shape:
    config = {"vocab_size": 250880, "hidden_size": width, "n_layer": layers, "n_head": heads}
    return Shape("bloom", total, f"bigscience/bloom-{size}", config)


def _neox(total: int, hub: str, vocab: int, width: int, layers: int, heads: int) -> Shape:
    config = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": False,
    }
    return Shape("gpt_neox", total, hub, config)


def _gpt2(total: int, hub: str, width: int, layers: int, heads: int) -> Shape:
    return Shape("gpt2", total, hub, {"vocab_size": 50257, "n_embd": width, "n_layer": layers, "n_head": heads})


def _opt(total: int, size: str, width: int, layers: int, heads: int, **more: Any) -> Shape:
    config = {
        "vocab_size": 50272,
        "hidden_size": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "word_embed_proj_dim": width,
        **more,
    }
    return Shape("opt", total, f"facebook/opt-{size}", config)


def _qwen2(total: int, size: str, *shape: int, tied: bool = False) -> Shape:
    vocab = 151936 if tied else 152064
    return _llama(total, f"Qwen/Qwen2.5-{size}", vocab, *shape, model_type="qwen2", tie_word_embeddings=tied)


def _qwen3(total: int, size: str, *shape: int, tied: bool = False) -> Shape:
    return _llama(
        total, f"Qwen/Qwen3-{size}", 151936, *shape, model_type="qwen3", head_dim=128, tie_word_embeddings=tied
    )


def _gemma(total: int, hub: str, *shape: int, model_type: str = "gemma") -> Shape:
    return _llama(total, hub, 256000, *shape, model_type=model_type, head_dim=256, tie_word_embeddings=True)


def _moe(kind: str, total: int, hub: str, vocab: int, *shape: int, **more: Any) -> Shape:
    return _llama(total, hub, vocab, *shape, model_type=kind, **more)


SHAPES: dict[str, Shape] = {
    "llama-7b": _llama(6_738_415_616, "huggyllama/llama-7b", 32000, 4096, 11008, 32, 32),
    "llama-13b": _llama(13_015_864_320, "huggyllama/llama-13b", 32000, 5120, 13824, 40, 40),
    "llama-30b": _llama(32_528_943_616, "huggyllama/llama-30b", 32000, 6656, 17920, 60, 52),
    "llama-65b": _llama(65_285_660_672, "huggyllama/llama-65b", 32000, 8192, 22016, 80, 64),
    "llama-2-7b": _llama(6_738_415_616, "meta-llama/Llama-2-7b-hf", 32000, 4096, 11008, 32, 32),
    "llama-2-13b": _llama(13_015_864_320, "meta-llama/Llama-2-13b-hf", 32000, 5120, 13824, 40, 40),
    "llama-2-70b": _llama(68_976_648_192, "meta-llama/Llama-2-70b-hf", 32000, 8192, 28672, 80, 64, 8),
    "llama-3-8b": _llama(8_030_261_248, "meta-llama/Meta-Llama-3-8B", 128256, 4096, 14336, 32, 32, 8),
    "llama-3-70b": _llama(70_553_706_496, "meta-llama/Meta-Llama-3-70B", 128256, 8192, 28672, 80, 64, 8),
    "llama-3.1-8b": _llama(8_030_261_248, "meta-llama/Llama-3.1-8B", 128256, 4096, 14336, 32, 32, 8),
    "llama-3.1-70b": _llama(70_553_706_496, "meta-llama/Llama-3.1-70B", 128256, 8192, 28672, 80, 64, 8),
    "llama-3.2-1b": _llama(
        1_235_814_400, "meta-llama/Llama-3.2-1B", 128256, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True
    ),
    "llama-3.2-3b": _llama(
        3_212_749_824, "meta-llama/Llama-3.2-3B", 128256, 3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True
    ),
    "tinyllama-1.1b": _llama(1_100_048_384, "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 32000, 2048, 5632, 22, 32, 4),
    "smollm2-135m": _llama(
        134_515_008, "HuggingFaceTB/SmolLM2-135M", 49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True
    ),
    "smollm2-360m": _llama(
        361_821_120, "HuggingFaceTB/SmolLM2-360M", 49152, 960, 2560, 32, 15, 5, tie_word_embeddings=True
    ),
    "smollm2-1.7b": _llama(
        1_711_376_384, "HuggingFaceTB/SmolLM2-1.7B", 49152, 2048, 8192, 24, 32, tie_word_embeddings=True
    ),
    "mistral-7b": _llama(
        7_241_732_096, "mistralai/Mistral-7B-v0.1", 32000, 4096, 14336, 32, 32, 8, model_type="mistral"
    ),
    "mistral-7b-v0.3": _llama(
        7_248_023_552, "mistralai/Mistral-7B-v0.3", 32768, 4096, 14336, 32, 32, 8, model_type="mistral"
    ),
    "qwen2.5-0.5b": _qwen2(494_032_768, "0.5B", 896, 4864, 24, 14, 2, tied=True),
    "qwen2.5-1.5b": _qwen2(1_543_714_304, "1.5B", 1536, 8960, 28, 12, 2, tied=True),
    "qwen2.5-3b": _qwen2(3_085_938_688, "3B", 2048, 11008, 36, 16, 2, tied=True),
    "qwen2.5-7b": _qwen2(7_615_616_512, "7B", 3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _qwen2(14_770_033_664, "14B", 5120, 13824, 48, 40, 8),
    "qwen2.5-32b": _qwen2(32_763_876_352, "32B", 5120, 27648, 64, 40, 8),
    "qwen2.5-72b": _qwen2(72_706_203_648, "72B", 8192, 29568, 80, 64, 8),
    "qwen3-0.6b": _qwen3(596_049_920, "0.6B", 1024, 3072, 28, 16, 8, tied=True),
    "qwen3-1.7b": _qwen3(1_720_574_976, "1.7B", 2048, 6144, 28, 16, 8, tied=True),
    "qwen3-4b": _qwen3(4_022_468_096, "4B", 2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8b": _qwen3(8_190_735_360, "8B", 4096, 12288, 36, 32, 8),
    "qwen3-14b": _qwen3(14_768_307_200, "14B", 5120, 17408, 40, 40, 8),
    "qwen3-32b": _qwen3(32_762_123_264, "32B", 5120, 25600, 64, 64, 8),
    "gemma-2b": _gemma(2_506_172_416, "google/gemma-2b", 2048, 16384, 18, 8, 1),
    "gemma-7b": _gemma(8_537_680_896, "google/gemma-7b", 3072, 24576, 28, 16, 16),
    "gemma-2-2b": _gemma(2_614_341_888, "google/gemma-2-2b", 2304, 9216, 26, 8, 4, model_type="gemma2"),
    "gemma-2-9b": _gemma(9_241_705_984, "google/gemma-2-9b", 3584, 14336, 42, 16, 8, model_type="gemma2"),
    "phi-3-mini": _llama(
        3_821_079_552, "microsoft/Phi-3-mini-4k-instruct", 32064, 3072, 8192, 32, 32, model_type="phi3",
        pad_token_id=32000
    ),
    "phi-3-medium": _llama(
        13_960_238_080, "microsoft/Phi-3-medium-4k-instruct", 32064, 5120, 17920, 40, 40, 10, model_type="phi3",
        pad_token_id=32000,
    ),
    "gpt-j-6b": Shape(
        "gptj", 6_050_882_784, "EleutherAI/gpt-j-6b",
        {"vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64,
        "tie_word_embeddings": False},
    ),
    "bloom-560m": _bloom(559_214_592, "560m", 1024, 24, 16),
    "bloom-1b1": _bloom(1_065_314_304, "1b1", 1536, 24, 16),
    "bloom-1b7": _bloom(1_722_408_960, "1b7", 2048, 24, 16),
    "bloom-3b": _bloom(3_002_557_440, "3b", 2560, 30, 32),
    "bloom-7b1": _bloom(7_069_016_064, "7b1", 4096, 30, 32),
    "pythia-70m": _neox(70_426_624, "EleutherAI/pythia-70m", 50304, 512, 6, 8),
    "pythia-160m": _neox(162_322_944, "EleutherAI/pythia-160m", 50304, 768, 12, 12),
    "pythia-410m": _neox(405_334_016, "EleutherAI/pythia-410m", 50304, 1024, 24, 16),
    "pythia-1b": _neox(1_011_781_632, "EleutherAI/pythia-1b", 50304, 2048, 16, 8),
    "pythia-1.4b": _neox(1_414_647_808, "EleutherAI/pythia-1.4b", 50304, 2048, 24, 16),
    "pythia-2.8b": _neox(2_775_208_960, "EleutherAI/pythia-2.8b", 50304, 2560, 32, 32),
    "pythia-6.9b": _neox(6_857_302_016, "EleutherAI/pythia-6.9b", 50432, 4096, 32, 32),
    "pythia-12b": _neox(11_846_072_320, "EleutherAI/pythia-12b", 50688, 5120, 36, 40),
    "gpt-neox-20b": _neox(20_554_567_680, "EleutherAI/gpt-neox-20b", 50432, 6144, 44, 64),
    "opt-125m": _opt(125_239_296, "125m", 768, 12, 12),
    "opt-350m": _opt(331_196_416, "350m", 1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(1_315_758_080, "1.3b", 2048, 24, 32),
    "opt-2.7b": _opt(2_651_596_800, "2.7b", 2560, 32, 32),
    "opt-6.7b": _opt(6_658_473_984, "6.7b", 4096, 32, 32),
    "opt-13b": _opt(12_853_473_280, "13b", 5120, 40, 40),
    "opt-30b": _opt(29_974_540_288, "30b", 7168, 48, 56),
    "gpt2": _gpt2(124_439_808, "openai-community/gpt2", 768, 12, 12),
    "gpt2-medium": _gpt2(354_823_168, "openai-community/gpt2-medium", 1024, 24, 16),
    "gpt2-large": _gpt2(774_030_080, "openai-community/gpt2-large", 1280, 36, 20),
    "gpt2-xl": _gpt2(1_557_611_200, "openai-community/gpt2-xl", 1600, 48, 25),
    "falcon-7b": Shape(
        "falcon", 6_921_720_704, "tiiuae/falcon-7b",
        {
            "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
            "multi_query": True, "parallel_attn": True, "bias": False, "new_decoder_architecture": False,
            "alibi": False,
        },
    ),
    "falcon-40b": Shape(
        "falcon", 41_303_293_952, "tiiuae/falcon-40b",
        {
            "vocab_size": 65024, "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
            "num_kv_heads": 8, "parallel_attn": True, "bias": False, "new_decoder_architecture": True, "alibi": False,
        },
    ),
    "mixtral-8x7b": _moe(
        "mixtral", 46_702_792_704, "mistralai/Mixtral-8x7B-v0.1", 32000, 4096, 14336, 32, 32, 8,
        num_local_experts=8, num_experts_per_tok=2,
    ),
    "olmoe": _moe(
        "olmoe", 6_919_161_856, "allenai/OLMoE-1B-7B-0924", 50304, 2048, 1024, 16, 16, 16,
        num_experts=64, num_experts_per_tok=8,
    ),
}  # fmt: skip
"""Short name -> shape."""

ALIASES = {
    "bloomz-7b": "bloom-7b1", "bloomz-7b1": "bloom-7b1", "bloom-7b": "bloom-7b1", "bloomz-560m": "bloom-560m",
    "bloomz-1b1": "bloom-1b1", "bloomz-1b7": "bloom-1b7", "bloomz-3b": "bloom-3b", "bigscience/bloomz-7b1": "bloom-7b1",
    "gptj-6b": "gpt-j-6b", "gpt-j": "gpt-j-6b", "gptj": "gpt-j-6b", "llama-1b": "llama-3.2-1b",
    "llama-3b": "llama-3.2-3b",
    "llama-8b": "llama-3.1-8b", "llama-33b": "llama-30b", "mistral": "mistral-7b", "mixtral": "mixtral-8x7b",
    "phi-3": "phi-3-mini", "phi3-mini": "phi-3-mini", "gpt2-small": "gpt2", "olmoe-1b-7b": "olmoe",
    "yahma/llama-7b-hf": "llama-7b", "yahma/llama-13b-hf": "llama-13b", "llama-3.1-8b-instruct": "llama-3.1-8b",
}  # fmt: skip
"""Other names by which people ask for them."""


def shape(name: str) -> Shape | None:
    """The known shape of that name, alias or Hub id (any case), or None."""
    low = name.lower()
    low = ALIASES.get(low, low)
    if low in SHAPES:
        return SHAPES[low]
    return next((s for s in SHAPES.values() if s.hub.lower() == low), None)
