"""Text from a base and an adapter."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from omegaconf import OmegaConf, open_dict

from nemo_tiedlora import platform
from nemo_tiedlora.checkpoint.base import check_base
from nemo_tiedlora.checkpoint.saved import check_adapter
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface.bases import find
from nemo_tiedlora.job.host_config import host_config
from nemo_tiedlora.platform.quiet import quiet


class Generator:
    """A loaded base, with an adapter or without; ``generate`` completes prompts with it."""

    def __init__(self, model, verbose: bool = False):
        self.model, self.verbose = model, verbose

    def generate(
        self, prompts: Sequence[str], tokens: int, temperature: float = 0.0, top_p: float = 1.0, batch_size: int = 16
    ) -> Iterator[str]:
        """Yield one completion per prompt, in order, without the prompt.

        Args:
            prompts: texts to continue, exactly as they are: write the adapter's prompt template out.
            tokens: at most this many new tokens each; a completion ends earlier at the end-of-text token.
            temperature: 0 is greedy; else the softmax temperature to sample with.
            top_p: sample from the smallest set of tokens that has this probability.
            batch_size: prompts per forward pass; greedy text does not depend on it.

        Raises:
            UsageError: a prompt longer than the context of a base with learned positions, before anything is generated.
                One that leaves room for fewer than ``tokens`` gets as many as fit.
        """
        self._check_room(prompts)
        length = {"max_length": tokens, "min_length": 0}
        sampling = {
            "use_greedy": temperature == 0,
            "temperature": temperature or 1.0,
            "top_k": 0,
            "top_p": top_p,
            "repetition_penalty": 1.0,
            "add_BOS": False,
            "all_probs": False,
            "compute_logprob": False,
            "end_strings": ["<|endoftext|>"],
        }
        tokenizer = self.model.tokenizer
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            with quiet(not self.verbose):
                output = self.model.generate(batch, length, sampling)
            for prompt, ids in zip(batch, output["token_ids"], strict=True):
                new = ids[len(tokenizer.text_to_ids(prompt)) :][:tokens]
                if tokenizer.eos_id in new:
                    new = new[: new.index(tokenizer.eos_id)]
                yield tokenizer.ids_to_text(new)

    def _check_room(self, prompts: Sequence[str]) -> None:
        context = self.model.cfg.encoder_seq_length
        learned = self.model.cfg.get("position_embedding_type", "learned_absolute") == "learned_absolute"
        for prompt in prompts if learned else ():
            length = len(self.model.tokenizer.text_to_ids(prompt))
            if length > context:
                begin = prompt if len(prompt) <= 40 else f"{prompt[:40]}…"
                raise UsageError("prompt", begin, f"has {length} tokens, and the base's context {context}; shorten it")


@contextmanager
def generator(base: str | Path, adapter: Path | None = None, precision: str | int = 32, verbose: bool = False):
    """Load a base and, on top of it, a saved adapter; inside the block the result can be used.

    Args:
        base: as ``huggingface.bases`` takes it.

    Raises:
        UsageError: a file that is no ``.nemo``, or an adapter made for another base.
    """
    found = find(base, "base", check_base)
    shape = found.config
    if not shape.get("mcore_gpt"):
        raise UsageError("base", str(base), "not a Megatron-core GPT (mcore_gpt is not set)")
    peft = OmegaConf.create({"peft_scheme": "none"})
    if adapter:
        peft = OmegaConf.create(check_adapter(adapter, shape, "adapter")["peft"])
    with open_dict(peft):
        peft.restore_from_path = str(adapter) if adapter else None
    cfg = host_config(precision, peft=peft)
    path = found.file()
    with ExitStack() as stack:
        with quiet(not verbose):
            stack.enter_context(platform.host())
            from nemo_tiedlora.nemo.model import build_model, build_trainer

            trainer, _ = build_trainer(cfg, [])
            model = build_model(cfg, path, trainer)
            model.freeze()
        yield Generator(model, verbose)
