"""OPT of Hugging Face's transformers."""

import re
from collections.abc import Callable
from typing import Any

import golden
from golden_systems import _text

import zoo


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The language model."""
    config = case.config
    fields = config.rename(
        vocab_size="vocab_size",
        embed_dim="hidden_size",
        depth="num_hidden_layers",
        num_heads="num_attention_heads",
        mlp_dim="ffn_dim",
        max_positions="max_position_embeddings",
        word_dim="word_embed_proj_dim",
        pre_norm="do_layer_norm_before",
        activation="activation_function",
        use_bias="enable_bias",
        norm_affine="layer_norm_elementwise_affine",
        tie_embeddings="tie_word_embeddings",
    )
    fields["final_norm"] = not config.take("_remove_final_layer_norm", False)
    config.ignore(*_text.IGNORED)
    model = _text.as_filed(case, zoo.create("opt_125m", **fields))
    return model, _text.run(case, model)


def made_by(case: golden.Case) -> bool:
    """Whether the header names transformers' class itself."""
    return re.match(r"transformers \S+ OPT(ForCausalLM|Model)", case.source) is not None
