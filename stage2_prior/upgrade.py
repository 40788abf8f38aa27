"""Weights as release 0.1 named them, before every prior stood on one trunk; they are renamed when they are loaded.

Layers of a LoRA that it named without the trunk's `decoder.` are found as well (`lora.py`).
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TRUNK = "decoder."
# By a regular expression of a whole name; what is joined one after another in one weight has its place behind "#".
PLAIN = {
    r"blocks\.(\d+)\.(qkv|out)\.(\w+)": r"decoder.blocks.\1.attention.\2.\3",
    r"(blocks\.\d+\.(?:attention|mlp)_.+|norm\.\w+)": r"decoder.\1",
}
GPT = {r"(blocks\..+|norm\.\w+)": r"decoder.\1"}
LLAMAGEN = {
    r"blocks\.(\d+)\.mlp_gate\.weight": r"decoder.blocks.\1.mlp_in.weight#0",
    r"blocks\.(\d+)\.mlp_in\.weight": r"decoder.blocks.\1.mlp_in.weight#1",
} | PLAIN
JANUS = {
    r"language_model\.layers\.(\d+)\.self_attn\.q_proj\.weight": r"decoder.blocks.\1.attention.qkv.weight#0",
    r"language_model\.layers\.(\d+)\.self_attn\.k_proj\.weight": r"decoder.blocks.\1.attention.qkv.weight#1",
    r"language_model\.layers\.(\d+)\.self_attn\.v_proj\.weight": r"decoder.blocks.\1.attention.qkv.weight#2",
    r"language_model\.layers\.(\d+)\.self_attn\.o_proj\.weight": r"decoder.blocks.\1.attention.out.weight",
    r"language_model\.layers\.(\d+)\.mlp\.gate_proj\.weight": r"decoder.blocks.\1.mlp_in.weight#0",
    r"language_model\.layers\.(\d+)\.mlp\.up_proj\.weight": r"decoder.blocks.\1.mlp_in.weight#1",
    r"language_model\.layers\.(\d+)\.mlp\.down_proj\.weight": r"decoder.blocks.\1.mlp_out.weight",
    r"language_model\.layers\.(\d+)\.input_layernorm\.weight": r"decoder.blocks.\1.attention_norm.weight",
    r"language_model\.layers\.(\d+)\.post_attention_layernorm\.weight": r"decoder.blocks.\1.mlp_norm.weight",
    r"language_model\.norm\.weight": r"decoder.norm.weight",
    r"language_model\.embed_tokens\.weight": r"text_embedding.weight",
}


def _bart(old: str, new: str) -> dict[str, str]:
    """The blocks of an encoder or a decoder."""
    table = {
        rf"{old}\.(\d+)\.attention\.{part}\.weight": rf"{new}.\1.attention.qkv.weight#{i}"
        for i, part in enumerate("qkv")
    }
    return table | {
        rf"{old}\.(\d+)\.attention\.out\.weight": rf"{new}.\1.attention.out.weight",
        rf"{old}\.(\d+)\.(attention|cross|mlp)\.norm\.(\w+)": rf"{new}.\1.\2_norm.\3",
        rf"{old}\.(\d+)\.(attention|cross)\.norm_out\.(\w+)": rf"{new}.\1.\2_norm_out.\3",
        rf"{old}\.(\d+)\.cross\.([qkv]|out)\.weight": rf"{new}.\1.cross.\2.weight",
        rf"{old}\.(\d+)\.mlp\.inner_norm\.(\w+)": rf"{new}.\1.mlp_hidden_norm.\2",
        rf"{old}\.(\d+)\.mlp\.gate\.weight": rf"{new}.\1.mlp_in.weight#0",
        rf"{old}\.(\d+)\.mlp\.value\.weight": rf"{new}.\1.mlp_in.weight#1",
        rf"{old}\.(\d+)\.mlp\.out\.weight": rf"{new}.\1.mlp_out.weight",
    }


BART = _bart("encoder", "encoder.blocks") | _bart("decoder", "decoder.blocks") | {
    r"encoder_norm\.(\w+)": r"encoder.norm.\1",
    r"norm\.(\w+)": r"decoder.norm.\1",
}  # fmt: skip
TABLES: dict[str, Mapping[str, str]] = {
    "gpt": GPT,
    "mindalle": PLAIN,
    "rudalle": PLAIN,
    "taming": PLAIN,
    "llamagen": LLAMAGEN,
    "janus": JANUS,
    "bart": BART,
    "pixelcnn": {r"(read_condition\.blocks\.\d+)\.(qkv|out)\.(\w+)": r"\1.attention.\2.\3"},
}


def upgrade(prior: Any, state: dict[str, Tensor], prefix: str = "", *rest: Any) -> None:
    """Renames and joins in place what release 0.1 wrote for this kind of prior (a hook before loading a state dict)."""
    table = {re.compile(re.escape(prefix) + old): prefix + new for old, new in TABLES[prior.config.type].items()}
    parts: dict[str, dict[str, Tensor]] = {}
    for name in [*state]:
        renamed = next((match.expand(new) for old, new in table.items() if (match := old.fullmatch(name))), None)
        if renamed is not None:
            target, _, number = renamed.partition("#")
            parts.setdefault(target, {})[number] = state.pop(name)
    for target, numbered in parts.items():
        whole = [numbered[number] for number in sorted(numbered)]
        state[target] = whole[0] if len(whole) == 1 else torch.cat(whole)
