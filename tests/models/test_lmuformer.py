import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_helpers import apply, documented_shapes, feature_shapes, filled_state_dict

import zoo
from zoo.models.signal import lmuformer
from zoo.models.signal.lmu import (
    DELAY,
    Fire,
    impulse_response,
    legendre,
    lif,
    readout,
    remember,
    remember_step,
)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(lmuformer.__doc__)
    assert feature_shapes(zoo.create(name)) == table


# --------------------------------------------------------------------------------- memory


def test_convolution_recurrence_and_associative_scan_agree():
    u = jax.random.normal(jax.random.key(0), (2, 17))
    A, B = legendre(8, 20.0)

    def combine(first, second):  # x -> M x + c, first and then second
        (M, c), (N, d) = first, second
        return N @ M, jnp.einsum("...ij,...j->...i", N, c) + d

    steps = jnp.broadcast_to(A, (17, 2, 8, 8)), u.T[..., None] * B
    scanned = jax.lax.associative_scan(combine, steps)[1].swapaxes(0, 1)
    step = lambda m, u: (remember_step(m, u, 20.0),) * 2  # noqa: E731
    stepped = jax.lax.scan(step, jnp.zeros((2, 8)), u.T)[1].swapaxes(0, 1)
    convolved = remember(u, 8, 20.0)
    np.testing.assert_allclose(stepped, convolved, atol=1e-5)
    np.testing.assert_allclose(scanned, convolved, atol=1e-5)


@pytest.mark.parametrize("delay", [0.0, 0.5, 1.0])
def test_the_memory_holds_the_last_theta_frames(delay):
    """Polynomials of the memory give slow inputs back, as they were that part of theta ago."""
    time = np.arange(400)
    u = (1 + np.sin(2 * np.pi * time / 100)).astype("f")
    got = remember(u[None], 16, 64.0)[0] @ readout(16, delay)
    late = round(64 * delay)
    np.testing.assert_allclose(got[200:], u[200 - late : 400 - late], atol=0.05)


def test_the_memory_after_a_pulse_is_the_impulse_response():
    pulse = jnp.zeros((1, 24)).at[0, 3].set(2.0)
    wanted = 2 * impulse_response(6, 16.0, 21).T
    np.testing.assert_allclose(remember(pulse, 6, 16.0)[0, 3:], wanted, atol=1e-5)


# --------------------------------------------------------------------------------- spikes


