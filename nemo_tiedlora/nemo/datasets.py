"""NeMo's datasets of rows, reading files as people write them and refusing rows of which nothing would be learned."""

import json
import os
from copy import copy
from hashlib import sha256
from pathlib import Path

import numpy
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset
from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import JSONLMemMapDataset

from nemo_tiedlora.errors import UsageError


class Row(dict):
    """A row of a file that knows its line, from 1."""

    line: int


class Rows(JSONLMemMapDataset):
    """The rows of one JSONL file, which may begin with a byte order mark."""

    def __init__(self, path: str, index: str | None, workers: int | None):
        if index:
            # NeMo keeps an index it finds, though the file may be another one since.
            facts = os.stat(path)
            key = f"{Path(path).resolve()} {facts.st_size} {facts.st_mtime_ns}"
            index = str(Path(index) / sha256(key.encode()).hexdigest()[:16])
        super().__init__([path], index_mapping_dir=index, workers=workers)

    def __getitem__(self, index):
        row = Row(super().__getitem__(index))
        row.line = int(index) + 1
        return row

    def _build_data_from_text(self, text):
        return json.loads(text.removeprefix("\ufeff"))

    def longer_than(self, size: int) -> list[int]:
        """Indices of the rows whose lines have more bytes than ``size``."""
        ((_, ends),) = self.mdata_midx_list
        return numpy.flatnonzero(numpy.diff(ends, prepend=-1) - 1 > size).tolist()


class JsonRows:
    """What our datasets share; NeMo's class follows it in the bases."""

    def _load_dataset(self):
        if self.hf_dataset:
            super()._load_dataset()
        else:
            self.indexed_dataset = Rows(self.file_path, self.index_mapping_dir, self.memmap_workers)

    def row(self, index: int) -> dict:
        """The row of a line (from 0) as it goes into a batch.

        Raises:
            UsageError: nothing of it would be learned.
        """
        return self._process_example(self.indexed_dataset[index])

    def check_rows(self) -> None:
        """Raise ``UsageError`` for a row that may be too long (or the first) if nothing of it would be learned."""
        rows = self.indexed_dataset
        long = rows.longer_than(self.sure_to_fit()) if isinstance(rows, Rows) else range(1, len(rows))
        for index in (0, *long):
            self.row(index)

    def sure_to_fit(self) -> int:
        """Bytes of a line that are no more than ``max_seq_length`` tokens; chat templates add some of their own."""
        return self.max_seq_length // 2

    def where(self, example: dict) -> str:
        """What to call a row."""
        return f"line {example.line} of {self.file_path}" if isinstance(example, Row) else f"a row of {self.file_path}"

    def too_short(self, example: dict, needed: int) -> UsageError:
        """The error that says how many tokens a row needs."""
        way_out = f"no room for a prompt and its answer: {self.where(example)} has {needed} tokens"
        return UsageError("max_seq_length", self.max_seq_length, way_out)


class TemplateDataset(JsonRows, GPTSFTDataset):
    """Rows put into a prompt template."""

    def _process_example(self, example):
        processed = super()._process_example(example)
        label = example.get(self.label_key) or ""
        whole_answer_cut = bool(label.strip(" ")) and not processed["answer_ids"]
        nothing_to_answer = self.is_test and self.tokens_to_generate and not processed["context_ids"]
        if whole_answer_cut or nothing_to_answer or not any(self.learned(processed)[1:]):
            unlimited = copy(self)
            unlimited.max_seq_length = 2**40
            needed = GPTSFTDataset._process_example(unlimited, example)["token_count"]
            raise self.too_short(example, needed)
        return processed

    def sure_to_fit(self) -> int:
        # A token has at least one byte; the marks of the beginning and the end are tokens too.
        return self.max_seq_length - len(self.prompt_template.encode()) - 4

    def learned(self, processed: dict) -> list[bool]:
        """Which tokens of a row's ``input_ids`` the loss is computed on."""
        return [bool(weight) for weight in self._build_loss_mask(processed)]
