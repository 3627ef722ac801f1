"""The Routing Transformer of lucidrains."""

import re
from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np
from golden_systems._inputs import inputs
from golden_systems.performer import KERNELS

import zoo


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The language model and its loss of the means."""
    config = case.config
    fields = dict(num_heads=8, head_dim=64, window=64, causal=False)
    fields |= config.rename(
        vocab_size="num_tokens",
        embed_dim="dim",
        factor_dim="emb_dim",
        depth="depth",
        num_heads="heads",
        head_dim="dim_head",
        max_length="max_seq_len",
        window="window_size",
        local_heads="n_local_attn_heads",
        local_window="local_attn_window_size",
        local_radius="local_attn_radius_blocks",
        causal="causal",
        shared_qk="shared_qk",
        memory_slots="num_mem_kv",
        decay="kmeans_ema_decay",
        gated="ff_glu",
        tie_embeddings="tie_embedding",
        shift_tokens="shift_tokens",
        reversible="reversible",
        cross_attention="receives_context",
        memory_shared_qk="context_shared_qk",
        encodes="return_embeddings",
        weight_tied="weight_tie",
    )
    for name, value in (("local_heads", 0), ("local_window", None), ("memory_slots", 0)):
        fields.setdefault(name, value)
    if isinstance(fields["local_heads"], list):
        fields["local_heads"] = tuple(fields["local_heads"])
    # The language model does not hand its commitment factor on, nor a layer the context's window.
    config.ignore("commitment_factor", "rel_pos_emb", "ff_mult", "ff_chunks", "attn_dropout",
                  "ff_dropout", "attn_layer_dropout", "layer_dropout", "_register_kmeans_update",
                  "pkm_num_keys", "moe_num_experts", "moe_loss_coef", "context_window_size",
                  "use_absolute_pos_emb")  # fmt: skip
    config.expect(pkm_layers=([], None), moe_layers=([], None))  # fmt: skip
    activation = str(config.take("ff_activation") or "gelu").rpartition(".")[2].strip("'>")
    if activation.lower() not in KERNELS:
        raise golden.Unsupported(f"its config has ff_activation={activation!r}")
    scale, rezero = config.take("use_scale_norm", False), config.take("use_rezero", False)
    norm = "rezero" if rezero else "scale" if scale else "layer"
    model = zoo.info("routing_transformer_test").create(
        **fields, norm=norm, activation=KERNELS[activation.lower()]
    )
    if "out.tensor" in case.shapes:
        case.filled_as["token_emb.weight"] = "out.tensor"
    if model.weight_tied:  # of the names of one tensor, the last is what it was filled as
        last = model.depth * (1 + model.cross_attention) - 1
        for name in case.shapes:
            at = re.search(r"\.(layers|blocks)\.(\d+)\.(0|1|f|g)\..*?fn\.", name)
            if at:
                layer = (
                    last if int(at[2]) % 2 == last % 2 or not model.cross_attention else last - 1
                )
                case.filled_as[name] = f"{name[: at.start(2)]}{layer}{name[at.end(2) :]}"
    given = inputs(
        case,
        tokens=("input_ids", "x"),
        mask=("input_mask", "mask", "attention_mask"),
        memory="context",
        memory_mask="context_mask",
    )
    run = jax.jit(lambda v, x: model.apply(v, **x, method="features"))

    def outputs(variables: dict) -> golden.Outputs:
        out = dict(run(variables, given))
        if "mask" in given:
            keep = given["mask"][..., None] != 0
            out |= {f"{n}_masked": np.where(keep, x, 0) for n, x in out.items() if np.ndim(x) == 3}
        return out

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository."""
    return "lucidrains/routing-transformer" in case.source
