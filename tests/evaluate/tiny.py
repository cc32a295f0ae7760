"""What these tests share: a byte tokenizer, tiny random models that read it, and hosts that wear a few adapters."""

from __future__ import annotations

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import inlay

torch.set_num_threads(1)
PAD, BOS, EOS = 256, 257, 258
COMMON = dict(vocab_size=259, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, tie_word_embeddings=False)
CONFIGS = {
    "llama": lambda n: hf.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=n,
        **COMMON,
    ),
    "gptj": lambda n: hf.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=n, **COMMON),
    "bloom": lambda n: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **COMMON),
    "gpt2": lambda n: hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=n, **COMMON),
    "opt": lambda n: hf.OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=n,
        **COMMON,
    ),
}


def tokenizer(**settings):
    """One token a byte, and no start token of its own."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<pad>", "<s>", "</s>"])
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", **{**marks, **settings})


def base(family: str, positions: int = 128, seed: int = 0, vocabulary: int | None = None):
    """A random model, its weights large enough that texts differ and no two tokens tie."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[family](positions)).eval()
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p)) if p.dim() == 1 else p.data.normal_(std=0.25)
    with torch.no_grad():  # it speaks printable ASCII, mostly
        model.get_output_embeddings().weight[94:] *= 0.2
    return model


def host(family: str, positions: int = 128, vocabulary: int | None = None):
    """A host that wears `lora`, `series`, `prefix` and `prompt`, all of them felt."""
    made = inlay.attach(base(family, positions, vocabulary=vocabulary))
    small = {"lora": {"rank": 4}, "series": {"size": 8}, "prefix": {"tokens": 3}, "prompt": {"tokens": 2}}
    for name, settings in small.items():
        method = inlay.method(name)
        made.add(name, method.make(**settings), at=method.places, seed=0)
    torch.manual_seed(1)
    for p in made.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return made


PROMPTS = [
    "a",
    "Two plus three is",
    "The bird said: ",
    "Zürich has a lake.",
    "x" * 40,
    "12 + 30 =",
    "Why?",
    "once upon a time",
    "b",
    "§",
]
PLAN = ["lora", None, "series", "prefix", "lora", "prompt", None, "prefix+lora", "series", None]
