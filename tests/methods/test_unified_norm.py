"""Unified normalisation beyond its reference cases: fusing, statistics, and backward state."""

import jax
import jax.numpy as jnp
import numpy as np

from zoo.methods import unified_norm
from zoo.methods.unified_norm import UnifiedNorm


def tokens(key, shape=(2, 5, 4)):
    return jax.random.normal(jax.random.key(key), shape)


def test_a_fused_map_gives_the_same_without_division_or_root():
    norm, x = UnifiedNorm(), tokens(0)
    scale, bias, running = jnp.arange(1.0, 5), jnp.ones(4), jnp.arange(2.0, 6)
    kernel, shift = jax.random.normal(jax.random.key(1), (4, 3)), jnp.arange(3.0)
    wanted = unified_norm.evaluate(norm, x, scale, bias, running) @ kernel + shift
    fused = unified_norm.fuse(norm, scale, bias, running, kernel, shift)
    got = x @ fused[0] + fused[1]
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
    names = {e.primitive.name for e in jax.make_jaxpr(lambda x: x @ fused[0] + fused[1])(x).eqns}
    assert not names & {"div", "sqrt", "rsqrt"}


def test_padding_is_left_out_of_the_statistics():
    norm, x = UnifiedNorm(), tokens(0)
    valid = jnp.arange(5) < jnp.array([[5], [3]])
    forward, backward = unified_norm.init_state(norm, 4)
    _, one = unified_norm.normalise(norm, x, 1.0, 0.0, forward, backward, valid)
    other = jnp.where(valid[..., None], x, 1e6)
    _, two = unified_norm.normalise(norm, other, 1.0, 0.0, forward, backward, valid)
    np.testing.assert_array_equal(one.running, two.running)


def test_an_outlier_is_skipped_and_counted():
    norm = UnifiedNorm(window=2, warmup=1, filtration=True)
    forward, backward = unified_norm.init_state(norm, 4)
    counts = []
    for step in range(8):
        x = tokens(step, (8, 16, 4)) * (30 if step == 6 else 1)
        _, forward = unified_norm.normalise(norm, x, 1.0, 0.0, forward, backward)
        counts.append(int(forward.skips))
    assert counts[6] == counts[5] + 1


def test_the_gradient_of_the_backward_state_is_the_next_one():
    norm, x = UnifiedNorm(), tokens(0)
    forward, backward = unified_norm.init_state(norm, 4)

    def loss(backward):
        y, _ = unified_norm.normalise(norm, x, jnp.ones(4), jnp.zeros(4), forward, backward)
        return jnp.sum(y**2)

    following = jax.grad(loss)(backward)
    z = x / jnp.sqrt((x**2).mean((0, 1)) + norm.epsilon)
    mean = (2 * z * z).mean((0, 1))
    np.testing.assert_allclose(following.ema, 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(following.window[1], mean, rtol=1e-5)
