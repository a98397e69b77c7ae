"""The main job: fine-tune a NeMo GPT with any scheme, and say what came of it."""

import json
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemo_tiedlora import platform
from nemo_tiedlora.checkpoint.base import check_base
from nemo_tiedlora.checkpoint.saved import saved_config
from nemo_tiedlora.embedded import tasks as embedded_tasks
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import check_output, write_text
from nemo_tiedlora.huggingface.bases import BUILTIN, find
from nemo_tiedlora.job.calibrate import Calibration, groups_file
from nemo_tiedlora.job.inputs import check, check_scheme, scheme_of, under, without_groups
from nemo_tiedlora.job.lock import hold
from nemo_tiedlora.job.record import Record
from nemo_tiedlora.job.settings import check_outline, check_settings
from nemo_tiedlora.model.data import ModelConfig
from nemo_tiedlora.model.sizes import lora_size, sizes
from nemo_tiedlora.nemo.rows import chat_form, first_row
from nemo_tiedlora.platform.quiet import quiet
from nemo_tiedlora.platform.threads import use_one_thread
from nemo_tiedlora.ranks import is_first_rank, launched
from nemo_tiedlora.variants import METHODS, TiedConfig, VariantConfig, config_for

#: In a run's folder: what came of it; and what decides that, where NeMo does not move it aside when a run continues.
SUMMARY, RECORD = "summary.json", "checkpoints/run.json"
#: The data sections of the config.
SECTIONS = ("train_ds", "validation_ds", "test_ds")
SAMPLES = 3


def finetune(cfg: DictConfig) -> Path:
    """Run the job that ``conf/megatron_gpt_finetuning_config.yaml`` describes.

    Args:
        cfg: the composed Hydra config; resolved and completed in place.

    Returns:
        Path of the run's ``summary.json``.

    Raises:
        UsageError: bad input, before anything expensive happens; or another job is running in the folder.
        RunError: the run cannot go on: it diverged.
        SystemExit: a signal ended training (128 + signal); the same call continues it.
    """
    check_outline(cfg)
    OmegaConf.resolve(cfg)
    check_settings(cfg)
    as_asked = OmegaConf.to_yaml(cfg)
    with open_dict(cfg):
        cfg.model.peft.peft_scheme = scheme_of(cfg)
    if cfg.model.peft.restore_from_path:
        _take_saved_settings(cfg)
    named = cfg.model.restore_from_path or BUILTIN
    found = find(named, "model.restore_from_path", check_base)
    base = found.config
    method = checked(cfg, base)
    path = found.file()
    if named == BUILTIN:
        use_one_thread()
    folder = choose_folder(cfg, as_asked)
    check_output(folder, "exp_manager.exp_dir")
    own = cfg.exp_manager.resume_if_exists or cfg.exp_manager.explicit_log_dir  # else NeMo makes one below it
    held = hold(folder, "exp_manager.exp_dir") if own else nullcontext()
    if cfg.model.data.train_ds.file_names is None:
        _use_builtin_task(cfg, folder)
    _complete(cfg, folder)
    with open_dict(cfg):
        cfg.model.restore_from_path = str(path)
    record = Record.of(cfg)
    changed = _continues(cfg, record, folder)
    if finished := _finished(cfg, folder):
        if is_first_rank():
            print(finished)
        return folder / SUMMARY
    if is_first_rank():
        write_text(folder / "config.yaml", as_asked)
    method = _find_groups(cfg, folder) or method
    with held, quiet(not cfg.verbose) as results, platform.host():
        return _run(cfg, method, base, as_asked, results, record, changed)


def checked(cfg: DictConfig, base: ModelConfig) -> VariantConfig | None:
    """Check all of a job's config against the model config of its base.

    Returns:
        The settings of its method, parsed this once; None for a scheme of NeMo's. Groups to be found are left out.

    Raises:
        UsageError: for the first thing that is wrong.
    """
    scheme = scheme_of(cfg)
    check_scheme(scheme)
    method = None
    if scheme in METHODS:
        with under(scheme):
            section = cfg.model.peft.get(f"{scheme}_tuning") or DictConfig({})
            method = config_for(scheme, without_groups(OmegaConf.to_container(section)))
    check(cfg, base, method)
    return method


