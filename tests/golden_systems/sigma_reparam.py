"""Sigma-reparametrisation: one layer over steps, converted ViTs, the entropy of attention."""

from collections.abc import Callable
from typing import Any

import fill
import flax.linen as nn
import golden
import jax
import jax.numpy as jnp
import numpy as np
from golden_systems.vit import timm_vit

import zoo
from zoo.methods.sigma_reparam import SigmaReparam, WithoutNorms, attention_entropy, power_iteration


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """By what the case has."""
    config = case.config
    if "in_features" in config.entries or "in_channels" in config.entries:
        config.ignore("in_features", "out_features", "in_channels", "out_channels", "bias")
        config.ignore("init_multiplier", "padding_mode")
        case.own_weights = True
        return None, _layer(case, config.take("steps"))
    if "arch" in config.entries:
        return _vit(case)
    return None, _entropy(case, config.take("scale", 1.0))


def _entropy(case: golden.Case, scale: float) -> Callable[[dict], golden.Outputs]:
    query, key = (np.float32(scale) * case.uniform(name) for name in "qk")
    config = case.config
    scores = jnp.einsum("bnqd,bnkd->bnqk", query, key)
    scores = scores * config.take("attn_scale", query.shape[-1] ** -0.5)

    def run(_: dict) -> golden.Outputs:
        entropy = attention_entropy(jax.nn.softmax(scores, -1))
        return {"entropy": entropy, "entropy_per_head": entropy.mean((0, 2))}

    return run


def unit(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The vector that a reference starts from."""
    u = fill.uniform(name, shape).astype(np.float64)
    return (u / np.linalg.norm(u)).astype(np.float32)


def given(case: golden.Case) -> dict[str, np.ndarray]:
    """The state dict with the scales and vectors that the case is run with."""
    state = case.state_dict()
    for name, value in state.items():
        if name.endswith("spectral_normed_weight.u"):
            state[name] = unit(name, value.shape)
        elif name == "sigma" or name.endswith(".sigma"):
            state[name] = (1 + np.float32(0.1) * fill.uniform(name, (1,))).astype(np.float32)
    return state


def _layer(case: golden.Case, steps: int) -> Callable[[dict], golden.Outputs]:
    x = case.input("x")
    state = given(case)
    case.unread("u", "sigma")  # they are among the weights
    kernel, bias = state["weight"].T, state.get("bias")
    u = case.input("u0") if "u0" in case.inputs else state["spectral_normed_weight.u"]
    sigma = (case.input("sigma") if "sigma" in case.inputs else state["sigma"]).reshape(())

    product, tracked = _map(case), bool(case.config.take("stats_only", False))

    def forward(kernel: Any, gamma: Any, bias: Any, u: Any) -> Any:
        norm, following = power_iteration(kernel, u)
        y = product(x, kernel if tracked else kernel * (gamma / norm))
        shape = (1, -1, 1, 1) if y.ndim == 4 else (-1,)
        return (y if bias is None else y + bias.reshape(shape)), (norm, following)

    def loss(*args: Any) -> Any:
        return jnp.mean(forward(*args)[0] ** 2)

    def run(_: dict) -> golden.Outputs:
        out, vector = {}, jnp.asarray(u)
        for step in range(steps):
            if step == 0:
                which = (0, 1) if bias is None else (0, 1, 2)
                grads = jax.grad(loss, which)(kernel, sigma, bias, vector)
                out |= {"grad_weight_0": grads[0].T, "grad_sigma_0": grads[1].reshape(1)}
                out |= {} if bias is None else {"grad_bias_0": grads[2]}
            y, (norm, vector) = forward(kernel, sigma, bias, vector)
            out |= {f"y_{step}": y, f"u_{step}": vector, f"sigma_w_{step}": norm.reshape(1)}
        out["y_eval"] = forward(kernel, sigma, bias, vector)[0]
        out["svd_norm"] = np.linalg.norm(kernel, 2).reshape(1)
        return out

    return run


def _map(case: golden.Case) -> Callable[[Any, Any], Any]:
    """The product with a kernel `[in, out]`: a linear map's, or that of flat filters."""
    config = case.config
    size = config.take("kernel_size")
    if size is None:
        return lambda x, kernel: x @ kernel
    size, stride, padding, dilation = (
        golden.pair(value)
        for value in (
            size,
            config.take("stride", 1),
            config.take("padding", 0),
            config.take("dilation", 1),
        )
    )
    config.expect(groups=(1, None))

    def convolve(x: Any, kernel: Any) -> Any:
        filters = kernel.T.reshape(kernel.shape[1], -1, *size)
        return jax.lax.conv_general_dilated(
            x, filters, stride, [(n, n) for n in padding], rhs_dilation=dilation
        )

    return convolve


def _vit(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    config = case.config
    config.entries |= {"model": config.take("arch"), **config.take("kw", {})}
    config._left |= set(config.take("kw", {})) | {"model"}
    model = zoo.info("vit_test").create(**timm_vit(case))
    wrapped: nn.Module = SigmaReparam().wrap(WithoutNorms().wrap(model))
    images = np.moveaxis(case.uniform("x"), 1, -1)
    case.unread("u", "sigma")  # they are among the weights

    def run(_: dict) -> golden.Outputs:
        variables = zoo.convert(wrapped, given(case))
        features = jax.jit(lambda v: wrapped.apply(v, images, method="features"))(variables)
        return {**features, "features": features["pooled"]}

    return wrapped, run


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository or the entropy."""
    return "ml-sigma-reparam" in case.source or case.source.startswith("NumPy float64, Ent")
