"""One probe per patch: it fails on the stock host and passes with the patch.

A probe that passes without its patch means that these versions no longer need it: delete the patch.
"""

import io
import json
import os
import pickle
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import toy

from nemo_tiedlora import platform
from nemo_tiedlora.errors import UsageError

BF16 = torch.bfloat16
PROBES = {}


def probe(function):
    PROBES[function.__name__] = function
    return function


def linear_config(**overrides):
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, **overrides)


def assert_refused(read, *arguments, **settings):
    try:
        read(*arguments, **settings)
    except UsageError as error:
        assert "could run code" in str(error)
    else:
        raise AssertionError("read")


@probe
def torch_load_without_code(tmp_path, **_):
    torch.save(Path.touch, tmp_path / "file")
    assert_refused(torch.load, tmp_path / "file", weights_only=False)


@probe
def piece_lists_without_code(tmp_path, **_):
    from torch.distributed.checkpoint import FileSystemReader

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Path.touch))
    assert_refused(FileSystemReader(tmp_path).read_metadata)


@probe
def tokenizer_files_inside(tmp_path, **_):
    from nemo.collections.nlp.models.language_modeling import megatron_base_model
    from tokenizers import Tokenizer, models

    files = tmp_path / "1_tokenizer.json", tmp_path / "2_tokenizer_config.json"
    Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, "a")).save(str(files[0]))
    settings = {"eos_token": "<end>", "chat_template": "{{ 1 }}", "additional_special_tokens": ["a"]}
    files[1].write_text(json.dumps(settings | {"tokenizer_class": "Other", "auto_map": {"AutoTokenizer": ["code.A"]}}))
    made = megatron_base_model.get_nmt_tokenizer("huggingface", None, str(files[0]), merges_file=str(files[1]))
    assert (made.eos_id, made.vocab_size, made.additional_special_tokens) == (1, 2, ["a"])
    assert made.tokenizer.chat_template == "{{ 1 }}"


@probe
def tokenizers_before_workers(**_):
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


@probe
def row_indices_without_code(**_):
    from nemo.collections.nlp.data.language_modeling import text_memmap_dataset

    assert_refused(text_memmap_dataset.pickle.load, io.BytesIO(pickle.dumps(Path.touch)))


@probe
def cuda_devices(**_):
    assert torch.zeros(1, device="cuda").to(torch.device("cuda")).device.type == "cpu"


@probe
def cuda_calls(**_):
    torch.nn.Linear(1, 1).cuda()(torch.zeros(1).cuda())
    torch.cuda.synchronize()


@probe
def cuda_tensor_types(**_):
    assert isinstance(torch.cuda.LongTensor([1]), torch.Tensor)


@probe
def cuda_autocast(**_):
    with torch.autocast("cuda", BF16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is BF16
        assert torch.is_autocast_enabled("cuda")


@probe
def cuda_random_state(world, **_):
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        first = torch.rand(2)
    tensor_parallel.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
    torch.rand(3)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        assert torch.equal(torch.rand(2), first)


@probe
def cuda_seed(world, **_):
    from megatron.core import tensor_parallel
    from nemo.collections.nlp.modules.common.megatron import megatron_init

    with world():
        tensor_parallel.get_cuda_rng_tracker().reset()
        megatron_init._set_random_seed(7)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            pass


@probe
def expert_router(**_):
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    x, weight = torch.randn(3, 2, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    router_gating_linear(x, weight, torch.float32).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))


@probe
def cuda_accelerator(**_):
    from lightning.pytorch import Trainer

    Trainer(accelerator="gpu", devices=2, logger=False, enable_checkpointing=False)


@probe
def cuda_main_params(**_):
    from nemo.core.optim import MainParamsOptimizerWrapper

    weight = torch.nn.Parameter(torch.ones(4, dtype=BF16))
    with mock.patch("nemo.core.optim.optimizer_with_main_params.get_data_parallel_world_size", return_value=1):
        wrapper = MainParamsOptimizerWrapper(torch.optim.SGD([weight], lr=2**-12))
    weight.grad = torch.ones_like(weight)
    for _ in range(16):
        wrapper.copy_model_grads_to_main_grads()
        wrapper.step()
        weight.grad = torch.ones_like(weight)
    # One step of 2^-12 is lost in bfloat16; sixteen of them are not.
    assert weight[0].item() == 1 - 2**-8