def choose_folder(cfg: DictConfig, as_asked: str) -> Path:
    """The run's folder: what ``exp_manager`` is told to use, else the latest unfinished run of this very config, else
    a new one. In the last two cases ``exp_manager.explicit_log_dir`` is set to it.

    That the latest unfinished run may be running makes no difference: the same command again is the same run, and is
    told so. ``exp_manager.resume_if_exists=false`` begins another beside it.
    """
    manager = cfg.exp_manager
    if manager.explicit_log_dir:
        return Path(manager.explicit_log_dir)
    if manager.exp_dir:
        return Path(manager.exp_dir) / manager.name
    root = Path("nemo_experiments") / manager.name
    follows = not is_first_rank()  # the first chooses, and writes its config
    if not manager.resume_if_exists and (launched() or 1) > 1:  # the others could not tell which is the new one
        raise UsageError(
            "exp_manager.exp_dir", None, "several processes with resume_if_exists=false need a folder named"
        )
    while not (unfinished := _unfinished(root, as_asked)) and follows:
        time.sleep(0.1)
    if unfinished and (manager.resume_if_exists or follows):
        folder = unfinished[-1]
    else:
        folder = _new_run(root)
    manager.explicit_log_dir = str(folder)
    return folder


def _new_run(root: Path) -> Path:
    """Make the folder of a new run; of two jobs at once, each gets its own."""
    check_output(root, "exp_manager.exp_dir")
    number = max(_runs(root), default=0) + 1
    while True:
        folder = root / f"run-{number:03d}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def _runs(root: Path) -> dict[int, Path]:
    """The folders of all runs by number, in order."""
    return {int(path.name[4:]): path for path in sorted(root.glob("run-*")) if path.name[4:].isdigit()}


def _unfinished(root: Path, as_asked: str) -> list[Path]:
    """The runs of this very config that have no summary, oldest first."""
    configs = [run / "config.yaml" for run in _runs(root).values() if not (run / SUMMARY).exists()]
    return [config.parent for config in configs if config.exists() and config.read_text("utf-8") == as_asked]


def _continues(cfg: DictConfig, record: Record, folder: Path) -> list[str]:
    """What is another than when the run in the folder started, if there is one to go on with; see ``Record``.

    Raises:
        UsageError: what is there cannot be continued to the result that it would have had.
    """
    kept = folder / RECORD
    checkpoints = cfg.exp_manager.checkpoint_callback_params.get("dirpath") or folder / "checkpoints"
    begun = any(Path(checkpoints).rglob("*.ckpt")) or any(Path(checkpoints).glob("*-last"))
    if not (begun or (folder / SUMMARY).exists()):
        return []
    if not cfg.exp_manager.resume_if_exists:
        if cfg.exp_manager.explicit_log_dir:  # below any other NeMo makes a new one
            raise UsageError("exp_manager.explicit_log_dir", str(folder), "there is a run in it; name another folder")
        return []
    if kept.exists():
        return record.check_continues(Record.read(kept), folder)
    way_out = "the run in it does not say what it was trained with; name another folder"
    raise UsageError("exp_manager", str(folder), way_out)


def _finished(cfg: DictConfig, folder: Path) -> str | None:
    """What to say of a run that has all it was to bring; None if something is left to do."""
    path = folder / SUMMARY
    if not cfg.exp_manager.resume_if_exists or not path.exists():
        return None
    try:
        summary = json.loads(path.read_text("utf-8"))
        adapter, steps, most = summary["adapter"], summary["steps"], summary["max_steps"]
        if adapter and not Path(adapter).is_file():
            adapter = folder / "checkpoints" / Path(adapter).name  # the run's folder may have been moved
    except (ValueError, KeyError, TypeError):  # damaged: it is written again
        return None
    if most != cfg.trainer.max_steps or (adapter and not Path(adapter).is_file()):
        return None
    return f"already finished, after {steps} steps\nadapter: {adapter}\n{path}"


