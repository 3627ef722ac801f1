"""The length of a sequence cut over devices gives what one device gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent


def run(*models):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}",
    }
    command = [sys.executable, HERE / "sequence.py", *models]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_attention_and_its_gradients_are_equal_and_heads_are_exchanged_for_length():
    found = run()
    assert found["4 heads"]["error"] < 2e-6
    assert "all-to-all" in found["4 heads"]["exchanged"]
    assert "all-gather" not in found["4 heads"]["exchanged"]
    assert found["3 heads"]["error"] < 2e-6  # which the axis does not divide


@pytest.mark.slow
def test_a_language_model_learns_the_same():
    found = run("gla_test")["gla_test"]
    np.testing.assert_allclose(found["cut"], found["alone"], rtol=1e-5)
