"""Combiner's attention of each kind."""

from collections.abc import Callable
from typing import Any

import golden
import jax.numpy as jnp

from zoo.layers.attention import attention_weights
from zoo.models.language.combiner import axial_attention, fixed_attention, logsparse_attention


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """Functions of queries, keys and values."""
    span = next(s for s in map(case.config.take, ("seg", "span")) if s is not None)
    q, k, v = (jnp.asarray(case.input(name)) for name in "qkv")
    length = q.shape[1]

    def full(causal: bool) -> Any:
        at = jnp.arange(length)
        hidden = jnp.where((at <= at[:, None]) | (not causal), 0.0, -1e30)[None, None]
        return jnp.einsum("bnqk,bknd->bqnd", attention_weights(q, k, bias=hidden), v)

    kinds = {
        "fixed_causal": lambda: fixed_attention(q, k, v, span, causal=True),
        "fixed_bidirectional": lambda: fixed_attention(q, k, v, span, causal=False),
        "logsparse_causal": lambda: logsparse_attention(q, k, v),
        "axial_mixture_causal": lambda: axial_attention(q, k, v, span),
        "full_causal": lambda: full(True),
        "full_bidirectional": lambda: full(False),
    }
    wanted = [name for name in kinds if name in case.header["outputs"]]
    return None, lambda variables: {name: kinds[name]() for name in wanted}


def made_by(case: golden.Case) -> bool:
    """Whether its outputs are those of Combiner."""
    outputs = case.header["outputs"]
    return any(name.startswith(("logsparse_", "axial_mixture_", "fixed_")) for name in outputs)
