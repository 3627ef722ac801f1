"""Mamba-2 of Hugging Face's transformers and of mamba_ssm."""

import re
from collections.abc import Callable
from typing import Any

import golden
from golden_systems import _text

import zoo


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The language model."""
    model = _text.as_filed(case, create(case.config, "transformers" in case.source))
    return model, _text.run(case, model)


def create(config: golden.Config, transformers: bool = True) -> Any:
    """The model of a configuration of either code, whose defaults differ."""
    fields = {"groups": 8, "tie_embeddings": False} if transformers else {}
    for ours, theirs in (
        ("vocab_size", ("vocab_size",)),
        ("embed_dim", ("hidden_size", "d_model")),
        ("depth", ("num_hidden_layers", "n_layer", "n_layers")),
        ("state_size", ("state_size", "d_state")),
        ("head_dim", ("head_dim", "headdim")),
        ("groups", ("n_groups", "ngroups")),
        ("expand", ("expand",)),
        ("ssm_dim", ("d_ssm",)),
        ("conv_size", ("conv_kernel", "d_conv")),
        ("dt_limit", ("time_step_limit", "dt_limit")),
        ("activation", ("hidden_act", "activation")),
        ("conv_bias", ("use_conv_bias", "conv_bias")),
        ("use_bias", ("use_bias", "bias")),
        ("use_norm", ("rmsnorm",)),
        ("norm_before_gate", ("norm_before_gate",)),
        ("wide_skip", ("D_has_hdim",)),
        ("epsilon", ("layer_norm_epsilon", "norm_epsilon")),
        ("tie_embeddings", ("tie_word_embeddings", "tie_embeddings")),
        ("mlp_dim", ("d_intermediate", "intermediate_size")),
        ("residual_in_float32", ("residual_in_fp32",)),
    ):
        for name in theirs:
            fields |= config.rename(**{ours: name})
    if "dt_limit" in fields:
        fields["dt_limit"] = tuple(float(bound) for bound in fields["dt_limit"])
    if fields.get("mlp_dim"):  # mamba_ssm rounds the width of its gated MLP up
        fields["mlp_dim"] = -(-fields["mlp_dim"] // 128) * 128
    padding = config.take("pad_vocab_size_multiple", 1)
    if "vocab_size" in fields:
        fields["vocab_size"] = -(-fields["vocab_size"] // padding) * padding
    config.expect(rms_norm=True, attn_layer_idx=((), [], None))
    config.ignore(
        "num_heads", "nheads", "chunk_size", "rescale_prenorm_residual", "time_step_rank",
        "time_step_min", "time_step_max", "time_step_floor", "fused_add_norm", "dt_min", "dt_max",
        "dt_init_floor", "A_init_range", "conv_init", "use_mem_eff_path", "ssm_cfg", "attn_cfg",
        *_text.IGNORED,
    )  # fmt: skip
    return zoo.create("mamba2_130m", **fields)


def made_by(case: golden.Case) -> bool:
    """Whether the header names the class, and no tree of tokens."""
    named = re.search(r"Mamba2(ForCausalLM|Model)\b|MambaLMHeadModel", case.source) is not None
    return named and "parent" not in case.config.entries