@probe
def cuda_distributed_optimizer(**_):
    from megatron.core.optimizer import optimizer

    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.ones(4)
    optimizer.clip_grad_by_total_norm_fp32([weight], 1.0, 2.0)
    assert weight.grad[0].item() == pytest.approx(0.5, abs=1e-5)


@probe
def fused_kernels(**_):
    assert not linear_config(apply_rope_fusion=True).apply_rope_fusion


@probe
def jit_fused_functions(**_):
    from megatron.core.fusions.fused_bias_gelu import bias_gelu

    with mock.patch("torch._dynamo.eval_frame.set_eval_frame", side_effect=AssertionError("compiles")):
        bias_gelu(torch.ones(2), torch.ones(2))


@probe
def torch_norm(**_):
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = linear_config(sequence_parallel=True, tensor_model_parallel_size=2, persist_layer_norm=True)
    assert WrappedTorchNorm(config, 8).weight.sequence_parallel


@probe
def apex_guards(**_):
    from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy

    NLPDDPStrategy()


@probe
def apex_parameter_groups(**_):
    from nemo.collections.nlp.modules.common.megatron.utils import get_params_for_weight_decay_optimization

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), torch.nn.RMSNorm(2))
    decayed, plain = get_params_for_weight_decay_optimization(model)
    assert len(decayed["params"]) == 1 and len(plain["params"]) == 4


@probe
def apex_autocast(**_):
    from nemo.collections.nlp.modules.common.megatron.fused_bias_gelu import fused_bias_gelu

    with torch.autocast("cpu", BF16):
        assert fused_bias_gelu(torch.ones(2), torch.ones(2)).dtype is BF16


@probe
def apex_gradient_clipping(world, **_):
    from nemo.collections.nlp.modules.common.megatron.clip_grads import clip_grad_norm_fp32

    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.ones(4)
    with world():
        assert clip_grad_norm_fp32([weight], 1.0).item() == pytest.approx(2)


@probe
def apex_fused_adam(**_):
    from nemo.core import optim

    optim.get_optimizer("fused_adam", lr=1e-3)([torch.nn.Parameter(torch.zeros(1))])


@probe
def apex_adapter_norm(world, **_):
    from nemo.collections.nlp.modules.common.megatron.adapters.parallel_adapters import ParallelLinearAdapter

    with world():
        ParallelLinearAdapter(8, 8, 4, norm_position="pre", norm_type="mixedfusedlayernorm")(torch.ones(2, 1, 8))


@probe
def apex_distributed_adam(**_):
    from megatron.core import optimizer

    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.ones(4)
    adam = optimizer.Adam([weight])
    adam.step()
    assert adam.param_groups[0]["step"] == 1 and "step" not in adam.state[weight]


@probe
def transformer_engine_layers(**_):
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import get_specs

    get_specs("", linear_config())
    with pytest.raises(ValueError, match="needs Transformer Engine"):
        get_specs("megatron_gemma2", linear_config())


@probe
def local_layers_process_groups(toys, **_):
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

    with toy.clean_megatron():
        config = toy.gpt_config(toys / "tokenizer.model")
        MegatronGPTModel(config, toy.trainer(config))


@probe
def sequence_parallel_adapters(world, **_):
    from megatron.core import ModelParallelConfig
    from nemo.collections.nlp.modules.common.megatron.adapters.parallel_adapters import ParallelLinearAdapter

    config = ModelParallelConfig(sequence_parallel=True, tensor_model_parallel_size=2)
    with world():
        assert ParallelLinearAdapter(8, 8, 4, norm_position=None, model_parallel_config=config)._sequence_parallel


@probe
def generation_strategy(**_):
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.modules.common import text_generation_strategy

    model = mock.Mock(spec=MegatronGPTModel, model=None, training=False)
    strategy = text_generation_strategy.model_inference_strategy_dispatcher(model)
    assert isinstance(strategy, text_generation_strategy.GPTModelTextGenerationStrategy)


@probe
def checkpoint_results_queue(**_):
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    no_spawn = mock.patch.object(filesystem_async.mp, "get_context", side_effect=AssertionError("spawns"))
    with no_spawn, mock.patch.object(filesystem_async, "_results_queue", None):
        queue = filesystem_async._get_write_results_queue()
    queue.put(1)
    assert queue.get_nowait() == 1


