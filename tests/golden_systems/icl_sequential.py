"""The GPT-2 of Garg et al., and the window functions with their baselines."""

from collections.abc import Callable
from typing import Any

import golden
import numpy as np
from golden_systems import _icl

import zoo
from zoo.data.functions import baselines, continuous


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The transformer, or the functions if there are no weights."""
    if not case.shapes:
        return None, _functions(case)
    case.config.expect(family=("gpt2", "san"))
    fields = _icl.sizes(case)
    fields["depth"] = _icl.agreed(case, _icl.depth(case, "_backbone.h."), "n_layer", "n_layers")
    fields["num_heads"] = _icl.first(case, "n_head", "n_heads", default=4)
    rows = case.shapes["_backbone.wpe.weight"][0]
    fields["max_points"] = _icl.agreed(case, rows // 2, "n_positions")
    if "_read_in.net.0.weight" in case.shapes:
        fields["read_hidden"] = case.shapes["_read_in.net.0.weight"][0]
    case.config.ignore("freeze", "resid_pdrop", "embd_pdrop", "attn_pdrop", "use_cache")
    model = zoo.create("icl_sequential_standard", **fields)
    return model, _icl.predictions(case, model)


def _functions(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    """Labels of the sliding window, and least squares on the window and on the point."""
    window, dims = case.config.take("window"), _icl.first(case, "n_dims", "d")
    points, rate = _icl.first(case, "n_points", "P"), case.config.take("p_random", 0.0)
    count = next(iter(case.references.values())).shape[0]

    def uniform(name: str, *shape: int) -> np.ndarray:
        stored = name in case.inputs
        return (case.input(name) if stored else case.uniform(name, shape)).astype(float)

    xs, weights = uniform("xs", count, points, dims), uniform("w", count, window, dims)
    chosen = uniform("rand_mask", count, points) < 2 * rate - 1
    # a uniform number of [-1, 1) has the deviation 1 / sqrt 3
    drawn = np.sqrt(3) * uniform("rand_label", count, points)

    def run(_: dict) -> golden.Outputs:
        ys = continuous.window_linear(xs, weights)
        seen = continuous.windows(xs, window).reshape(count, points, -1)
        return {
            "ys": ys,
            "ols_window": baselines.over(baselines.least_squares, seen, ys),
            "ols_pointwise": baselines.over(baselines.least_squares, xs, ys),
            "ys_randomised": continuous.randomise(ys, chosen, drawn),
        }

    return run


def made_by(case: golden.Case) -> bool:
    """Whether the state dict is that of the transformer, or the source names the windows."""
    other = _icl.outputs(case) != 1 or "incontext-bool" in case.source
    return ("_backbone.wpe.weight" in case.shapes and not other) or "sliding-window" in case.source
