import jax
import jax.numpy as jnp
import numpy as np
from model_helpers import apply, documented_shapes, feature_shapes, filled_state_dict

import zoo
from zoo.models.signal import spiking
from zoo.models.signal.lmu import Fire

SMALL = dict(context_length=24, variates=6, num_classes=5, embed_dim=24, depth=2)


def network(name, layout, **fields):
    """A small network of two blocks, and weights under which neurons fire."""
    model = zoo.create(name, **SMALL, **fields)
    state = filled_state_dict(model, layout)
    state = {k: v * 5 if v.ndim == 1 and k.endswith("weight") else v for k, v in state.items()}
    return model, zoo.convert(model, state), jax.random.normal(jax.random.key(1), (2, 24, 6))


def spikes(model, variables, series):
    """What every neuron fires, by path, and the features."""
    keep = lambda module, _: isinstance(module, Fire)  # noqa: E731
    out, kept = apply(
        model, variables, series, method="features", capture_intermediates=keep,
        mutable=["intermediates"],
    )  # fmt: skip
    leaves = jax.tree.leaves_with_path(kept["intermediates"])
    return {jax.tree_util.keystr(p): x for p, x in leaves if x.ndim == 3}, out


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(spiking.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_a_block_adds_spikes_to_the_sum_of_spikes():
    """Neurons behind every map: all that flows is whole numbers, until the head."""
    fired, out = spikes(*network("slmu_rnn_conv1d", "memory", theta=24.0))
    assert len(fired) == 5 + 2 * 6
    assert all(set(np.unique(x)) <= {0.0, 1.0} and x.any() for x in fired.values())
    assert set(np.unique(out["embed"])) == {0.0, 1.0, 2.0}
    step = out["block2"] - out["block1"]
    assert set(np.unique(step)) <= {0.0, 1.0, 2.0} and step.any()


def test_attention_of_spikes_counts_them():
    model, variables, series = network("attn_ms_conv1d", "attention", num_heads=2)
    fired, _ = spikes(model, variables, series)
    first = [x for path, x in fired.items() if "layers_0" in path and "attention" in path]
    names = [path for path in fired if "layers_0" in path and "attention" in path]
    by = {n: x for n in ("query", "key", "value") for p, x in zip(names, first, strict=True)
          if f"fire_{n}" in p}  # fmt: skip
    query, key, value = (np.reshape(by[n], (2, 24, 2, 12)) for n in ("query", "key", "value"))
    scores = np.einsum("bqnd,bknd->bnqk", query, key)  # in the other order, as the paper has it
    slow = np.einsum("bnqk,bkne->bqne", scores, value)
    fast = np.einsum("bqnd,bnde->bqne", query, np.einsum("bknd,bkne->bnde", key, value))
    np.testing.assert_array_equal(slow, fast)
    assert slow.max() > 2 and np.array_equal(slow, np.round(slow))


def test_attention_sees_what_comes_later_and_memory_does_not():
    for name, layout, fields, sees in (
        ("attn_ms_conv1d", "attention", {"num_heads": 2}, True),
        ("slmu_rnn_conv1d", "memory", {"theta": 24.0}, False),
    ):
        model, variables, series = network(name, layout, **fields)
        _, out = spikes(model, variables, series)
        _, changed = spikes(model, variables, series.at[:, 18:].multiply(-3.0))
        before = np.abs(out["block2"] - changed["block2"])[:, : 18 - 5].max()  # five convolutions
        assert (before > 0) == sees


def test_half_precision_fires_the_same_neurons():
    model, variables, series = network("slmu_rnn_conv1d", "memory", theta=24.0)
    exact, _ = spikes(model, variables, series)
    rough, out = spikes(model.clone(dtype=jnp.bfloat16), variables, series)
    assert out["logits"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, rough, exact)


def test_gradients_pass_the_spikes():
    model, variables, series = network("slmu_rnn_conv1d", "memory", theta=24.0)

    def loss(params):
        return jnp.sum(model.apply({**variables, "params": params}, series) ** 2)

    grads = jax.jit(jax.grad(loss))(variables["params"])
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
