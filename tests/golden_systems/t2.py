"""t2, by the arguments of its constructor, and the Gaussian process of its light curves."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np

from zoo.data.light_curves import GaussianProcess, fit, unfitted
from zoo.models.timeseries.t2 import T2

PLACES = {"L": "steps", "M": "channels", "d": "channels", None: "steps"}


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The classifier; or the Gaussian process, which has no weights."""
    config = case.config
    if "p_init" in config.entries:
        config.ignore("object", "log_likelihood_init", "log_likelihood_fit")
        config.ignore("wavelengths", "p_init", "p_fit")  # `_process` reads them all but the name
        return None, lambda variables: _process(case)
    fields = config.rename(embed_dim="embed_dim", num_heads="num_heads", mlp_dim="ff_dim",
                           depth="num_layers", num_classes="num_classes", dropout="droprate",
                           context_length="timesteps", variates="bands",
                           aux_features="num_aux_feats")  # fmt: skip
    if "input_2" in case.names:
        fields.setdefault("aux_features", case.input("input_2").shape[-1])
    _, steps, bands = case.input("input_1").shape
    config.ignore("input_dim", "fc_neurons")  # of the input; of a layer that is not there
    config.expect(num_filters=fields.get("embed_dim", 32))
    config.expect(add_aux_feats_to=tuple(PLACES), add_feats_to=tuple(PLACES))
    place = next((n for n in ("add_aux_feats_to", "add_feats_to") if n in config.entries), None)
    fields["add_aux_to"] = PLACES[config.entries.get(place)]
    fields = {"context_length": steps, "variates": bands, "dropout": 0.1, **fields}
    model = T2(**fields)
    inputs = [case.input("input_1")]
    if model.aux_features:
        inputs.append(case.input("input_2"))

    def outputs(variables: dict) -> golden.Outputs:
        out = jax.jit(lambda v, x: model.apply(v, *x, method="features"))(variables, inputs)
        # The reference's map is float64, and one trained attention score of 306 tokens is so large
        # that its rounding in float32 alone is 2e-4 of the map; what it makes of logits is 3e-6.
        with jax.enable_x64(True):
            exact = T2(**fields, dtype=jnp.float64)
            double = jax.tree.map(lambda x: np.asarray(x, np.float64), (variables, inputs))
            cam = exact.apply(double[0], *double[1], method="features")["activation"]
        return {
            "logits": out["logits"],
            "probs": jax.nn.softmax(out["logits"]),
            "cam_terms": cam,
            "encoder": out[f"block{model.depth}"],
        }

    return model, outputs


def _process(case: golden.Case) -> golden.Outputs:
    """At the parameters of the file, which `fit` and its start must give, too."""
    observed = [case.inputs[name] for name in ("x", "y", "yerr")]
    entries = case.config.entries
    count = case.header["outputs"].get("times", {}).get("shape", [100])[0]
    times = np.linspace(0, observed[0][:, 0].max(), count)
    out = {"times": times}
    for name, process in (("init", unfitted(*observed)), ("fit", fit(*observed))):
        # george's constant kernel adds up over both dimensions: its parameter is log (A / 2)
        parameters = np.array(entries[f"p_{name}"]) + [np.log(2), 0]
        np.testing.assert_allclose(process.parameters, parameters, atol=1e-3)
        likelihood = entries[f"log_likelihood_{name}"]
        np.testing.assert_allclose(process.log_likelihood(), likelihood, rtol=1e-6)
        process = GaussianProcess(*observed, parameters)
        for band, wavelength in entries["wavelengths"].items():
            points = np.stack([times, np.full(count, wavelength)], -1)
            out[f"{name}_mean_{band}"], out[f"{name}_std_{band}"] = process.predict(points)
    return out


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository or its recipe."""
    return "tallamjr/astronet" in case.source or "astronet's fit_2d_gp" in case.source
