"""Small encoders in float64, Megatron's order of rows written down once more, and what is in a folder."""

import torch
import transformers

ENCODERS = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig, {"intermediate_size": 40}),
    "roberta": (transformers.RobertaForSequenceClassification, transformers.RobertaConfig, {"intermediate_size": 40}),
}


def encoder(name):
    torch.manual_seed(0)
    kind, config, more = ENCODERS[name]
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    return kind(config(**sizes, **more, initializer_range=0.3)).double().eval()


def fused(q, k, v, groups, head):
    """Megatron's order of rows: a group's queries, its key, its value."""
    parts = [part.view(groups, -1, head, part.shape[-1]) for part in (q, k, v)]
    return torch.cat(parts, 1).flatten(0, 2)


def separate(whole, groups, head, heads):
    split = whole.view(groups, heads // groups + 2, head, -1)
    return split[:, :-2].flatten(0, 2), split[:, -2].flatten(0, 1), split[:, -1].flatten(0, 1)


def contents(folder):
    """Of the adapter's files; the page about it is for people."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "README.md"}
