"""GPT-2 of Hugging Face's transformers."""

import re
from collections.abc import Callable
from typing import Any

import golden
from golden_systems import _text

import zoo


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The language model."""
    config = case.config
    fields = {}
    for ours, theirs in (
        ("vocab_size", ("vocab_size",)),
        ("max_positions", ("n_positions", "max_position_embeddings", "n_ctx")),
        ("embed_dim", ("n_embd", "hidden_size")),
        ("depth", ("n_layer", "num_hidden_layers")),
        ("num_heads", ("n_head", "num_attention_heads")),
        ("mlp_dim", ("n_inner",)),
        ("activation", ("activation_function",)),
        ("scale_attention", ("scale_attn_weights",)),
        ("scale_by_layer", ("scale_attn_by_inverse_layer_idx",)),
        ("tie_embeddings", ("tie_word_embeddings",)),
        ("epsilon", ("layer_norm_epsilon",)),
    ):
        for name in theirs:
            fields |= config.rename(**{ours: name})
    fields |= config.rename(cross_attention="add_cross_attention")
    config.ignore("reorder_and_upcast_attn", *_text.IGNORED)  # another order of the same numbers
    model = _text.as_filed(case, zoo.create("gpt2", **fields))
    return model, _text.run(case, model)


def made_by(case: golden.Case) -> bool:
    """Whether the header names transformers' class."""
    return re.search(r"transformers \S+ GPT2(LMHead)?Model", case.source) is not None
