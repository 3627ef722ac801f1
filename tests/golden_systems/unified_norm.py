"""Steps of the official UN1d, in training and then in evaluation."""

import re
from collections.abc import Callable
from typing import Any

import fill
import golden
import jax
import jax.numpy as jnp
import numpy as np

from zoo.methods import unified_norm
from zoo.methods.unified_norm import UnifiedNorm


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """All steps, with the weights as they are filled."""
    config = case.config
    case.own_weights = True
    window = config.take("window_size", 4)
    sizes = (window, window) if isinstance(window, int) else tuple(window)
    norm = UnifiedNorm(
        window=sizes[0],
        gradient_window=sizes[1],
        warmup=config.take("warmup_iters", 4000),
        filtration=bool(config.take("outlier_filtration", False)),
        epsilon=config.take("eps", 1e-5),
        momentum=config.take("momentum", 0.9),
    )
    channels, steps = config.take("channels"), config.take("steps")
    start, outlier = config.take("start_iters", 0) or 0, config.take("outlier_step")
    padded, shape = config.take("pad_last", 0) or 0, tuple(config.take("shape"))
    words = str(config.entries["inputs"].get("x<s>", ""))
    grows, times = re.search(r"1\+([\d.]+)\*s", words), re.search(r"times ([\d.]+)", words)
    growth = float(grows[1]) if grows else 0.3
    factor = config.take("outlier_factor", float(times[1]) if times else 30)
    fused_from = case.header["outputs"].get("fused_W", {}).get("shape", [5])[0]
    state = case.state_dict()
    scale, bias = state["weight"], state["bias"]
    case.unread("xe", *(f"{name}{s}" for name in "xg" for s in range(steps)))  # made here
    valid = None
    if padded:
        valid = np.broadcast_to(np.arange(shape[-2]) < shape[-2] - padded, shape[:-1])

    def made(name: str) -> np.ndarray:
        return case.input(name) if name in case.inputs else fill.uniform(f"in/{name}", shape)

    @jax.jit
    def step(x: Any, g: Any, forward: Any, backward: Any) -> tuple:
        def run(x: Any, scale: Any, bias: Any, backward: Any) -> tuple:
            return unified_norm.normalise(norm, x, scale, bias, forward, backward, valid)

        y, back, following = jax.vjp(run, x, scale, bias, backward, has_aux=True)
        gx, gw, gb, changed = back(g)
        return y, gx, gw, gb, following, changed

    def run(_: dict) -> golden.Outputs:
        forward, backward = unified_norm.init_state(norm, channels, start)
        out, running, ema, counts = {}, [], [], []
        for s in range(steps):
            x = made(f"x{s}") * np.float32(1 + growth * s)
            x = x * np.float32(factor) if s == outlier else x
            y, gx, gw, gb, forward, backward = step(x, made(f"g{s}"), forward, backward)
            out |= {f"y_{s}": y, f"gx_{s}": gx, f"gw_{s}": gw, f"gb_{s}": gb}
            running.append(forward.running)
            ema.append(backward.ema)
            counts.append((int(forward.steps), int(forward.skips)))
        out |= {"running_var": jnp.stack(running), "ema_gz": jnp.stack(ema)}
        out |= {"iters_skips": np.array(counts, np.float64), "buffer_x2": forward.window}
        out["buffer_gz"] = backward.window
        out["y_eval"] = unified_norm.evaluate(norm, made("xe"), scale, bias, forward.running)
        kernel, shift = (
            fill.uniform(f"lin.{name}", size)
            for name, size in (("weight", (fused_from, channels)), ("bias", (fused_from,)))
        )
        fused = unified_norm.fuse(norm, scale, bias, forward.running, kernel.T, shift)
        return out | {"fused_W": fused[0].T, "fused_b": fused[1]}

    return None, run


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository."""
    return "Unified-Normalization" in case.source
