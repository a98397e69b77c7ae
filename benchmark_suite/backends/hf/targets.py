"""What variants' words for linear layers, which are NeMo's, mean on models that NeMo does not run."""

import re
from collections.abc import Iterable
from typing import Any

from nemo_tiedlora.facade import TARGET_NAMES, UsageError, known_family, linear_sizes

#: Word → how the names of its modules end, in transformers' models.
WORDS = {
    "attention_q": r"q_proj|self\.query|q_lin|query_proj",
    "attention_k": r"k_proj|self\.key|k_lin|key_proj",
    "attention_v": r"v_proj|self\.value|v_lin|value_proj",
    "attention_qkv": r"c_attn|qkv_proj|query_key_value|Wqkv",
    "attention_dense": r"o_proj|attention\.output\.dense|out_lin|attn\.c_proj|attention\.dense|attn\.Wo",
    "mlp_gate": r"gate_proj",
    "mlp_up": r"up_proj|intermediate\.dense|c_fc|lin1|dense_h_to_4h",
    "mlp_fc1": r"gate_up_proj|mlp\.Wi",
    "mlp_fc2": r"down_proj|layer\.\d+\.output\.dense|mlp\.c_proj|lin2|dense_4h_to_h|mlp\.Wo",
}
#: Words that stand for several matrices, where these are not one module.
WHOLE = {"attention_qkv": ("attention_q", "attention_k", "attention_v"), "mlp_fc1": ("mlp_gate", "mlp_up")}
#: Parts of a vision-language model that read no text.
ELSEWHERE = re.compile(r"vision|visual|image|projector")


def is_family(model: Any) -> bool:
    """Whether NeMo runs such models too, so that the plugin knows the words on it."""
    try:
        return known_family(model) is not None
    except UsageError:  # of a family, with something that NeMo does not compute
        return False


def names_of(model: Any, targets: Iterable[str]) -> list[str]:
    """The targets, with every word replaced by the names of the modules that it stands for.

    Raises:
        UsageError: a word for layers that have none of the known names.
    """
    there = [name for name, module in model.named_modules() if linear_sizes(module) and not ELSEWHERE.search(name)]
    names: list[str] = []
    for target in targets:
        words = TARGET_NAMES.get(target, [target])
        found = [name for word in words for name in _of_word(word, there)] if set(words) <= set(WORDS) else [target]
        if not found:
            way_out = f"no layer of a {type(model).__name__} has a known name for it; name its modules instead"
            raise UsageError("target_modules", target, way_out)
        names += [name for name in found if name not in names]
    return names


def _of_word(word: str, there: list[str]) -> list[str]:
    ending = re.compile(rf"(?:^|\.)(?:{WORDS[word]})$")
    return [name for name in there if ending.search(name)] or [
        name for part in WHOLE.get(word, ()) for name in _of_word(part, there)
    ]
