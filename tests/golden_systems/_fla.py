"""What GLA and DeltaNet share: configurations of flash-linear-attention."""

from collections.abc import Callable
from typing import Any

import golden
from golden_systems import _text

import zoo
from zoo.layers.decoder import multiple_of_256


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
        own |= config.rename(
            output_gate="use_output_gate",
            lowest_gate="clamp_min",
            norm_scale="elementwise_affine",
            gate_normalizer="gate_logit_normalizer",
            gate_rank="gate_low_rank_dim",
        )
        config.expect(gate_fn=("swish", "silu"))
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
    ratio = config.take("hidden_ratio")
    if ratio and own.get("mlp_dim") is None:
        own["mlp_dim"] = multiple_of_256(own.get("embed_dim", 2048), ratio)
    own |= softmax_layers(config.take("attn") or [])
    config.expect(
        hidden_act=("swish", "silu"), attn_mode=("chunk", "fused_chunk", "fused_recurrent"),
        attnres_block_size=None, conv_bias=False,
    )  # fmt: skip
    # How kernels are fused, and what the layers take and never read.
    config.ignore("max_position_embeddings", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy",
                  "fuse_linear_cross_entropy", "use_l2warp", "use_gk", "use_gv",
                  "use_output_norm", "transformers_version", *_text.IGNORED)  # fmt: skip
    model = _text.as_filed(case, zoo.info(f"{base}_340m").create(**own))
    return model, _text.run(case, model)


def softmax_layers(attn: Any) -> dict[str, tuple]:
    """Fields of the layers that are softmax attention, from a description, or one for each set."""
    kinds = dict(
        num_heads=("attention_heads", 16), num_kv_heads=("attention_kv_heads", None),
        window_size=("window", None), rope_theta=("rope_theta", 10000.0),
        qkv_bias=("attention_bias", False),
    )  # fmt: skip
    specs = [attn] if isinstance(attn, dict) else attn
    if unknown := {name for spec in specs for name in spec} - set(kinds) - {"layers"}:
        raise golden.Unsupported(f"its attn has {', '.join(sorted(unknown))}")
    layers = [(i, spec) for spec in specs for i in spec["layers"]]
    fields = {
        ours: tuple(spec.get(name, default) for _, spec in layers)
        for name, (ours, default) in kinds.items()
    }
    return {"attention_layers": tuple(i for i, _ in layers), **fields} if layers else {}
