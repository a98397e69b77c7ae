"""Makes the weights and the tokenizer of the built-in base, which come with this package.

    python -m nemo_tiedlora.job.pretrain --out FOLDER

That takes two minutes on two cores. Rounding differs from one CPU to another, and with it the weights: that is why
those of one run come with the package. To ship others, put both files here and their checksums into `base.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from nemo_tiedlora import console
from nemo_tiedlora.embedded.base import MODEL, TOKENIZER, WEIGHTS, model_config
from nemo_tiedlora.files import sha256_of, write_bytes
from nemo_tiedlora.platform.threads import wait_passively

SEED = MODEL["seed"]
STEPS = 700
DOCUMENTS = 24
LEARNING_RATE = 1e-2
WARMUP = 50
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
#: Loss weight of what is no answer: the lists and questions are drawn at random, so there is little to learn.
ELSEWHERE = 0.02
#: Tokens of a document that are used: no document has more.
LENGTH = 55

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder to write the weights and the tokenizer to.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = STEPS,
) -> None:
    """Train the tokenizer and the model, write both and print their checksums."""
    out.mkdir(parents=True, exist_ok=True)
    wait_passively()
    from nemo_tiedlora import platform
    from nemo_tiedlora.embedded import tokenizer

    with platform.host():
        from nemo_tiedlora.platform.quiet import quiet

        with quiet():
            pieces = tokenizer.train(out / TOKENIZER)
            module = _module(pieces)
            _train(module, tokenizer.load(pieces), steps)
            _save(module, out / WEIGHTS)
    console.show({name: sha256_of(out / name) for name in (WEIGHTS, TOKENIZER)}, False)


def _module(tokenizer: Path):
    """Megatron's module with random weights, built by NeMo."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
    from omegaconf import OmegaConf

    from nemo_tiedlora.job.host_config import host_config

    config = OmegaConf.create(model_config(str(tokenizer)))
    run = host_config()
    run.trainer.update(accelerator="gpu", enable_progress_bar=False)
    run.model = config
    trainer = MegatronLMPPTrainerBuilder(run).create_trainer()
    return MegatronGPTModel(config, trainer).model


def _train(model, pieces, steps: int) -> None:
    """Train on generated documents, with the loss on their answers."""
    import torch

    model.cuda().train()
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.dim() == 2 and ".layers." in name)]
    optimizers = _optimizers(matrices, others)
    batches = console.progress(islice(_batches(pieces), steps), "pre-training", steps)
    for step, (tokens, weights) in enumerate(batches, start=1):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, steps)
        tokens, weights = tokens.cuda(), weights.cuda()
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
        losses = model(inputs, positions, None, labels=labels)
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        for optimizer in optimizers:
            optimizer.step()


def _optimizers(matrices: list, others: list) -> list:
    import torch

    from nemo_tiedlora.job.muon import Muon

    return [
        Muon(matrices, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY),
    ]


def _learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then down along a cosine to nothing."""
    import math

    return LEARNING_RATE * min(step / WARMUP, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _batches(pieces) -> Iterator[tuple]:
    """Batches of documents without end: token ids and the weight of each token's loss, both (DOCUMENTS, LENGTH + 1)."""
    import torch

    from nemo_tiedlora.embedded.language import documents

    source = documents(SEED)
    while True:
        tokens = torch.full((DOCUMENTS, LENGTH + 1), pieces.eos_id())
        weights = torch.zeros(DOCUMENTS, LENGTH + 1)
        for row, (about, exercises) in enumerate(islice(source, DOCUMENTS)):
            ids = pieces.encode(str(about))
            learned = [ELSEWHERE] * len(ids)
            for exercise in exercises:
                # One by one: given a list, sentencepiece starts threads, which takes longer than the encoding.
                question, answer = pieces.encode(exercise.question), pieces.encode(exercise.answer)
                ids += [*question, *answer, pieces.eos_id()]
                learned += [ELSEWHERE] * len(question) + [1.0] * (len(answer) + 1)
            used = min(len(ids), LENGTH + 1)
            tokens[row, :used] = torch.tensor(ids[:used])
            weights[row, :used] = torch.tensor(learned[:used])
        yield tokens, weights


def _save(model, path: Path) -> None:
    """Write the weights under the names of a Megatron-core checkpoint, which stacks the layers of each kind."""
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from safetensors.torch import save

    state = model.sharded_state_dict()
    apply_factories(state)
    tensors = {}
    for piece in nested_values(state):
        if isinstance(piece, ShardedTensor):
            whole = tensors.setdefault(piece.key, torch.empty(piece.global_shape, dtype=piece.dtype))
            whole[piece.global_slice()] = piece.data.cpu()
    write_bytes(path, save(tensors))


if __name__ == "__main__":
    console.run(app)
