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
    fields = {"groups": 8, "tie_embeddings": False} if transformers else hybrid_fields(config)
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
    if transformers:
        config.ignore("rms_norm")  # its layers have RMSNorm whatever it says
    else:
        config.expect(rms_norm=True)
    config.ignore(
        "num_heads", "nheads", "chunk_size", "rescale_prenorm_residual", "time_step_rank",
        "time_step_min", "time_step_max", "time_step_floor", "fused_add_norm", "dt_min", "dt_max",
        "dt_init_floor", "A_init_range", "conv_init", "use_mem_eff_path",
        *_text.IGNORED,
    )  # fmt: skip
    return zoo.create("mamba2_130m", **fields)


def hybrid_fields(config: golden.Config) -> dict[str, Any]:
    """What mamba_ssm says of its state space and of the layers that are attention."""
    inner = golden.Config({**(config.take("ssm_cfg") or {})})
    inner.expect(layer="Mamba2")
    fields = inner.rename(
        state_size="d_state", head_dim="headdim", groups="ngroups", expand="expand",
        ssm_dim="d_ssm", conv_size="d_conv", conv_bias="conv_bias", use_bias="bias",
        use_norm="rmsnorm", norm_before_gate="norm_before_gate", wide_skip="D_has_hdim",
    )  # fmt: skip
    inner.ignore("chunk_size", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "conv_init",
                 "use_mem_eff_path")  # fmt: skip
    inner.finish()
    layers = tuple(config.take("attn_layer_idx") or ())
    inner = golden.Config(config.take("attn_cfg") or {})
    if not layers:
        return fields
    inner.expect(causal=True, mlp_dim=0, softmax_scale=None, rotary_emb_interleaved=False)
    fields |= {
        "attention_layers": layers,
        "attention_heads": inner.take("num_heads"),
        "attention_kv_heads": inner.take("num_heads_kv"),
        "attention_head_dim": inner.take("head_dim"),
        "attention_conv": inner.take("d_conv", 0),
        "attention_rotary": inner.take("rotary_emb_dim", 0),
        "rope_theta": float(inner.take("rotary_emb_base", 10000.0)),
        "attention_bias": inner.take("qkv_proj_bias", True),
        "attention_out_bias": inner.take("out_proj_bias", True),
    }
    if "causal" not in inner.entries:
        raise golden.Unsupported("its attention sees later tokens, and the zoo's is causal")
    inner.finish()
    return fields


def made_by(case: golden.Case) -> bool:
    """Whether the header names the class, and no tree of tokens."""
    named = re.search(r"Mamba2(ForCausalLM|Model)\b|MambaLMHeadModel", case.source) is not None
    return named and "parent" not in case.config.entries
