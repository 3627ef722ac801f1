"""Blocks of apple/ml-sigmoid-attention between an embedding and a word head."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np
from golden_systems._inputs import inputs

import zoo


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The language model; the fixed b and t of its blocks are those of the configuration."""
    config = case.config
    fields = dict(activation="sigmoid", position="none", query_key_norm=False, causal=True,
                  epsilon=1e-6)  # fmt: skip
    for ours, *theirs in (
        ("vocab_size", "vocab", "vocab_size", "num_embeddings"),
        ("embed_dim", "dim", "embed_dim"),
        ("num_heads", "heads", "num_heads"),
        ("depth", "layers", "depth", "num_blocks"),
        ("activation", "act", "attn_activ_fn"),
        ("position", "pe"),
        ("query_key_norm", "qk_norm"),
        ("causal", "causal"),
        ("epsilon", "norm_eps", "eps"),
        ("mlp_dim", "hidden_features", "mlp_dim", "hidden"),
        ("use_bias", "attn_linear_bias", "qkv_bias", "linear_bias"),
        ("mlp_bias", "mlp_bias"),
    ):
        for name in theirs:
            value = config.take(name)
            if value is not None:
                fields[ours] = value
    fields["activation"] = (
        fields["activation"].replace("unnormalized_", "").removesuffix("_attention")
    )
    fields["position"] = {"identity": "none", "": "none"}.get(
        fields["position"], fields["position"]
    )
    ratio = config.take("mlp_ratio")
    if ratio is not None:
        fields["mlp_dim"] = int(ratio * fields["embed_dim"])
    biases = (config.take(name) for name in ("bias", "attn_bias", "sigmoid_bias"))
    bias = next((b for b in list(biases) if b is not None), None)
    temperature = next((t for t in map(config.take, ("temp", "attn_temp")) if t is not None), 0.0)
    bias = 0.0 if bias is None else bias
    scales = config.take("ls", "blocks.0.ls1.gamma" in case.shapes)
    config.ignore("ls_init", "init_values", "attn_drop", "proj_drop", "drop")
    names = case.shapes
    fields.setdefault("use_bias", "blocks.0.attn.qkv.bias" in names)
    fields.setdefault("mlp_bias", "blocks.0.mlp.fc2.bias" in names)
    model = zoo.info("sigmoid_attention_test").create(
        **fields, bias=float(bias), temperature=float(temperature),
        layer_scale=1e-4 if scales else None,
    )  # fmt: skip
    for entry in case.header["state_dict"]:
        for end, value in (("attn_bias", bias), ("attn_temp", temperature)):
            if entry[0].endswith(f".{end}") and entry[3] == "kept":
                entry[3] = f"stored:{entry[0]}"
                case.inputs[f"weights.{entry[0]}"] = np.full(entry[2], value, np.float32)
    given = inputs(
        case, tokens=("input_ids", "tokens", "x"), mask=("attention_mask", "mask", "attn_mask")
    )
    run = jax.jit(lambda v, x: model.apply(v, **x, method="features", mutable=["intermediates"]))

    def outputs(variables: dict) -> golden.Outputs:
        out, seen = run(variables, given)
        blocks = seen["intermediates"]
        named = out | {"hidden": out["last_hidden_state"]}
        for i in range(model.depth):
            named[f"attn_matrix{i}"] = blocks[f"layers_{i}"]["attention"]["attention"][0]
        if "mask" in given:
            keep = given["mask"][..., None] != 0
            named |= {f"{n}_masked": np.where(keep, x, 0) for n, x in named.items() if x.ndim == 3}
        return named

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository."""
    return "ml-sigmoid-attention" in case.source
