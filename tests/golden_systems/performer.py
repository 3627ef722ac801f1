"""The Performer of lucidrains."""

from collections.abc import Callable
from typing import Any

import fill
import golden
import jax
import numpy as np
from golden_systems._inputs import inputs

import zoo

KERNELS = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "elu": jax.nn.elu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jax.numpy.tanh,
    "softplus": jax.nn.softplus,
    "exp": jax.numpy.exp,
    "leakyrelu": jax.nn.leaky_relu,
    "silu": jax.nn.silu,
}


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The model with its word head; the random features are those that the notes say."""
    config = case.config
    fields = config.rename(
        vocab_size="num_tokens",
        embed_dim="dim",
        max_length="max_seq_len",
        depth="depth",
        num_heads="heads",
        head_dim="dim_head",
        features_per_head="nb_features",
        causal="causal",
        local_heads="local_attn_heads",
        local_window="local_window_size",
        generalized="generalized_attention",
        axial_shape="axial_position_shape",
        mlp_ratio="ff_mult",
        gated="ff_glu",
        qkv_bias="qkv_bias",
        out_bias="attn_out_bias",
        tie_embeddings="tie_embed",
        shift_tokens="shift_tokens",
        reversible="reversible",
        cross_attention="cross_attend",
    )
    if isinstance(fields.get("local_heads"), list):
        fields["local_heads"] = tuple(fields["local_heads"])
        if len(fields["local_heads"]) == 1:
            fields["local_heads"] = fields["local_heads"][0]
    fields["projected"] = not config.take("no_projection", False)
    kernel = str(config.take("kernel_fn", "relu") or "relu")
    kernel = kernel.removesuffix("()").rpartition(".")[2].lower()
    if kernel not in KERNELS:
        raise golden.Unsupported(f"its config has kernel_fn={kernel!r}, not {', '.join(KERNELS)}")
    axial, rotary = (
        config.take("axial_position_emb", False),
        config.take("rotary_position_emb", True),
    )
    fields["position"] = "rotary" if rotary else "axial" if axial else "absolute"
    scale, rezero = config.take("use_scalenorm", False), config.take("use_rezero", False)
    fields["norm"] = "scale" if scale else "rezero" if rezero else "layer"
    config.ignore("auto_check_redraw", "feature_redraw_interval", "ff_chunks", "emb_dropout",
                  "ff_dropout", "attn_dropout", "return_encodings")  # fmt: skip
    encodings = config.entries.get("return_encodings", False)
    for entry in case.header["state_dict"]:
        name, _, shape, _ = entry
        if name.endswith("projection_matrix") and entry[3] == "kept":
            entry[3] = f"stored:{name}"
            value = np.float32(np.sqrt(3.0)) * fill.uniform(name, tuple(shape))
            case.inputs[f"weights.{name}"] = value.astype(np.float32)
    model = zoo.info("performer_test").create(
        **{"head_dim": 64, "causal": False, "features_per_head": None, **fields},
        kernel=KERNELS[kernel],
    )
    given = inputs(
        case,
        tokens=("input_ids", "x"),
        mask=("mask", "attention_mask"),
        memory="context",
        memory_mask="context_mask",
    )
    run = jax.jit(lambda v, x: model.apply(v, **x, method="features"))

    def outputs(variables: dict) -> golden.Outputs:
        out = dict(run(variables, given))
        if encodings:
            out["logits"] = out["last_hidden_state"]
        if "mask" in given:
            keep = given["mask"][..., None] != 0
            out |= {f"{name}_masked": np.where(keep, x, 0) for name, x in out.items()}
        return out | {"encodings": out["last_hidden_state"]}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository."""
    return "lucidrains/performer-pytorch" in case.source
