"""loralib's layers, and the gradient of LoRA on attention."""

from collections.abc import Callable
from typing import Any

import fill
import flax.linen as nn
import golden
import jax
import jax.numpy as jnp
import numpy as np

from zoo.methods.lora import LoRA, delta, merged
from zoo.methods.low_rank_gradient import (
    approximate,
    exact,
    low_rank_sum,
    monomials,
    pair_gradients,
)


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """By what the case has."""
    entries = case.config.entries
    case.own_weights = True
    if "num_embeddings" in entries:
        return None, _embedding(case)
    if "kernel_size" in entries:
        return None, _conv(case)
    return None, _linear(case) if "in_features" in entries else _attention(case)


def _method(case: golden.Case) -> LoRA:
    config = case.config
    rank, alpha = config.take("r", 0), config.take("lora_alpha", 1)
    config.ignore("lora_dropout", "merge_weights")
    enabled = config.take("enable_lora")
    config.expect(use_dora=(False, None))
    return LoRA(
        rank=rank,
        alpha=alpha,
        targets=".*",
        enabled=tuple(map(bool, enabled)) if enabled else None,
        rank_stabilised=bool(config.take("use_rslora", False)),
    )


def _linear(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    config, method = case.config, _method(case)
    transposed = bool(config.take("fan_in_fan_out", False))
    config.ignore("in_features", "bias")
    outputs = config.take("out_features")
    x, g = case.input("x"), case.input("g") if "g" in case.names else None
    state = case.state_dict()
    kernel = state["weight"] if transposed else state["weight"].T
    adapted = "lora_A" in state
    params = {"kernel": kernel} | ({"bias": state["bias"]} if "bias" in state else {})
    if adapted:
        params |= {"lora_a": state["lora_A"].T, "lora_b": state["lora_B"].T}
    layer = nn.Dense(outputs, use_bias="bias" in state)
    module = method.wrap(layer) if adapted else layer

    def turned(matrix: Any) -> Any:
        return matrix if transposed else jnp.transpose(matrix)

    def run(_: dict) -> golden.Outputs:
        y, back = jax.vjp(lambda p, x: module.apply({"params": p}, x), params, x)
        out = {"y": y}
        whole = (
            merged({"params": params}, method.scale, ".*", method.enabled)["params"]["kernel"]
            if adapted
            else kernel
        )
        out["merged_weight"] = turned(whole)
        out["y_merged"] = layer.apply({"params": {**params, "kernel": whole}}, x)
        if adapted:
            a, b = params["lora_a"], params["lora_b"]
            out["delta"] = turned(method.scale * delta(a, b, kernel.shape, method.enabled))
        if g is not None:
            of_params, of_x = back(g)
            out["grad_x"] = of_x
            out["grad_weight"] = turned(of_params["kernel"])
            out |= {"grad_bias": of_params["bias"]} if "bias" in params else {}
            if adapted:
                out |= {"grad_A": of_params["lora_a"].T, "grad_B": of_params["lora_b"].T}
        return out

    return run


def _embedding(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    config, method = case.config, _method(case)
    padding = config.take("padding_idx")  # a token whose rows get no gradient
    layer = nn.Embed(config.take("num_embeddings"), config.take("embedding_dim"))
    ids = case.input("ids")
    g = case.input("g") if "g" in case.names else None
    state = case.state_dict()
    params = {"embedding": state["weight"]}
    if "lora_A" in state:
        params |= {"lora_a": state["lora_A"].T, "lora_b": state["lora_B"].T}
    module = method.wrap(layer) if "lora_A" in state else layer

    def run(_: dict) -> golden.Outputs:
        y, back = jax.vjp(lambda p: module.apply({"params": p}, ids), params)
        out = {"y": y}
        if "lora_a" in params:
            whole = merged({"params": params}, method.scale)["params"]["embedding"]
            out |= {"merged_weight": whole, "delta": whole - params["embedding"]}
            out["y_merged"] = whole[ids]
        if g is not None:
            (grads,) = back(g)
            of_a = grads["lora_a"] if padding is None else grads["lora_a"].at[padding].set(0)
            out |= {"grad_A": of_a.T, "grad_B": grads["lora_b"].T}
        return out

    return run


def _conv(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    config, method = case.config, _method(case)
    config.ignore("in_channels", "bias")
    size = config.take("kernel_size")
    stride, dilation = config.take("stride", 1), config.take("dilation", 1)
    padding = golden.pair(config.take("padding", 0))
    state = case.state_dict()
    # One tensor with two names, of which the second is filled last.
    state |= {n.removeprefix("conv."): x for n, x in state.items() if n.startswith("conv.")}
    layer = nn.Conv(
        config.take("out_channels"),
        golden.pair(size),
        golden.pair(stride),
        [(n, n) for n in padding],
        kernel_dilation=golden.pair(dilation),
        feature_group_count=config.take("groups", 1),
        use_bias="bias" in state,
    )
    params = {"kernel": state["weight"].transpose(2, 3, 1, 0)}
    params |= {"bias": state["bias"]} if "bias" in state else {}
    params |= {"lora_a": state["lora_A"].T, "lora_b": state["lora_B"].T}
    module, x = method.wrap(layer), np.moveaxis(case.input("x"), 1, -1)
    g = np.moveaxis(case.input("g"), 1, -1) if "g" in case.names else None

    def theirs(kernel: Any) -> Any:
        return jnp.transpose(kernel, (3, 2, 0, 1))

    def run(_: dict) -> golden.Outputs:
        y, back = jax.vjp(lambda p, x: module.apply({"params": p}, x), params, x)
        whole = merged({"params": params}, method.scale)["params"]["kernel"]
        out = {"y": jnp.moveaxis(y, -1, 1), "merged_weight": theirs(whole)}
        out["delta"] = theirs(whole - params["kernel"])
        if g is not None:
            grads, of_x = back(g)
            out |= {"grad_A": grads["lora_a"].T, "grad_B": grads["lora_b"].T}
            out["grad_x"] = jnp.moveaxis(of_x, -1, 1)
        return out

    return run


def _attention(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    config = case.config
    length, d, rank = config.take("L"), config.take("d"), config.take("r")
    alpha, scale = config.take("alpha", 1), config.take("scale", 1.0)
    degrees = config.take("degrees") or range(1, config.take("max_degree", 6) + 1)
    words = " ".join(config.entries.get("inputs", {}))
    names = ("Q", "K", "V") if "A{Q,K,V}" in words or "AK" in words else ("Q", "V")
    uniform = {name: fill.uniform(f"in/{name}", (length, d)).astype(np.float64) for name in "XY"}
    full = {"Q": "query", "K": "key", "V": "value"}

    def made(name: str, shape: tuple[int, ...], factor: float) -> np.ndarray:
        return factor * fill.uniform(f"in/{name}", shape).astype(np.float64)

    with jax.enable_x64(True):
        pairs = {n: (made(f"A{n}", (rank, d), 1.0), made(f"B{n}", (d, rank), 0.2)) for n in names}
        weights = {full[n]: made(f"W{n}", (d, d), scale / d**0.5) for n in full}
        for n, (a, b) in pairs.items():
            weights[full[n]] = np.asarray(low_rank_sum(weights[full[n]], a, b, alpha))

    def gradients(out: dict) -> dict:
        each = {n: pair_gradients(out[full[n]], a, b, alpha) for n, (a, b) in pairs.items()}
        return {
            f"grad_{k}{n}": g for n, two in each.items() for k, g in zip("AB", two, strict=True)
        }

    def run(_: dict) -> golden.Outputs:
        with jax.enable_x64(True):
            x, y = (jnp.asarray(uniform[name]) for name in "XY")
            wanted = exact(x, y, weights, d**-0.5)
            grads, rows = gradients(wanted), []
            for degree in degrees:
                got, positive = approximate(x, y, weights, d**-0.5, degree)
                error = jnp.abs(got["output"] - wanted["output"]).max()
                worst = max(float(jnp.abs(g - grads[k]).max()) for k, g in gradients(got).items())
                errors = (float(error), worst) if bool(positive) else (-1.0, -1.0)
                rows.append((degree, len(monomials(d, degree)), *errors))
            out = {"loss": wanted["loss"].reshape(1), "o": wanted["output"], **grads}
            return {k: np.asarray(v) for k, v in out.items()} | {"approx": np.array(rows)}

    return run


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository or the gradient."""
    return "loralib" in case.source or "LoRA attention gradient" in case.source
