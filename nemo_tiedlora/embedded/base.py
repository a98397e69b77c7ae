"""The built-in base: a small Llama-like model, pre-trained on this machine the first time it is asked for.

    from nemo_tiedlora.embedded.base import base

    path = base()        # a `.nemo` file in the user's cache folder

The pre-training runs in a process of its own (`python -m nemo_tiedlora.embedded.base FILE`): one process can set
Megatron's parallel state up only once, and that is for the caller's own model.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from nemo_tiedlora.files import replacing

SEED = 1234
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

MODEL = dict(
    mcore_gpt=True,
    transformer_engine=False,
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=None,
    encoder_seq_length=512,
    max_position_embeddings=512,
    normalization="rmsnorm",
    layernorm_epsilon=1e-5,
    bias=False,
    activation="fast-swiglu",
    position_embedding_type="rope",
    rotary_percentage=1.0,
    share_embeddings_and_output_weights=False,
    make_vocab_size_divisible_by=64,
    init_method_std=0.02,
    use_scaled_init_method=True,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    ffn_dropout=0.0,
    transformer_block_type="pre_ln",
    apply_query_key_layer_scaling=False,
    persist_layer_norm=False,
    headscale=False,
    pre_process=True,
    post_process=True,
    micro_batch_size=1,
    global_batch_size=1,
    rampup_batch_size=None,
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    virtual_pipeline_model_parallel_size=None,
    sequence_parallel=False,
    precision=32,
    megatron_amp_O2=False,
    fp8=False,
    gradient_accumulation_fusion=False,
    gradient_as_bucket_view=True,
    bias_activation_fusion=False,
    bias_dropout_add_fusion=False,
    masked_softmax_fusion=False,
    apply_rope_fusion=False,
    use_cpu_initialization=True,
    seed=SEED,
    nsys_profile=dict(enabled=False),
    data=dict(
        data_prefix=None,
        data_impl="mock",
        splits_string="900,50,50",
        seq_length=512,
        num_workers=0,
        dataloader_type="single",
    ),
    optim=dict(name="adamw", lr=1e-3, sched=dict(name="CosineAnnealing", warmup_steps=0, constant_steps=0, min_lr=0.0)),
)
TRAINER = dict(
    accelerator="gpu",
    devices=1,
    num_nodes=1,
    precision=32,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    use_distributed_sampler=False,
    max_epochs=1,
    max_steps=1,
)


def base(cache_dir: str | Path | None = None, *, progress: bool = True) -> Path:
    """The built-in base as a `.nemo` file, built first where it is not in the cache yet (a minute or two).

    Args:
        cache_dir: where to look and to build; by default `nemo_tiedlora` in the user's cache folder.
        progress: show the pre-training on standard error.
    """
    path = _cache(cache_dir) / f"base-{fingerprint()}.nemo"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_suffix(".lock")):
            if not path.exists():  # another process may have built it meanwhile
                with replacing(path) as unfinished:
                    _build_elsewhere(unfinished, progress)
    return path


def fingerprint() -> str:
    """Of everything that decides what the base is: the sources that make it, and the versions of what they use."""
    sources = (Path(__file__).with_name(f"{name}.py") for name in ("base", "language", "muon", "tokenizer"))
    packages = ("torch", "nemo_toolkit", "megatron-core", "sentencepiece")
    parts = [source.read_bytes() for source in sources] + [version(package).encode() for package in packages]
    return sha256(b"\0".join(parts)).hexdigest()[:12]


def _cache(cache_dir: str | Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_tiedlora"


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process is in here; the lock goes with the process, so a crash leaves nothing to clean up."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_elsewhere(path: Path, progress: bool) -> None:
    """Build in a process of its own; it reports `step loss` lines on its standard output."""
    with tempfile.TemporaryFile("w+") as log, _bar(progress) as show:
        command = [sys.executable, "-m", f"{__package__}.base", str(path)]
        child = subprocess.Popen(command, env=_single_process(), stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            for line in child.stdout:
                step, loss = line.split()
                show(int(step), float(loss))
            failed = child.wait()
        finally:
            child.kill()
            child.wait()
        if failed:
            log.seek(0)
            last = "\n".join(log.read().splitlines()[-20:])
            raise RuntimeError(f"pre-training the built-in base failed (exit code {failed}):\n{last}")


def _single_process() -> dict[str, str]:
    """This environment without what makes a process part of a distributed run."""
    prefixes = ("TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_", "PMIX_", "GROUP_", "ROLE_", "LOCAL_", "MASTER_")
    names = {"RANK", "WORLD_SIZE", "NODE_RANK"}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names.add("OMP_NUM_THREADS")  # torchrun sets it to 1, for processes that share the machine
    package = Path(__file__).parents[2]  # so that a checkout which is not installed works from any folder
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in names}
    # Threads that spin while they wait slow a small model on a busy machine fourfold, and on an idle one gain nothing.
    return {"OMP_WAIT_POLICY": "PASSIVE"} | kept | {"PYTHONPATH": os.pathsep.join(paths)}


@contextmanager
def _bar(progress: bool) -> Iterator[Callable[[int, float], None]]:
    """A function that shows a step and its loss: as a bar on a terminal, elsewhere as a line every few seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}"), TimeRemainingColumn()
    shown = time.monotonic()
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("pre-training the built-in base, once", total=STEPS, facts="starting")

        def show(step: int, loss: float) -> None:
            nonlocal shown
            facts = f"step {step}/{STEPS}  loss {loss:.3f}"
            bar.update(task, completed=step, facts=facts if step < STEPS else "saving")
            if progress and not console.is_terminal and (time.monotonic() - shown > 10 or step == STEPS):
                shown = time.monotonic()
                print(f"pre-training the built-in base: {facts}", file=sys.stderr, flush=True)

        yield show


