"""Small runs of `transformers.Trainer` and of TRL's SFTTrainer."""

from __future__ import annotations

import pytest
import torch

from inlay.interop.trainer import AdapterCallback
from inlay.train.batches import collate


def arguments(out, cls=None, **changes):
    from transformers import TrainingArguments

    values = {
        "output_dir": str(out),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        "lr_scheduler_type": "constant",
    }
    return (cls or TrainingArguments)(**{**values, **changes})


def pad(features):
    batch = collate(features, 0, torch.device("cpu"))
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}


def trainer(host, out, data, **changes):
    from transformers import Trainer

    changes = {"remove_unused_columns": False, **changes}
    return Trainer(
        model=host.model,
        args=arguments(out, **changes),
        train_dataset=data,
        data_collator=pad,
        callbacks=[AdapterCallback(host, "a")],
    )


def losses(t):
    return [line["loss"] for line in t.state.log_history if "loss" in line]


def letters():
    """A tokenizer with one token a letter or digit."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 .,:?"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sft(host, out, data, tokenizer, callbacks=True, **changes):
    trl = pytest.importorskip("trl")
    args = arguments(out, trl.SFTConfig, **{"max_length": None if changes.get("padding_free") else 32, **changes})
    own = [AdapterCallback(host, "a")] if callbacks else []
    return trl.SFTTrainer(model=host.model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=own)


def texts(n=24):
    from datasets import Dataset

    return Dataset.from_list([{"prompt": f"say {i % 7}:", "completion": f" {i % 7}{i % 7}{i % 7}"} for i in range(n)])