@probe
def dataset_helper_build(**_):
    from nemo.collections.nlp.data.language_modeling.megatron import dataset_utils

    dataset_utils.compile_helper()
    assert len(list(Path(dataset_utils.__file__).parent.glob("helpers*.so"))) == 1


@probe
def container_version(**_):
    from nemo.collections.nlp.models.language_modeling.megatron_base_model import MegatronBaseModel

    MegatronBaseModel._enable_nvidia_optimizations(mock.Mock())


@probe
def adapter_mixins(finetuning, **_):
    with toy.clean_megatron():
        toy.finetune(
            finetuning("gpt", "lora-all"),
            max_steps=1,
            num_sanity_val_steps=0,
            val_check_interval=1,
            limit_val_batches=0,
        )


@probe
def recompute_with_frozen_input(world, **_):
    from megatron.core import tensor_parallel

    weight = torch.nn.Parameter(torch.ones(2, 2))
    with world():
        tensor_parallel.checkpoint(lambda x: x @ weight, False, torch.ones(2, 2)).sum().backward()
    assert weight.grad is not None


@probe
def recompute_in_mixed_precision(world, **_):
    from megatron.core import tensor_parallel

    weight = torch.nn.Parameter(torch.ones(2, 2))
    x = torch.ones(2, 2, dtype=BF16, requires_grad=True)
    with world():
        with torch.autocast("cuda", BF16):
            y = tensor_parallel.checkpoint(lambda x: x @ weight, False, x)
        y.sum().backward()
    assert weight.grad is not None


@probe
def ia3_without_query_groups(toys, **_):
    from nemo.collections.nlp.parts.peft_config import IA3PEFTConfig

    config = toy.gpt_config(toys / "tokenizer.model", peft=toy.STOCK_SCHEMES["ia3"])
    assert IA3PEFTConfig(config).get_config_dict()["key_infused_adapter"].in_features == 32
    assert config.num_query_groups is None


@probe
def generation_under_sequence_parallelism(**_):
    from nemo.collections.nlp.modules.common import text_generation_utils

    embedding = torch.nn.Module()
    embedding.reduce_scatter_embeddings = True
    model = torch.nn.Sequential(embedding)
    text_generation_utils.synced_generate(model)
    assert embedding.reduce_scatter_embeddings


@probe
def optimizer_steps_in_checkpoints(**_):
    from megatron.core.dist_checkpointing import ShardedTensor
    from nemo.collections.nlp.parts import nlp_overrides

    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    adam = torch.optim.AdamW([weight])
    adam.step()
    state = adam.state_dict()
    sharded = ShardedTensor.from_rank_offsets("weight", weight.data)
    nlp_overrides.optim_state_to_sharding_state(state, {0: sharded})
    assert state["state"]["common_step"].item() == 1 and adam.state[weight]["step"].item() == 1