def _use_builtin_task(cfg: DictConfig, folder: Path) -> None:
    """Write the built-in task's rows into the run's folder and point the data sections at them."""
    files = embedded_tasks.write(folder / "data")
    with open_dict(cfg.model.data):
        for split, path in files.items():
            cfg.model.data[f"{split}_ds"].file_names = [str(path)]


def _complete(cfg: DictConfig, folder: Path) -> None:
    """Fill in what a user should not have to say."""
    data = cfg.model.data
    names = data.train_ds.file_names
    with open_dict(cfg):
        for size in ("global_batch_size", "micro_batch_size"):  # NeMo counts rows by those of the model
            cfg.model[size] = data.train_ds[size]
        if isinstance(cfg.trainer.val_check_interval, float):
            cfg.trainer.val_check_interval = max(1, round(cfg.trainer.val_check_interval * cfg.trainer.max_steps))
        if data.train_ds.get("concat_sampling_probabilities") is None:
            data.train_ds.concat_sampling_probabilities = [1 / len(names)] * len(names)
        for section in SECTIONS:
            if data.get(section) and not data.chat:
                data[section].prompt_template = _escaped(data[section].prompt_template)
            if data.get(section) and not data[section].get("index_mapping_dir"):
                # NeMo would put its line index beside the data, which may be read-only.
                data[section].index_mapping_dir = str(folder / "index")


def _find_groups(cfg: DictConfig, folder: Path) -> VariantConfig | None:
    """ShareLoRA: where the groups are to be found by calibration, find them, once per run, and give the settings."""
    scheme = scheme_of(cfg)
    tuning = cfg.model.peft[f"{scheme}_tuning"] if scheme in METHODS else {}
    section = tuning.get("settings") or tuning
    groups = section.get("groups")
    if isinstance(groups, DictConfig):
        calibration = Calibration.of(OmegaConf.to_container(groups))
        base = Path(cfg.model.restore_from_path)
        path = folder / "groups" / f"groups-{calibration.identity(base)}.json"
        section.groups = str(groups_file(calibration, base, path))
        return config_for(scheme, OmegaConf.to_container(tuning))
    return None


def _take_saved_settings(cfg: DictConfig) -> None:
    """A restored adapter keeps the settings it was made with: they decide its tensors."""
    saved = saved_config(cfg.model.peft.restore_from_path, "model.peft.restore_from_path").get("peft") or {}
    with open_dict(cfg.model.peft):
        for name, section in saved.items():
            if name.endswith("_tuning"):
                cfg.model.peft[name] = section


def _escaped(template: str) -> str:
    r"""The template in ASCII: NeMo undoes escapes such as \n in it, and would garble any other letter on the way."""
    plain = re.sub(r"\\([nrt\\])", lambda escape: {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}[escape[1]], template)
    return plain.encode("unicode_escape").decode("ascii")