def test_a_neuron_under_constant_input_spikes_every_second_frame():
    """1.5: the potential is 0.75, then 1.125, which is over the threshold."""
    spikes, potential = lif(jnp.full((1, 6, 1), 1.5))
    np.testing.assert_array_equal(spikes[0, :, 0], [0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(potential, [[0.0]])
    assert lif(jnp.full((1, 1, 1), 1.5))[1] == 0.75


def test_a_spike_has_the_slope_of_a_sigmoid():
    slope = jax.grad(lambda x: lif(x)[0].sum())(jnp.full((1, 1, 1), 1.8))
    s = jax.nn.sigmoid(4 * (0.9 - 1))
    np.testing.assert_allclose(slope[0, 0, 0], 0.5 * 4 * s * (1 - s), rtol=1e-6)


def test_frames_that_are_not_valid_leave_the_potential():
    x = jax.random.normal(jax.random.key(0), (2, 9, 3)) * 2
    valid = jnp.array([1, 0, 1, 1, 0, 1, 1, 0, 1], bool)
    spikes, potential = lif(x, valid=valid)
    alone, last = lif(x[:, valid])
    np.testing.assert_array_equal(spikes[:, valid], alone)
    np.testing.assert_array_equal(potential, last)


# ------------------------------------------------------------------------------ streaming


@functools.cache
def network(spiking):
    """A small network of two blocks, and weights under which neurons fire."""
    model = zoo.create("lmuformer_test", depth=2, spiking=spiking)
    state = filled_state_dict(model, "spiking" if spiking else "official")
    gain = 5 if spiking else 1
    state = {k: v * gain if v.ndim == 1 and k.endswith("weight") else v for k, v in state.items()}
    return model, zoo.convert(model, state), jax.random.normal(jax.random.key(1), (2, 21, 6))


@pytest.mark.parametrize("spiking", [False, True])
def test_the_stream_equals_the_parallel_form_after_every_frame(spiking):
    model, variables, series = network(spiking)
    wanted = apply(model, variables, series, method="features")["prefix_logits"]

    @jax.jit
    def run(variables, series):
        frames = jnp.pad(series, ((0, 0), (0, DELAY), (0, 0)), constant_values=7.0)
        valid = jnp.arange(frames.shape[1]) < series.shape[1]
        step = lambda state, x: model.apply(variables, state, *x, method="step")  # noqa: E731
        return jax.lax.scan(step, model.init_state(2), (frames.swapaxes(0, 1), valid))

    state, logits = run(variables, series)
    assert state["count"] == series.shape[1]
    np.testing.assert_allclose(logits[DELAY:].swapaxes(0, 1), wanted, atol=2e-5)


@pytest.mark.parametrize("spiking", [False, True])
def test_a_stream_may_be_cut_anywhere(spiking):
    model, variables, series = network(spiking)
    stream = jax.jit(lambda v, state, x: model.apply(v, state, x, method="stream"))
    _, wanted = stream(variables, model.init_state(2), series)
    first, _ = stream(variables, model.init_state(2), series[:, :8])
    second, got = stream(variables, first, series[:, 8:])
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    same_size = lambda a, b: a.shape == b.shape  # noqa: E731
    assert all(jax.tree.leaves(jax.tree.map(same_size, first, model.init_state(2))))
    assert jax.tree.structure(second) == jax.tree.structure(model.init_state(2))


def test_a_spiking_network_passes_spikes_and_gradients():
    model, variables, series = network(True)
    keep = lambda module, _: isinstance(module, Fire)  # noqa: E731
    _, kept = apply(model, variables, series, capture_intermediates=keep)
    rates = [leaf.mean() for leaf in jax.tree.leaves(kept["intermediates"]) if leaf.ndim == 3]
    fired = [np.unique(leaf) for leaf in jax.tree.leaves(kept["intermediates"]) if leaf.ndim == 3]
    assert len(fired) == 4 + 2 * 6 + 1 and set(np.concatenate(fired)) == {0.0, 1.0}
    assert 0.02 < np.mean(rates) < 0.6

    def loss(params):
        return jnp.sum(model.apply({**variables, "params": params}, series) ** 2)

    grads = jax.jit(jax.grad(loss))(variables["params"])
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_names_with_the_prefix_of_data_parallel_load_too():
    model, variables, _ = network(False)
    state = {f"module.{k}": v for k, v in zoo.export(model, variables, "official").items()}
    again = zoo.convert(model, state)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_a_frame_of_another_width_is_refused():
    model, variables, _ = network(False)
    with pytest.raises(ValueError, match=r"shape \(batch, length, 6\), not \(1, 32, 5\)"):
        model.apply(variables, jnp.zeros((1, 32, 5)))


# ------------------------------------------------------------------------------- learning


@pytest.mark.slow
def test_it_learns_the_delay_between_two_pulses():
    """Only a memory tells the classes apart: both pulses are alike and start anywhere."""
    model = zoo.create("lmuformer_test", context_length=48, theta=48.0, variates=1, num_classes=3)

    def batch(key, size=32):
        where, which = jax.random.split(key)
        label = jax.random.randint(which, (size,), 0, 3)
        start = jax.random.randint(where, (size,), 0, 12)
        time = jnp.arange(48)[None]
        second = (start + 8 + 10 * label)[:, None]
        pulses = (time == start[:, None]) | (time == second)
        return pulses[..., None].astype(jnp.float32), label

    variables = model.init(jax.random.key(0), batch(jax.random.key(0))[0])
    optimizer = optax.adam(5e-3)

    def loss(params, stats, key):
        x, label = batch(key)
        logits, new = model.apply(
            {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), new

    @jax.jit
    def learn(variables):
        def step(carry, key):
            params, stats, state = carry
            grads, new = jax.grad(loss, has_aux=True)(params, stats, key)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), new["batch_stats"], state), None

        params = variables["params"]
        carry = (params, variables["batch_stats"], optimizer.init(params))
        keys = jax.random.split(jax.random.key(1), 300)
        params, stats, _ = jax.lax.scan(step, carry, keys)[0]
        return {"params": params, "batch_stats": stats}

    x, label = batch(jax.random.key(2), 512)
    assert (apply(model, learn(variables), x).argmax(-1) == label).mean() > 0.95
