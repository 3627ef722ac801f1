"""STree: Mamba-2 over a tree of tokens, its state space alone, and the walk through a tree."""

from collections.abc import Callable
from functools import partial
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
from golden_systems import mamba2

import kernels_pallas
from zoo.inference import generate
from zoo.inference.speculate import verify_greedy
from zoo.layers.causal import ancestors
from zoo.layers.decoder import conv_rows


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """A model over its tree, or functions of arrays."""
    if not case.shapes:
        return None, partial(_state_space, _arrays(case))
    case.config.ignore("parent", "verify_parent")
    model = mamba2.create(case.config)
    tokens = {name: case.input(name).astype(np.int32) for name in case.names}
    return model, partial(_tree, model, tokens)


def _tree(model: Any, given: dict[str, np.ndarray], variables: dict) -> golden.Outputs:
    """Logits of every node, what is accepted of a draft, and a plain continuation."""
    call = jax.jit(model.apply, static_argnames="method")
    state = model.init_state(1, 128)
    state, _ = call(variables, state, given["prefix_ids"], method="step")
    _, logits = call(variables, state, given["tree_ids"], given["parent"], method="branch")
    out = {"tree_logits": logits}
    text = np.concatenate([given["prefix_ids"], given["tree_ids"][:, :1]], axis=1)
    out["greedy_continuation"] = generate(model, variables, text, steps=6)[0]
    if "verify_ids" in given:
        drafts, parents = given["verify_ids"], given["verify_parent"]
        _, logits = call(variables, state, drafts, parents, method="branch")
        found = verify_greedy(jnp.asarray(drafts[0]), logits[0], parents.tolist())
        count = int(found.count)
        out["accepted_nodes"] = found.path[:count]
        emitted = [*drafts[0][np.asarray(found.path[1:count])], int(found.token)]
        out["emitted_tokens"] = np.array(emitted)
    return out


def _arrays(case: golden.Case) -> dict[str, Any]:
    """All inputs and sizes of a case of the state space alone."""
    sizes = {name: case.config.take(name) for name in ("headdim", "heads", "ngroups", "dstate")}
    case.config.expect(
        A="-exp(A_log)", dt="softplus(dt+dt_bias)", gate="y*silu(z), no norm", d_conv=(4, 3, 2)
    )
    case.config.ignore("parent")
    return sizes | {name: case.input(name) for name in case.names}


def _state_space(a: dict[str, Any], variables: dict) -> golden.Outputs:
    """The convolution, the recurrence and the gate of a Mamba-2 layer over a tree."""
    del variables
    parents, taps = jnp.asarray(a["parent"]), a["conv_weight"].shape[1]
    inputs = np.concatenate([a["conv_state"][:, -(taps - 1) :], a["xbc"]], axis=1)
    rows = conv_rows(parents, taps)
    xbc = sum(inputs[:, rows[:, j]] * a["conv_weight"][:, j] for j in range(taps))
    xbc = jax.nn.silu(xbc + a["conv_bias"])
    batch, nodes = xbc.shape[:2]
    heads, width, groups, size = (a[k] for k in ("heads", "headdim", "ngroups", "dstate"))
    x, B, C = jnp.split(xbc, np.cumsum([heads * width, groups * size]), axis=-1)
    x = x.reshape(batch, nodes, heads, width)
    B, C = (t.reshape(batch, nodes, groups, size) for t in (B, C))
    dt, A = jax.nn.softplus(a["dt"] + a["dt_bias"]), -jnp.exp(a["A_log"])
    start = np.swapaxes(a["ssm_state"], 2, 3)
    y, states = kernels_pallas.tree_ssd(x, dt, A, B, C, parents, initial_state=start)
    y = y + a["D"][:, None] * x
    mask = ancestors(parents)
    return {
        "xbc_conv": xbc,
        "y": y,
        "y_gated": y.reshape(batch, nodes, -1) * jax.nn.silu(a["z"]),
        "cum": jnp.einsum("ij,bjh->bih", mask.astype(jnp.float32), dt * A, precision="highest"),
        "node_states_last": jnp.swapaxes(states[:, -1], 2, 3),
        "mask": mask.astype(jnp.int32),
    }


def made_by(case: golden.Case) -> bool:
    """Whether the case has a tree of tokens."""
    return "parent" in case.config.entries
