"""Linear self-attention: the layer, its gradients, its theory."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np

from zoo.models.incontext import icl_linear as theory


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """Everything is a function of the config and of numbers made from names."""
    take = case.config.take
    dims, examples, length = take("d"), take("N"), take("M")
    diagonal = np.array(take("Lambda"), float)
    covariance = np.diag(diagonal)
    start, step = take("sigma", 0.1), take("euler_dt", 0.01)
    case.config.expect(rho="M at test", Theta="I/d^(1/4)")
    queries = case.references["pred"].shape[0]
    root = np.sqrt(3)
    xs = root * _uniform(case, "X", (length, dims)) * np.sqrt(diagonal)
    query = root * _uniform(case, "Q", (queries, dims)) * np.sqrt(diagonal)
    weights = root * _uniform(case, "w", (dims,))
    ys = xs @ weights + 0.2 * _uniform(case, "noise", (length,))
    pv, kq = (_uniform(case, name, (dims + 1, dims + 1)) for name in ("PV", "KQ"))
    rows = case.references["flow"] if "flow" in case.references else np.zeros((1, 6))

    def prompt(x: np.ndarray) -> np.ndarray:
        return np.concatenate([np.c_[xs, ys], np.append(x, 0)[None]])

    def run(_: dict) -> golden.Outputs:
        best_kq, best_pv = theory.minimum(covariance, examples)
        model = theory.InContextLinear(dims=dims)

        def error(parameters: dict) -> jax.Array:
            points = np.concatenate([xs, query[:1]])[None].astype("f")
            labels = np.append(ys, 0)[None].astype("f")
            guess = model.apply({"params": parameters}, points, labels)[0, -1]
            return 0.5 * (guess - weights @ query[0]) ** 2

        grads = jax.grad(error)({"kq": kq.astype("f"), "pv": pv.astype("f")})
        best = {"params": {"kq": best_kq.astype("f"), "pv": best_pv.astype("f")}}
        stacked = np.stack([np.concatenate([xs, x[None]]) for x in query]).astype("f")
        labels = np.tile(np.append(ys, 0), (queries, 1)).astype("f")
        return {
            "KQ_star": best_kq,
            "PV_star": best_pv,
            "Gamma": theory.gamma(covariance, examples),
            "E0": prompt(query[0]).T,
            "lsa_out0": theory.attend(prompt(query[0]), best_kq, best_pv, length).T,
            "pred": model.apply(best, stacked, labels)[:, -1],
            "lsa_out_generic": theory.attend(prompt(query[0]), kq, pv, length).T,
            "grad_PV_generic": grads["pv"],
            "grad_KQ_generic": grads["kq"],
            "flow": _flow(covariance, examples, start, step, rows),
            "error_noiseless": np.array([_error(covariance, weights, examples, length)]),
        }

    return None, run


def _error(covariance: np.ndarray, weights: np.ndarray, examples: int, length: int) -> float:
    return theory.expected_error(
        covariance, weights, trained_on=covariance, examples=examples, length=length
    )


def _uniform(case: golden.Case, name: str, shape: tuple[int, ...]) -> np.ndarray:
    stored = name in case.inputs
    return (case.input(name) if stored else case.uniform(name, shape)).astype(float)


def _flow(
    covariance: np.ndarray, examples: int, start: float, step: float, wanted: np.ndarray
) -> np.ndarray:
    """The rows of the file, at its times."""
    steps = np.round(wanted[:, 0] / step).astype(int)
    noted = theory.gradient_flow(
        covariance, examples, start=start, step=step, steps=int(steps[-1]),
        record=tuple(steps.tolist()),
    )  # fmt: skip
    target = np.linalg.inv(theory.gamma(covariance, examples))
    return np.array([
        [
            time, u, m[0, 0], m[-1, -1], np.linalg.norm(u * m - target),
            theory.reduced_loss(u, m, covariance, examples),
        ]
        for time, (u, m) in zip(wanted[:, 0], noted, strict=True)
    ])  # fmt: skip


def made_by(case: golden.Case) -> bool:
    """Whether the source is the paper."""
    return "Zhang, Frei, Bartlett" in case.source
