"""GTrXL of DI-engine: segments one after the other, with the memory carried."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np

import zoo


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The network; its tensors are time-major."""
    fields = case.config.rename(
        observation_dim="input_dim",
        head_dim="head_dim",
        embed_dim="embedding_dim",
        num_heads="head_num",
        mlp_depth="mlp_num",
        depth="layer_num",
        memory_length="memory_len",
        gated="gru_gating",
        embedded="use_embedding_layer",
    )
    if isinstance(fields.get("observation_dim"), list):  # of an observation that is laid out flat
        fields["observation_dim"] = int(np.prod(fields["observation_dim"]))
    activation = case.config.take("activation", "relu")
    activation = str(activation).split(".")[-1].rstrip("()").lower()
    fields["activation"] = {"leakyrelu": "leaky_relu"}.get(activation, activation)
    case.config.ignore("class", "segments", "gru_bias", "dropout_ratio", "return_mem")
    batch_first = bool(case.config.take("batch_first", False))
    model = zoo.create("gtrxl_di_engine", **fields)
    names = [name for name in case.names if name.startswith("x")]
    segments = [case.input(name) for name in sorted(names, key=lambda n: int(n[1:] or 0))]
    segments = segments if batch_first else [x.swapaxes(0, 1) for x in segments]
    memory = _memory(case, len(segments[0]), model)
    turned = lambda x: np.asarray(x) if batch_first else np.asarray(x).swapaxes(0, 1)  # noqa: E731

    def run(variables: dict) -> golden.Outputs:
        step = jax.jit(lambda v, state, x: model.apply(v, state, x, method="step"))
        state, out = memory, {}
        for i, x in enumerate(segments):
            before = state
            state, y = step(variables, state, x)
            out[f"y{i}"] = turned(y)
        out |= {"y": out["y0"], "memory_after": np.asarray(state).transpose(1, 2, 0, 3)}
        return out | {"memory": np.asarray(before).transpose(1, 2, 0, 3)}

    return model, run


def _memory(case: golden.Case, batch: int, model: Any) -> np.ndarray:
    described = str(case.config.entries.get("inputs", {}).get("memory0", "zeros"))
    if "memory0" in case.inputs:
        memory = case.input("memory0")
    elif "uniform" in described:
        memory = case.uniform("memory0")
    else:
        case.unread("memory0")
        return np.asarray(model.init_state(batch))
    return memory.transpose(2, 0, 1, 3)


def made_by(case: golden.Case) -> bool:
    """Whether the header names the class."""
    return case.config.entries.get("class") == "GTrXL" or "gtrxl.py" in case.source
