"""What llama.cpp says: run by the Python of the serving environment.

    python llama_cpp.py MODEL.gguf REQUESTS

REQUESTS is JSON: ``{"adapters": [file or null, ...], "ids": [...], "tokens": n}``. It prints the greedy text that
follows with each adapter, as JSON.
"""

import json
import sys
from pathlib import Path


def main(model: str, requests: str) -> None:
    import xllamacpp

    asked, said = json.loads(Path(requests).read_text()), []
    for adapter in asked["adapters"]:
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_gpu_layers = model, 256, 0
        if adapter:
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = adapter, 1.0
            settings.lora_adapters = [lora]
        request = {"prompt": asked["ids"], "n_predict": asked["tokens"], "top_k": 1, "ignore_eos": True}
        answer = xllamacpp.Server(settings).handle_completions(request)
        said.append((answer if isinstance(answer, dict) else json.loads(answer))["choices"][0]["text"])
    print("\n" + json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
