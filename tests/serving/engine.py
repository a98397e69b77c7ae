"""What vLLM says, in one batch: run by the Python of its own environment.

    python engine.py MODEL REQUESTS

REQUESTS is JSON: ``{"adapters": {name: folder}, "prompts": [{"adapter": name or null, "ids": [...]}], "tokens": n}``.
It prints the new tokens of every prompt, as JSON.
"""

import json
import sys
from pathlib import Path


def main(model: str, requests: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.loads(Path(requests).read_text())
    adapters = {
        name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(asked["adapters"].items(), 1)
    }
    engine = LLM(
        model=model, enable_lora=True, max_loras=len(adapters) + 1, max_lora_rank=16, max_model_len=256,
        dtype="float32", enforce_eager=True, max_num_seqs=2 * len(asked["prompts"]),
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True)
    outputs = engine.generate(
        [{"prompt_token_ids": prompt["ids"]} for prompt in asked["prompts"]],
        sampling,
        lora_request=[adapters.get(prompt["adapter"]) for prompt in asked["prompts"]],
        use_tqdm=False,
    )
    print("\n" + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main(*sys.argv[1:])
