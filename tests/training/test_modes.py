"""Every way of spreading a run over devices gives the same losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent


OFTEN = ["fsdp", "tensor", "pmap"]  # the others are slow
SELDOM = ["data", "accumulate", "offload"]


@pytest.fixture(scope="module")
def results(request):
    slow = any(item.get_closest_marker("slow") for item in request.session.items
               if item.path == request.path)  # fmt: skip
    asked = [*OFTEN, *SELDOM, "dropout"] if slow else OFTEN
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}",
    }
    done = subprocess.run(
        [sys.executable, HERE / "modes.py", *asked],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "way", [*OFTEN, *(pytest.param(way, marks=pytest.mark.slow) for way in SELDOM)]
)
def test_losses_parameters_and_metrics_do_not_depend_on_the_devices(results, way):
    alone, spread = results["one device"], results[way]
    np.testing.assert_allclose(spread["losses"], alone["losses"], rtol=1e-5)
    assert alone["losses"][-1] < 0.7 * alone["losses"][0]
    for path, total in alone["weights"].items():
        np.testing.assert_allclose(spread["weights"][path], total, rtol=1e-4, err_msg=path)
    for name, value in alone["held out"].items():
        np.testing.assert_allclose(spread["held out"][name], value, rtol=1e-5)


@pytest.mark.parametrize(
    "way", ["one device", "fsdp", *(pytest.param(way, marks=pytest.mark.slow) for way in SELDOM)]
)
def test_the_step_is_compiled_ahead_once(results, way):
    assert results[way]["compiled in the first step"] == 0
    assert results["pmap"]["compiled in the first step"] >= 1  # which is not compiled ahead


@pytest.mark.slow
def test_dropout_draws_the_same_masks_on_every_mesh(results):
    alone, spread = results["one device, dropout"]["losses"], results["tensor, dropout"]["losses"]
    np.testing.assert_allclose(spread, alone, rtol=1e-5)
    assert abs(alone[0] - results["one device"]["losses"][0]) > 1e-3


def test_fsdp_cuts_parameters_optimizer_state_and_average_alike(results):
    specs = results["fsdp"]["specs"]
    for place in ("params", "ema", "opt_state/train/adam/mu", "opt_state/train/adam/nu"):
        assert specs[f"{place}/mlp/up/kernel"] == "P(None, 'fsdp')"
        assert specs[f"{place}/norm/scale"] == "P()"


@pytest.mark.slow
def test_optimizer_state_stays_in_host_memory_where_asked(results):
    assert results["offload"]["optimizer in"] == ["pinned_host"]
    assert results["fsdp"]["optimizer in"] == ["device"]


def test_tensor_cuts_the_mlp_between_its_two_matrices(results):
    specs = results["tensor"]["specs"]
    assert specs["params/mlp/up/kernel"] == "P('fsdp', 'tensor')"
    assert specs["params/mlp/up/bias"] == "P('tensor',)"
    assert specs["params/mlp/down/kernel"] == "P('tensor', 'fsdp')"


def test_activations_are_constrained_in_the_lowered_step(results):
    # two calls of constrain in the tiny model, each once forward and once backward
    assert results["tensor"]["constraints"] == 4


def test_fsdp_sends_parameters_and_gradients_and_nothing_else(results):
    found = {tuple(pair) for pair in results["fsdp"]["collectives"]}
    assert ("all-gather", "parameters") in found
    assert {what for _, what in found} <= {"parameters", "scalars"}