def _run(
    cfg: DictConfig,
    method: VariantConfig | None,
    base: ModelConfig,
    as_asked: str,
    results: TextIO,
    record: Record,
    changed: list[str],
) -> Path:
    from nemo_tiedlora.job.callbacks.divergence import DivergenceCheck
    from nemo_tiedlora.job.callbacks.facts import Facts
    from nemo_tiedlora.job.callbacks.interrupt import Interrupted, Interruptible
    from nemo_tiedlora.job.callbacks.progress import ProgressBar
    from nemo_tiedlora.job.callbacks.recorded import Recorded
    from nemo_tiedlora.job.preview import check_datasets
    from nemo_tiedlora.nemo.model import build_model, build_trainer

    metric = cfg.model.data.validation_ds.metric.name
    facts = Facts()
    trainer, folder = build_trainer(
        cfg,
        [facts, ProgressBar(f"validation_{metric}"), DivergenceCheck(), Interruptible(), Recorded(record)],
    )
    say = _Say(results, trainer.is_global_zero)
    if trainer.is_global_zero:
        write_text(folder / "config.yaml", as_asked)  # again: on a resume, NeMo moves a folder's files aside
        record.write(folder / RECORD)
    model = build_model(cfg, cfg.model.restore_from_path, trainer, method)
    say.row(check_datasets(model, SECTIONS, begun=bool(trainer.ckpt_path)))
    model.set_inference_config(decoding(model.cfg.data))  # NeMo would draw its answers at random
    scheme = scheme_of(cfg)
    if trainer.ckpt_path:
        say("\n".join([f"resuming from {trainer.ckpt_path}", *changed]))
    else:
        facts.before = evaluate(trainer, model)
        facts.generated_before = [sample["generated"] for sample in generate_samples(model)]
        say(f"{metric} before: {_score(metric, facts.before)}")
    try:
        trainer.fit(model)
    except Interrupted as stopped:
        say(f"{stopped}; {_where_saved(trainer, folder)}")
        sys.exit(128 + stopped.signum)
    if trainer.global_step < trainer.max_steps and not facts.ended:
        say(f"stopped after step {trainer.global_step}, as exp_manager asked; {_where_saved(trainer, folder)}")
        sys.exit(0)
    trainer.ckpt_path = None  # else validation would load the checkpoint that this run resumed from
    adapter = _exported(trainer, model, facts)
    if method:
        trainable = sizes(method, base).trainable
    else:  # on this rank
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    after = evaluate(trainer, model)
    samples = [
        {"input": sample["input"], "expected": sample["expected"], "before": before, "after": sample["generated"]}
        for sample, before in zip(generate_samples(model), facts.generated_before, strict=True)
    ]
    percent = 100 * trainable / lora_size(method or _stock_lora(cfg), base)
    summary = {
        "scheme": scheme,
        "metric": metric,
        "metric_before": facts.before,
        "metric_after": after,
        "trainable": trainable,
        "percent_of_lora": round(percent, 2),
        "adapter": adapter and str(adapter),
        "seconds": round(facts.seconds, 2),
        "tokens_per_second": round(facts.tokens / max(facts.seconds, 1e-9)),
        "steps": facts.steps,
        "max_steps": cfg.trainer.max_steps,
        "base": cfg.model.restore_from_path,
        "samples": samples,
    }
    path = folder / SUMMARY
    if trainer.is_global_zero:
        _write_allocations(model, folder)
        write_text(path, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    say.samples(samples)
    weighs = f", in a file of {adapter.stat().st_size:,} bytes" if adapter and trainer.is_global_zero else ""
    say(
        f"{scheme}: {metric} {_score(metric, facts.before)} before, {_score(metric, after)} after {facts.steps} steps\n"
        f"trainable parameters: {trainable:,} ({percent:.1f} % of LoRA){weighs}\n"
        f"speed: {summary['tokens_per_second']:,} tokens/s, {facts.seconds:.1f} s of training\n"
        f"adapter: {adapter or 'not saved (exp_manager.create_checkpoint_callback is false)'}\n"
        f"{path}"
    )
    return path


def _exported(trainer, model, facts) -> Path | None:
    """The adapter's file, of the best checkpoint; None if nothing was to be saved.

    NeMo writes it when training ends. A run that was killed in between comes back with no step left to train.
    """
    saver = trainer.checkpoint_callback
    if saver is None or not saver.save_nemo_on_train_end:
        return None
    if not facts.ended:
        facts.ended = True
        saver.on_train_end(trainer, model)
    return Path(saver._format_nemo_checkpoint_name())


def _write_allocations(model, folder: Path) -> None:
    """DynaLoRA: who was active when, for ``tiedlora analyze allocation``."""
    from nemo_tiedlora.nemo.adaptations import Adaptations

    for adapted in Adaptations.of(model).values():
        if history := adapted.bank.variant.history():
            write_text(folder / "allocations.json", json.dumps(history, indent=1) + "\n")


def _where_saved(trainer, folder: Path) -> str:
    if trainer.checkpoint_callback is None:
        return "nothing was saved: exp_manager.create_checkpoint_callback is false."
    return f"saved in {folder / 'checkpoints'}. The same command continues from there."


def evaluate(trainer, model) -> float:
    """The metric on the test rows if there are any, else on the validation rows."""
    data = model.cfg.data
    name = data.validation_ds.metric.name
    if data.get("test_ds") and data.test_ds.get("file_names"):
        return trainer.test(model, verbose=False)[0][f"test_{name}"]
    return trainer.validate(model, verbose=False)[0][f"validation_{name}"]


def decoding(data: DictConfig) -> dict[str, Any]:
    """How answers are generated: greedily, to the end of the text or, in NeMo's chat rows, of the turn."""
    section = data.validation_ds
    config = {"greedy": True, "add_BOS": section.add_bos, "tokens_to_generate": section.tokens_to_generate}
    if data.get("chat") and chat_form(first_row(section.file_names[0])) == "conversations":
        config["end_strings"] = [(data.get("chat_prompt_tokens") or {}).get("turn_start", "<extra_id_1>")]
    return config


def generate_samples(model) -> list[dict[str, str]]:
    """Greedy completions of the first rows that ``evaluate`` used, beside what was expected."""
    data = model.cfg.data
    tested = data.get("test_ds") and data.test_ds.get("file_names")
    dataset = (model._test_ds if tested else model._validation_ds)[0]
    rows = [dataset[index] for index in range(min(SAMPLES, len(dataset)))]
    batch = dataset.collate_fn(rows)
    length = model.cfg.data.validation_ds.tokens_to_generate
    model.set_inference_config(decoding(data))
    output = model.predict_step(batch, 0)
    decode = model.tokenizer.ids_to_text
    return [
        {"input": decode(context), "expected": decode(answer), "generated": decode(ids[start:][:length])}
        for context, answer, ids, start in zip(
            [row["context_ids"] for row in rows],
            [row["answer_ids"] for row in rows],
            output["token_ids"],
            batch["context_lengths"].tolist(),
            strict=True,
        )
    ]


def _stock_lora(cfg: DictConfig) -> TiedConfig:
    """What NeMo's schemes are compared with: its LoRA, as the config has it."""
    lora = cfg.model.peft.lora_tuning
    return TiedConfig(
        preset="LoRA",
        rank=lora.adapter_dim,
        target_modules=list(lora.target_modules),
        layer_selection=lora.layer_selection and list(lora.layer_selection),
    )


def _score(metric: str, value: float) -> str:
    return f"{value:.4f}" if metric == "loss" else f"{100 * value:.1f} %"


class _Say:
    """Prints results on rank 0."""

    def __init__(self, stream: TextIO, enabled: bool):
        self.console = Console(file=stream, quiet=not enabled, highlight=False, soft_wrap=True)

    def __call__(self, line: str) -> None:
        self.console.print(Text(line))

    def row(self, parts: list[tuple[str, bool]]) -> None:
        """The first training row as the model sees it, with what is learned marked."""
        from nemo_tiedlora.job.preview import marked

        if not parts:
            return
        in_colour = self.console.is_terminal and not self.console.no_color
        how = "in bold" if in_colour else "between « and »"
        self.console.print(Text(f"first training row, what is learned {how}:\n").append(marked(parts, in_colour)))

    def samples(self, samples: list[dict[str, str]]) -> None:
        table = Table(show_lines=True)
        for name in samples[0]:
            table.add_column(name)
        for sample in samples:
            table.add_row(*(Text(text[-400:]) for text in sample.values()))
        self.console.print(table, soft_wrap=False)
