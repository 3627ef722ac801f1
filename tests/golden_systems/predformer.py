"""Official PredFormer, all nine classes, by their configuration."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np

from zoo.models.video.predformer import ORDERS, PredFormer, continue_clip

DROPOUT = ("dropout", "attn_dropout", "drop_path")  # act in training alone


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """A clip in, the frames after it out; forecasts of forecasts where more are wanted."""
    entries = case.config.entries
    # the constructor takes one dictionary, which stands by itself or among the others
    config = golden.Config({**entries, **(entries.get("model_config") or {})})
    case.config.ignore(*entries)
    fields = config.rename(
        in_channels="num_channels",
        patch_size="patch_size",
        embed_dim="dim",
        num_heads="heads",
        head_dim="dim_head",
        mlp_ratio="scale_dim",
        num_layers="Ndepth",
        depth="depth",
    )
    size = tuple(config.take(name) for name in ("pre_seq", "height", "width"))
    name = config.take("class") or config.take("cls") or config.take("model") or ""
    order = str(name).removeprefix("PredFormer_")
    if order not in ORDERS:
        raise golden.Unsupported(f"its class {order!r} is none of {', '.join(ORDERS)}")
    horizon = config.take("after_seq", size[0])
    config.ignore("method", "model_config", *DROPOUT)
    config.finish()
    model = PredFormer(clip_size=size, order=order, **fields)
    (name,) = case.names
    frames = np.moveaxis(case.input(name), 2, -1)

    def outputs(variables: dict) -> golden.Outputs:
        out = jax.jit(lambda v, x: model.apply(v, x, method="features"))(variables, frames)
        forecast = out["forecast"]
        for described in case.header["outputs"].values():  # the model's own, or the method's
            if tuple(described["shape"][1:2]) == (horizon,) != (size[0],):
                forecast = continue_clip(model, variables, frames, horizon)
        forecast = np.moveaxis(np.asarray(forecast), -1, 2)
        return {**out, **{n: forecast for n in ("y", "out", "forecast", "pred", "pred_y")}}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names one of the nine classes."""
    return str(case.header["config"].get("class")).startswith("PredFormer_")
