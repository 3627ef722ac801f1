"""Bayes' rule for linear functions with unknown noise; the transformer with two outputs."""

from collections.abc import Callable
from typing import Any

import golden
import numpy as np
from golden_systems import _icl

import zoo
from zoo.data.functions import bayes


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The beliefs, or the transformer if there are weights."""
    return _transformer(case) if case.shapes else (None, _beliefs(case))


def _beliefs(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    take = case.config.take
    dims, points = _icl.first(case, "d", "n_dims"), _icl.first(case, "P", "n_points")
    sigmas, tau = tuple(take("sigmas")), np.sqrt(take("tau2", 1.0))
    shape, rate = take("a0", 3.0), take("b0", 2.0)
    xs = _array(case, "X", (points, dims), np.sqrt(3))
    weights = _array(case, "w", (dims,), np.sqrt(3) * tau)
    noise = _array(case, "eps", (points,), np.sqrt(3))
    ys = xs @ weights + sigmas[len(sigmas) // 2] * noise
    ys = case.input("y") if "y" in case.inputs else ys

    def run(_: dict) -> golden.Outputs:
        belief, likely = bayes.unknown_noise(xs, ys, sigmas, tau)
        other = bayes.inverse_gamma_noise(xs, ys, shape, rate, tau)
        return {
            "mean": belief.mean,
            "var": belief.variance,
            "sigma_posterior": likely,
            "nll": bayes.negative_log_likelihood(belief, ys),
            "mean_ig": other.mean,
            "var_ig": other.variance,
        }

    return run


def _array(case: golden.Case, name: str, shape: tuple[int, ...], scale: float) -> np.ndarray:
    if name in case.inputs:
        return case.input(name).astype(float)
    return scale * case.uniform(name, shape).astype(float)


def _transformer(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    rows = case.shapes["_backbone.wpe.weight"][0]
    model = zoo.create(
        "icl_uncertainty_d8",
        **_icl.sizes(case),
        depth=_icl.agreed(case, _icl.depth(case, "_backbone.h."), "n_layer"),
        num_heads=_icl.first(case, "n_head", default=4),
        max_points=_icl.agreed(case, rows // 2, "n_positions"),
    )

    def run(variables: dict) -> golden.Outputs:
        inputs = _icl.array(case, "xs"), _icl.array(case, "ys")
        out = model.apply(variables, *inputs, method="features")
        mean, spread = out["mean"], out["log_deviation"]
        both = {"pred": out["prediction"], "log_sigma": spread, "mean": mean}
        return both | {"sigma": np.exp(spread), "var": np.exp(2 * spread)}

    return model, run


def made_by(case: golden.Case) -> bool:
    """Whether the source is Bayes' rule, or a GPT-2 reads out two numbers."""
    gpt2 = "_backbone.wpe.weight" in case.shapes
    return (gpt2 and _icl.outputs(case) == 2) or "Bayes rule" in case.source
