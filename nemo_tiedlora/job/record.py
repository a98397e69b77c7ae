"""What decides the numbers of a run: recorded when it starts, compared when it continues.

A run continues to the result it would have had undisturbed, or not at all. So the record holds every setting that
moves a number, and the content of every file that the run reads; a rerun must agree with it. docs/continuing.md lists
what may change and what that does.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_tiedlora.checkpoint.adapter import installed
from nemo_tiedlora.checkpoint.store import CONFIG
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import content_of, sha256_of, write_text
from nemo_tiedlora.job.inputs import STOCK_SCHEMES
from nemo_tiedlora.own_methods import LOADED, OPTION
from nemo_tiedlora.ranks import launched
from nemo_tiedlora.variants import METHODS

#: Settings that move no number: where things go, how they are shown and read.
FREE = re.compile(
    r"(?:name|verbose|trust_sha256)"
    r"|exp_manager\.(?!checkpoint_callback_params\.(?:monitor|mode|filename)$|\w*early_stopping).*"
    r"|trainer\.(?:logger|accelerator|devices|num_nodes|log_every_n_steps|enable_\w+)"
    r"|model\.(?:resume_from_checkpoint|save_nemo_on_validation_end|sync_batch_comm)"
    r"|model\.data\.\w+\.(?:num_workers|memmap_workers|pin_memory|index_mapping_dir|names|write_predictions_to_file"
    r"|output_file_path_prefix)"
)
#: Settings that move no number by more than rounding does, or only when there is an evaluation; a rerun says so.
SAID = re.compile(
    r"model\.(?:\w+_parallel(?:_size)?|activations_checkpoint_\w+|gradient_as_bucket_view)"
    r"|trainer\.(?:val_check_interval|limit_(?:val|test)_batches|num_sanity_val_steps)"
)
#: Settings that name files: what counts is what is in them.
FILES = re.compile(r".*\.(?:restore_from_path|file_names|data|groups)")


@dataclass(frozen=True)
class Record:
    """What a run was started with.

    Args:
        settings: by dotted name, all that may move a number.
        files: SHA-256 of what is in the files that a setting names, by its name; and ``--methods``.
        versions: of the packages that matter.
        processes: how many share the work.
    """

    settings: dict[str, Any]
    files: dict[str, list[str]]
    versions: dict[str, str]
    processes: int

    @classmethod
    def of(cls, cfg: DictConfig) -> "Record":
        """Of a completed config; reads its files through."""
        settings, files = {}, {}
        for name, value in _flat(OmegaConf.to_container(cfg)):
            if FREE.fullmatch(name) or _is_of_another_scheme(name, str(cfg.model.peft.peft_scheme)):
                continue
            paths = [path for path in (value if isinstance(value, list) else [value]) if isinstance(path, str)]
            named = [_content(Path(path)) for path in paths] if FILES.fullmatch(name) else []
            if named and all(path.is_file() for path in named):
                files[name] = [content_of(path) for path in named]
            else:
                settings[name] = value
        if LOADED:
            files[OPTION] = sorted(map(sha256_of, LOADED))
        return cls(settings, files, installed(), launched() or cfg.trainer.devices * cfg.trainer.num_nodes)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """From ``path``, where ``write`` put it.

        Raises:
            UsageError: it is damaged.
        """
        try:
            return cls(**json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError, RecursionError):
            way_out = "damaged, so the run cannot be continued; name another folder, or remove this one"
            raise UsageError("exp_manager", str(path), way_out) from None

    def write(self, path: Path) -> None:
        """To ``path``, as JSON."""
        write_text(path, json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, equal to what is read back from JSON."""
        return json.loads(json.dumps(asdict(self)))

    def check_continues(self, earlier: "Record", where: str | Path) -> list[str]:
        """What continuing ``earlier`` with this changes without changing the result, one line each.

        Args:
            where: the run or the checkpoint that is to be continued, for messages.

        Raises:
            UsageError: the result would be another.
        """
        way_out = "name another folder (exp_manager.exp_dir, exp_manager.name), or exp_manager.resume_if_exists=false"
        said = []
        for name in sorted(self.settings.keys() | earlier.settings.keys()):
            now, then = self.settings.get(name), earlier.settings.get(name)
            if now == then:
                continue
            longer = name == "trainer.max_steps"
            if (SAID.fullmatch(name) and not self._is_cut_by(name)) or (longer and self._ends_anywhere()):
                said.append(f"{name}={now} from here on; it was {then}")
            else:
                why = ", and its learning rates or order of rows depend on it" if longer else ""
                free = ", or start with model.optim.sched.max_steps to be free of it" if longer else ""
                raise UsageError(name, now, f"{where} was started with {then!r}{why}; {way_out}{free}")
        for name in sorted(self.files.keys() | earlier.files.keys()):
            if self.files.get(name) != earlier.files.get(name):
                content = [sha256[:12] for sha256 in self.files.get(name, ())]
                raise UsageError(name, content, f"{where} was started with other content (SHA-256); {way_out}")
        for name in sorted(self.versions.keys() | earlier.versions.keys()):
            if self.versions.get(name) != earlier.versions.get(name):
                said.append(f"{name} {self.versions.get(name)} from here on; it was {earlier.versions.get(name)}")
        if self.processes != earlier.processes:
            said.append(f"{self.processes} processes from here on; there were {earlier.processes}")
        return said

    def _is_cut_by(self, name: str) -> bool:
        """Whether checkpoints are cut by this setting: NeMo's own schemes have a file for each rank."""
        scheme = self.settings["model.peft.peft_scheme"]
        return bool(re.fullmatch(r"model\.\w+_parallel(_size)?", name)) and scheme not in (*METHODS, "none")

    def _ends_anywhere(self) -> bool:
        """Whether every step is the same wherever the run ends."""
        schedule = any(name.startswith("model.optim.sched.") for name in self.settings)
        fixed = not schedule or self.settings.get("model.optim.sched.max_steps") is not None
        return fixed and not self.settings.get("model.data.train_ds.global_sample_mapping")


def _content(path: Path) -> Path:
    """The file that says what is at ``path``: of an adapter's folder its config, which has the checksum of the rest."""
    return path / CONFIG if path.is_dir() else path


def _flat(section: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _is_of_another_scheme(name: str, scheme: str) -> bool:
    section = re.match(r"model\.peft\.(\w+)\.", name)
    own = f"{scheme}_tuning" if scheme in METHODS else STOCK_SCHEMES.get(scheme)
    return bool(section) and section[1] != own
