"""Tree SSD against reference cases: STree's equations in float64, one path at a time."""

from pathlib import Path

import fill
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas

FOLDER = Path(__file__).parent / "golden"
HEADS, WIDTH, STATE = 4, 8, 16


@pytest.mark.parametrize("case", ["tree_ssd_binary_d4", "tree_ssd_chain5"])
def test_tree_ssd_equals_the_reference_on_every_node(case):
    golden = np.load(FOLDER / f"{case}.npz")
    parents, after_conv = golden["in/parent"], golden["out/xbc_conv"]
    nodes = len(parents)
    x, B, C = np.split(after_conv, [HEADS * WIDTH, HEADS * WIDTH + STATE], axis=2)
    x = x.reshape(1, nodes, HEADS, WIDTH)
    dt = jax.nn.softplus(
        fill.uniform("in/dt", (1, nodes, HEADS)) + fill.uniform("in/dt_bias", (HEADS,))
    )
    A = -jnp.exp(fill.uniform("in/A_log", (HEADS,)))
    D = fill.uniform("in/D", (HEADS,))
    first = fill.uniform("in/ssm_state", (1, HEADS, WIDTH, STATE)).swapaxes(2, 3)
    y, states = kernels_pallas.tree_ssd(
        x, dt, A, B[:, :, None], C[:, :, None], parents, initial_state=first
    )
    np.testing.assert_allclose(y + D[:, None] * x, golden["out/y"], atol=1e-5)
    np.testing.assert_allclose(
        states[:, -1].swapaxes(2, 3), golden["out/node_states_last"], atol=1e-5
    )
    if case == "tree_ssd_chain5":
        chain, _ = kernels_pallas.ssd(
            x, dt, A, B[:, :, None], C[:, :, None], initial_state=first, precision="highest"
        )
        np.testing.assert_allclose(chain, y, atol=2e-6)
