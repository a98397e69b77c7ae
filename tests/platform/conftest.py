"""Fixtures: a one-process model-parallel world, toy bases saved once, and hosts with one patch left out."""

import logging
from contextlib import contextmanager

import pytest
import toy

from nemo_tiedlora import platform
from nemo_tiedlora.platform.patch import Restore


@pytest.fixture(scope="session")
def host_without(nemo):
    """Enter the host with every patch this machine needs, but one."""

    @contextmanager
    def enter(name):
        with Restore() as restore:
            for patch in platform.patches():
                if patch.name != name and patch.needed():
                    patch.apply(restore)
            yield

    return enter


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """NeMo logs its whole configuration for every model; other folders' tests read logs."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def nemo():
    """NeMo imported, as the patches import it; nothing stays patched."""
    with platform.host():
        from nemo.collections.nlp.data.language_modeling.megatron import dataset_utils

        dataset_utils.compile_helper()  # once: a test that starts in the middle of a run may find nobody to do it


@pytest.fixture
def host(nemo):
    with platform.host() as entered:
        yield entered


@pytest.fixture
def world(host, tmp_path):
    """The host with a one-process model-parallel world."""
    with toy.one_process_world(tmp_path):
        yield


@pytest.fixture(scope="session")
def toys(nemo, tmp_path_factory):
    """Files every test may read: `gpt.nemo`, `llama.nemo`, `train.jsonl`, `validation.jsonl`, `tokenizer.model`."""
    folder = tmp_path_factory.mktemp("toys")
    tokenizer = toy.tokenizer(folder)
    toy.sums(folder / "train.jsonl", 200)
    toy.sums(folder / "validation.jsonl", 4, seed=1)
    with platform.host(), toy.one_process_world(folder):
        toy.save_base(toy.gpt_config(tokenizer), folder / "gpt.nemo")
        toy.save_base(toy.llama_config(tokenizer), folder / "llama.nemo")
    return folder


@pytest.fixture
def finetuning(toys):
    """A fine-tuning configuration for a base and a stock scheme."""

    def config(base, scheme, **overrides):
        files = (toys / name for name in (f"{base}.nemo", "train.jsonl", "validation.jsonl"))
        return toy.finetuning_config(*files, toy.STOCK_SCHEMES[scheme], **overrides)

    return config