@probe
def micro_batches(world, **_):
    from megatron.core import num_microbatches_calculator as calculator
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel

    with world(), mock.patch.object(calculator, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR", None):
        calculator.init_num_microbatches_calculator(0, None, 8, 2, 1)
        found = calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR
        model = mock.Mock(spec=MegatronGPTSFTModel, **{"get_inference_config.return_value": {}})
        model.modules.return_value, model.cfg.activations_checkpoint_granularity = [], None
        generating = "nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model.generate"
        with mock.patch(generating, return_value="text"):
            MegatronGPTSFTModel.predict_step(model, {"tokens": torch.zeros(3, 1), **dict.fromkeys(
                ("contexts", "context_lengths"), torch.zeros(3, 1))}, 0)  # fmt: skip
        assert calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is found


@probe
def generation_without_dropout(**_):
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel

    class Model(torch.nn.Module):
        predict_step = MegatronGPTSFTModel.predict_step
        cfg = mock.Mock(activations_checkpoint_granularity=None)

        def get_inference_config(self):
            assert not self.inner.training
            raise StopIteration

    model = Model()
    model.inner = torch.nn.Dropout()
    with pytest.raises(StopIteration):
        model.predict_step({"tokens": torch.zeros(1, 1)}, 0)
    assert model.inner.training


@probe
def pieces_of_a_batch(**_):
    from nemo.collections.nlp.data.language_modeling.megatron.megatron_batch_samplers import (
        MegatronPretrainingBatchSampler as Sampler,
    )

    def pieces(rank, ranks):
        sampler = Sampler(21, 0, 2, 8, rank, ranks, drop_last=False, pad_samples_to_global_batch_size=True)
        return [{tuple(batch[at : at + 2]) for at in range(0, len(batch), 2)} for batch in sampler]

    alone, first, second = pieces(0, 1), pieces(0, 2), pieces(1, 2)
    assert len(alone) == 3 and (18, 19) in alone[2] and (20, -1) in alone[2]
    assert [ours | others for ours, others in zip(first, second, strict=True)] == alone


@probe
def generation_without_recomputation(**_):
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
    from omegaconf import OmegaConf

    names = ("granularity", "method", "num_layers", "layers_per_pipeline")
    cfg = OmegaConf.create({f"activations_checkpoint_{name}": 1 for name in names})
    model = mock.Mock(spec=MegatronGPTSFTModel, cfg=cfg, **{"modules.return_value": []})
    model.get_module_list = model.get_model_module_list.return_value = []
    for name in ("_reset_activation_checkpointing_args", "_restore_activation_checkpointing_args"):
        setattr(model, name, getattr(MegatronGPTSFTModel, name).__get__(model))

    def generating():
        assert cfg.activations_checkpoint_granularity is None
        raise StopIteration

    model.get_inference_config.side_effect = generating
    with pytest.raises(StopIteration):
        MegatronGPTSFTModel.predict_step(model, {"tokens": torch.zeros(1, 1)}, 0)
    assert set(cfg.values()) == {1}


@probe
def rows_by_epoch(**_):
    from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import OnlineSampleMapping

    short, long = (OnlineSampleMapping(7, samples)[:] for samples in (24, 60))
    assert long[:24] == short
    assert all(sorted(row for row, *_ in long[at : at + 7]) == list(range(7)) for at in range(0, 56, 7))


@pytest.fixture
def before_entering(monkeypatch, tmp_path):
    """What some probes need in place before any patch is applied."""
    from nemo.collections.nlp.data.language_modeling.megatron import dataset_utils
    from nemo.collections.nlp.modules.common import text_generation_utils

    def generate(model):
        assert not any(getattr(module, "reduce_scatter_embeddings", False) for module in model.modules())

    monkeypatch.delenv("NVIDIA_PYTORCH_VERSION", raising=False)
    monkeypatch.setattr(text_generation_utils, "synced_generate", generate)
    # The helper's folder with a tiny source, and a PATH with the compiler but no Python.
    folder = tmp_path / "megatron"
    folder.mkdir()
    shutil.copy(Path(dataset_utils.__file__).with_name("Makefile"), folder)
    (folder / "helpers.cpp").write_text("#include <Python.h>\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("make", "g++", "as", "ld", "sh"):
        (programs / name).symlink_to(shutil.which(name))
    monkeypatch.setattr(dataset_utils, "__file__", str(folder / "dataset_utils.py"))
    monkeypatch.setenv("PATH", str(programs))


@probe
def ordered_collectives(world, **_):
    with world():
        for _ in range(50):  # each looked at right away: alone, none would be ready so soon
            assert torch.distributed.all_reduce(torch.ones(100_000), async_op=True).is_completed()


def test_every_patch_has_a_probe():
    assert set(PROBES) == {patch.name for patch in platform.patches()}


@pytest.mark.parametrize("patch", platform.patches(), ids=lambda patch: patch.name)
def test_patch_is_needed_and_helps(patch, before_entering, host_without, toys, finetuning, tmp_path):
    if not patch.needed():
        pytest.skip("this machine has the real thing")
    worlds = iter(range(2))

    def world():
        folder = tmp_path / f"world{next(worlds)}"
        folder.mkdir()
        return toy.one_process_world(folder)

    resources = dict(world=world, toys=toys, finetuning=finetuning, tmp_path=tmp_path)
    with host_without(patch.name), pytest.raises((Exception, SystemExit)):
        PROBES[patch.name](**resources)
    with platform.host():
        PROBES[patch.name](**resources)
