"""Chat templates of the kinds that models have, and tokenizers that read them."""

from __future__ import annotations

from tokenizers import processors

from tests.evaluate.tiny import tokenizer

LOOP = "{% for m in messages %}"
CHATML = LOOP + (
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPS = (
    "{{ bos_token }}"
    + LOOP
    + (
        "<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
    )
)
"""As Llama 3's: a start token, contents stripped."""
BRACKETS = LOOP + (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
"""As Llama 2's: a blank before the answer and before its end, no system role."""
THINKS = LOOP + (
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen 3's: an empty block of thoughts is part of what is learned."""
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML
OPEN = LOOP + "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
"""No special token anywhere."""
KINDS = {"chatml": CHATML, "strips": STRIPS, "brackets": BRACKETS, "thinks": THINKS, "dated": DATED, "open": OPEN}
REASONS = LOOP + (
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""As DeepSeek-R1's: generation begins inside thoughts that conversations leave out."""
DEAF = LOOP + "<|im_start|>{{ m.role }}<|im_end|>{% endfor %}"


def chatty(template: str | None, start: bool = False):
    """A byte tokenizer with ChatML's tokens and a chat template.

    Args:
        start: put the start token before every text, as LLaMA's tokenizers do.
    """
    made = tokenizer(chat_template=template)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if start:
        pieces = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.bos_token_id)])
        made._tokenizer.post_processor = pieces
    return made
