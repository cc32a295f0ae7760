"""Fixtures of the task tests: the optional folder of real files, and a tiny real tokenizer."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data files, which is not part of the repository; the test is skipped without it."""
    path = Path(__file__).parents[2] / ".." / "shared"
    if not path.is_dir():
        pytest.skip("no folder ../shared with the published data files")
    return path.resolve()


@pytest.fixture(scope="session")
def data(shared: Path) -> Path:
    """LLM-Adapters' data files."""
    return shared / "data" / "llm_adapters"


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE with a start token, trained here: every text survives decoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["the correct answer is answer1", "### Instruction: ### Response: request"] * 9, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
