"""One model twice: as transformers saved it, and as the base that was made of it."""

import torch
import toy
import transformers
from huggingface import saved_models

from nemo_tiedlora.huggingface.export import export
from nemo_tiedlora.job.generate import generator

IDS = torch.randint(saved_models.TOKENS, (2, 40), generator=torch.Generator().manual_seed(1))


def transformers_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()


@torch.no_grad()
def logits(folder):
    """Of transformers, without an adapter."""
    return transformers_model(folder)(IDS).logits


@torch.no_grad()
def nemo_logits(base, adapter):
    """Of NeMo, with an adapter of whatever form it reads."""
    with toy.clean_megatron(), generator(base, adapter) as loaded:
        return loaded.model.model(IDS.cuda(), torch.arange(IDS.shape[1]).expand_as(IDS).cuda(), None).cpu()


def exported(adapter, base, form, out, dtype="float32", force=False):
    """Export an adapter; return what is said of it."""
    return export(adapter, base, form, out, dtype, None, force)