def build(path: Path, report: Callable[[int, float], None]) -> None:
    """Train the tokenizer and the model and save both as `path`, in this process; `report` gets every step's loss."""
    from nemo_tiedlora import platform
    from nemo_tiedlora.embedded import tokenizer

    with platform.host(), tempfile.TemporaryDirectory() as folder:
        from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
        from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
        from omegaconf import OmegaConf

        pieces = tokenizer.train(Path(folder) / "tokenizer.model")
        files = dict(model=str(pieces), vocab_file=None, merge_file=None)
        library = dict(library="sentencepiece", type=None, delimiter=None, sentencepiece_legacy=False)
        config = OmegaConf.create(MODEL | dict(tokenizer=library | files))
        run = dict(trainer=TRAINER, model=config, exp_manager=dict(log_tflops_per_sec_per_gpu=False))
        trainer = MegatronLMPPTrainerBuilder(OmegaConf.create(run)).create_trainer()
        model = MegatronGPTModel(config, trainer)
        pretrain(model.model, tokenizer.load(pieces), report)
        model.save_to(str(path))


def pretrain(model, pieces, report: Callable[[int, float], None]) -> None:
    """Train Megatron's module on generated documents, with the loss on their answers."""
    import torch

    model.cuda().train()
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.dim() == 2 and ".layers." in name)]
    optimizers = _optimizers(matrices, others)
    for step, (tokens, weights) in enumerate(islice(_batches(pieces), STEPS), start=1):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step)
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
        report(step, loss.item())


def _optimizers(matrices: list, others: list) -> list:
    import torch

    from nemo_tiedlora.embedded.muon import Muon

    return [
        Muon(matrices, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY),
    ]


def _learning_rate(step: int) -> float:
    """Linear warm-up, then down along a cosine to nothing."""
    import math

    return LEARNING_RATE * min(step / WARMUP, 0.5 * (1 + math.cos(math.pi * step / STEPS)))


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


def main() -> None:
    """Build the base as the file named on the command line; see `_build_elsewhere`."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the host prints a lot; only reports may reach the parent

    def report(step: int, loss: float) -> None:
        print(step, loss, file=reports, flush=True)

    build(Path(sys.argv[1]), report)


if __name__ == "__main__":
    main()
