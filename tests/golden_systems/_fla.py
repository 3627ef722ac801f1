"""What GLA and DeltaNet share: configurations of flash-linear-attention."""

from collections.abc import Callable
from typing import Any

import golden
import numpy as np

import zoo


def build(case: golden.Case, base: str) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """GLA and DeltaNet, from the configurations of flash-linear-attention."""
    config = case.config
    own = config.rename(
        vocab_size="vocab_size",
        embed_dim="hidden_size",
        depth="num_hidden_layers",
        num_heads="num_heads",
        num_kv_heads="num_kv_heads",
        expand_key="expand_k",
        expand_value="expand_v",
        epsilon="norm_eps",
        mlp_dim="intermediate_size",
        tie_embeddings="tie_word_embeddings",
    )
    if base == "gla":
        own |= config.rename(output_gate="use_output_gate", lowest_gate="clamp_min")
        own["feature_map"] = config.take("feature_map") or "identity"
        short, size = config.take("use_short_conv", False), config.take("conv_size", 4)
    else:
        own |= config.rename(
            activation="qk_activation",
            normalise="qk_norm",
            write_strength="use_beta",
            negative_eigenvalues="allow_neg_eigval",
            output_gate="use_gate",
        )
        short, size = config.take("use_short_conv", True), config.take("conv_size", 4)
    own["conv_size"] = size if short else 0
    softmax = config.take("attn") or {}
    names = dict(
        layers="attention_layers", num_heads="attention_heads", num_kv_heads="attention_kv_heads",
        window_size="window", rope_theta="rope_theta", qkv_bias="attention_bias",
    )  # fmt: skip
    if unknown := set(softmax) - set(names):
        raise golden.Unsupported(f"its attn has {', '.join(sorted(unknown))}")
    own |= {names[key]: value for key, value in softmax.items()}
    config.expect(
        hidden_act=("swish", "silu"), attn_mode=("chunk", "fused_chunk", "fused_recurrent"),
        hidden_ratio=(4, None), attnres_block_size=None,
    )  # fmt: skip
    config.ignore("class_", "max_position_embeddings", "fuse_norm", "fuse_swiglu",
                  "fuse_cross_entropy", "use_cache", "initializer_range", "bos_token_id",
                  "eos_token_id", "pad_token_id", "model_type")  # fmt: skip
    model = zoo.info(f"{base}_340m").create(**own)
    tokens = case.input("input_ids").astype(np.int32)
    return model, lambda variables: golden.features(model, tokens)(variables)
