"""Small formats, SlimFit, ternary students, pruning and offload: what holds of each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.methods import compress, offload, slimfit, ternary
from zoo.methods.float_quantize import Format, channel_biases, fold
from zoo.tasks.apply import zeros_like_inputs


def normal(key, *shape):
    return jax.random.normal(jax.random.key(key), shape)


@pytest.mark.parametrize("exponent", [1, 2, 3])
def test_numbers_of_four_bits_are_on_the_grid_and_stay_there(exponent):
    form, x = Format.of(4, exponent), jnp.sort(normal(0, 200))
    bias = form.bias(jnp.abs(x).max())
    q = form.quantise(x, bias)
    grid = form.grid(float(bias))
    assert len(grid) == 8
    assert np.abs(np.abs(np.asarray(q))[:, None] - grid).min(1).max() < 1e-5 * grid.max()
    np.testing.assert_allclose(form.quantise(q, bias), q, rtol=1e-5)
    np.testing.assert_array_equal(form.quantise(-x, bias), -q)
    assert np.all(np.diff(q) >= 0)


def test_folding_channel_shifts_into_weights_is_exact():
    form, x = Format(), normal(0, 6, 5) * 2.0 ** jnp.arange(-2, 3)
    _, rho, shift = channel_biases(form, jnp.abs(x).max(0))
    q, weight = form.quantise(x, rho + shift), normal(1, 4, 5)
    np.testing.assert_array_equal((q * 2.0**shift) * fold(weight, shift)[0], q * weight[0])
    grid = form.quantise(q * 2.0**shift, rho)
    np.testing.assert_allclose(grid, q * 2.0**shift, rtol=1e-5)


def test_what_a_frozen_map_keeps_is_nothing_of_its_input():
    x, kernel = normal(0, 64, 32), normal(1, 32, 16)

    def kept(frozen):
        _, back = jax.vjp(lambda x, k: slimfit.dense(x, k, frozen), x, kernel)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(back))

    assert kept(True) <= kernel.nbytes
    assert kept(False) >= kernel.nbytes + x.nbytes
    codes = slimfit.codes(x, 2, -8, 7)
    np.testing.assert_array_equal(slimfit.unpack(slimfit.pack(codes), codes.shape), codes)
    assert slimfit.pack(codes).nbytes == x.size // 2


def test_a_ternary_tensor_has_three_numbers_and_rows_three_each():
    x = normal(0, 6, 32)
    assert len(np.unique(ternary.ternary(x))) == 3
    assert all(len(np.unique(row)) == 3 for row in np.asarray(ternary.ternary(x, rows=True)))


@pytest.mark.parametrize("mode", ["map", "context", "output"])
def test_a_teacher_that_is_the_student_changes_nothing(mode):
    model = zoo.create("bert_test")
    inputs = {k: x.at[:, ::3].set(1) for k, x in zeros_like_inputs(model, 2).items()}
    variables = jax.jit(model.init)(jax.random.key(0), **inputs)

    def run(method, **options):
        return jax.jit(lambda v: method.wrap(model).apply(v, **inputs, **options))(variables)

    plain, made = run(ternary.Ternary(), mutable="intermediates")
    seen = ternary.seen(made["intermediates"])
    assert len(seen) == model.depth
    got = run(ternary.Ternary(intervention=mode, teacher=seen))
    np.testing.assert_allclose(got, plain, atol=2e-5 * np.abs(plain).max())
    with pytest.raises(ValueError, match="and there is none"):
        run(ternary.Ternary(intervention=mode))


def test_masks_keep_what_they_say():
    weight = normal(0, 6, 12)
    mask = np.asarray(compress.nm_mask(weight, 2, 4))
    assert (mask.reshape(6, 3, 4).sum(-1) == 2).all()
    assert compress.magnitude_mask(weight, 0.75).sum() == 18
    with pytest.raises(ValueError, match="whole groups of 5"):
        compress.nm_mask(weight, 2, 5)


def test_early_exit_at_its_ends_is_the_first_and_the_last_layer():
    logits = normal(0, 4, 3, 5)
    np.testing.assert_array_equal(compress.entropy_exit(logits, 0.0), [3, 3, 3])
    np.testing.assert_array_equal(compress.entropy_exit(logits, np.inf), [0, 0, 0])


def test_codes_of_eight_bits_lose_little():
    x, weight = normal(0, 16, 64), normal(1, 8, 64)
    y, total = compress.int8_matmul(x, weight)
    assert total.dtype == jnp.int32
    assert np.abs(y - x @ weight.T).max() < 0.02 * np.abs(x @ weight.T).max()


@pytest.mark.parametrize("count, stride", [(11, 3), (6, 3), (8, 2), (2, 4)])
def test_every_subgroup_comes_home_and_is_cast_once(count, stride):
    plan = offload.schedule(count, stride)
    flushed = [back for _, back, _ in plan.rounds if back >= 0]
    fetched = [fetch for _, _, fetch in plan.rounds if fetch >= 0]
    device = [x for x in range(count) if plan.decisions[x] == offload.DEVICE]
    assert fetched == device
    assert sorted({*flushed, plan.left_device} - {-1}) in (device, device[:-1])
    assert sum(n for _, n in plan.casts) + len(plan.left_host) + len(device) == count


def test_every_schedule_gives_the_same_bits():
    start, gradient = normal(0, 30), normal(1, 30)
    optimizer = offload.AdamW(0.1, decay=0.1)
    ways = [offload.update(optimizer, gradient, offload.init(start, 5), k) for k in (None, 2, 3)]
    for way in ways[1:]:
        np.testing.assert_array_equal(np.concatenate(way.params), np.concatenate(ways[0].params))
