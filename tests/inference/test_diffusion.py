"""Schedules, solvers and guidance, against closed forms of Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.inference.diffusion import (
    DDIM,
    DDPM,
    KINDS,
    Diffusion,
    DPMSolver,
    Euler,
    Flow,
    Guidance,
    Level,
    add_noise,
    clean,
    log_variance,
    posterior_mean,
    respace,
    sample,
    target,
    variational_bound,
)

MEAN, DEVIATION = 0.7, 0.4


def best(kind, schedule, mean=MEAN, deviation=DEVIATION):
    """The prediction of least squared error for data N(mean, deviation^2)."""
    levels = schedule.levels()
    order = np.argsort(levels.time[:-1])
    table = [jnp.asarray(np.asarray(v)[:-1][order]) for v in levels]
    times = table[0]

    def predict(x, t):
        row = jnp.searchsorted(times, t[0])
        level = Level(*(v[row] for v in table))
        spread = (level.alpha * deviation) ** 2 + level.sigma**2
        x0 = mean + level.alpha * deviation**2 / spread * (x - level.alpha * mean)
        noise = (x - level.alpha * x0) / level.sigma
        return target(kind, x0, noise, level)

    return predict


def exact(schedule, x):
    """Where the flow without noise takes `x` for that data."""
    levels = schedule.levels()
    alpha, sigma = levels.alpha[0], levels.sigma[0]
    spread = np.sqrt((alpha * DEVIATION) ** 2 + sigma**2)
    return MEAN + DEVIATION * (x - alpha * MEAN) / spread


# ------------------------------------------------------------------------------ schedules


def test_levels_are_those_of_the_published_schedules():
    """Products of 1 - beta in Python's numbers."""
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    kept = np.cumprod(1 - np.array(betas))
    levels = Diffusion().levels()
    assert len(levels.time) == 1001 and levels.sigma[-1] == 0 and levels.alpha[-1] == 1
    np.testing.assert_allclose(levels.alpha[:-1][::-1], np.sqrt(kept), rtol=1e-6)
    np.testing.assert_allclose(levels.beta[:-1][::-1], betas, rtol=1e-6)
    np.testing.assert_array_equal(levels.time[:-1], np.arange(1000)[::-1])
    cosine = Diffusion(betas="cosine").levels()
    middle = np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) ** 2
    wanted = middle / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine.alpha[500] ** 2, wanted, rtol=1e-5)
    with pytest.raises(ValueError, match="neither 'linear' nor 'cosine'"):
        Diffusion(betas="quadratic").levels()


def test_steps_are_left_out_without_changing_the_levels_that_stay():
    assert respace(1000, 4) == [0, 333, 666, 999]
    assert respace(300, "10,15,20") == respace(300, (10, 15, 20))
    assert respace(1000, "ddim50") == list(range(0, 1000, 20))
    with pytest.raises(ValueError, match="No whole stride takes 7 of 10"):
        respace(10, "ddim7")
    with pytest.raises(ValueError, match="11 steps cannot be taken"):
        respace(10, 11)
    _, alpha, sigma, *_ = (v[:-1] for v in Diffusion(use=10, spacing="snr").levels())
    even = np.log(alpha / sigma)
    np.testing.assert_allclose(np.diff(even), np.diff(even).mean(), rtol=0.3)
    few, all_ = Diffusion(use=25).levels(), Diffusion().levels()
    rows = [999 - int(t) for t in few.time[:-1]]
    np.testing.assert_allclose(few.alpha[:-1], np.asarray(all_.alpha)[rows], rtol=1e-6)
    ratio = np.asarray(few.alpha[:-1], float) ** 2 / np.asarray(few.alpha[1:], float) ** 2
    np.testing.assert_allclose(few.beta[:-1], 1 - ratio, atol=1e-5)


def test_a_flow_is_shifted_towards_the_noise():
    sigma = Flow(4, shift=5.0).sigmas()
    np.testing.assert_allclose(sigma, [1, 15 / 16, 5 / 6, 5 / 8, 0], rtol=1e-12)
    levels = Flow(4, shift=5.0).levels()
    np.testing.assert_allclose(levels.time, 1000 * sigma)
    np.testing.assert_allclose(levels.alpha, 1 - sigma)


# ----------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_of_every_kind_say_the_same(kind):
    schedule = Flow(10) if kind == "flow" else Diffusion(use=10)
    levels = schedule.levels()
    level = Level(*(jnp.asarray(v)[jnp.array([2, 7])] for v in levels))
    x0, noise = jax.random.normal(jax.random.key(0), (2, 2, 3, 4))
    x = add_noise(x0, noise, level)
    np.testing.assert_allclose(clean(kind, target(kind, x0, noise, level), x, level), x0, atol=1e-4)


def test_unknown_kinds_are_refused():
    level, cleaner = Diffusion().at(jnp.array([3]))
    x = jnp.zeros((1, 2))
    for call in (
        lambda: target("score", x, x, level),
        lambda: clean("score", x, x, level),
    ):
        with pytest.raises(ValueError, match="noise or velocity or clean or flow, not 'score'"):
            call()
    with pytest.raises(ValueError, match="small, large or learned, not 'huge'"):
        log_variance("huge", None, level, cleaner, x)


def test_the_posterior_is_that_of_bayes_rule():
    """Mean and variance of q(x_s | x_t, x_0) by multiplying two Gaussians, in float64."""
    index = np.array([1, 400, 999])
    level, cleaner = Diffusion().at(index)
    x0, x = np.array([[0.3], [-1.0], [2.0]]), np.array([[0.5], [0.2], [-0.7]])
    full = Diffusion()
    kept = np.cumprod(1 - full._betas())
    beta, before = full._betas()[index][:, None], kept[index - 1][:, None]
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = (np.sqrt(1 - beta) * x / beta + np.sqrt(before) * x0 / (1 - before)) / precision
    got = posterior_mean(jnp.float32(x0), jnp.float32(x), level, cleaner)
    np.testing.assert_allclose(got, mean, rtol=1e-4)
    log_var = log_variance("small", None, level, cleaner, jnp.float32(x))
    np.testing.assert_allclose(np.exp(log_var), 1 / precision, rtol=1e-4)
    large = log_variance("large", None, level, cleaner, jnp.float32(x))
    np.testing.assert_allclose(np.exp(large), beta, rtol=1e-5)
    for value, wanted in ((-1.0, log_var), (1.0, large), (0.0, (log_var + large) / 2)):
        got = log_variance("learned", jnp.full((3, 1), value), level, cleaner, jnp.float32(x))
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_the_bound_is_zero_for_the_posterior_itself():
    level, cleaner = Diffusion().at(jnp.array([50, 700]))
    x0, noise = jax.random.normal(jax.random.key(1), (2, 2, 5, 3))
    x = add_noise(x0, noise, level)
    mean = posterior_mean(x0, x, level, cleaner)
    log_var = jnp.broadcast_to(log_variance("small", None, level, cleaner, x), x.shape)
    bits = variational_bound(x0, x, mean, log_var, level, cleaner)
    np.testing.assert_allclose(bits, 0, atol=1e-6)
    worse = variational_bound(x0, x, mean, log_var + 1.0, level, cleaner)
    np.testing.assert_allclose(worse, 0.5 * np.exp(-1) / np.log(2), rtol=1e-4)


# --------------------------------------------------------------------------------- solvers


@pytest.mark.parametrize("kind", ["noise", "velocity", "clean"])
@pytest.mark.parametrize("make, steps, error", [(DDIM, 100, 0.03), (DPMSolver, 25, 0.01)])
def test_solvers_without_noise_follow_the_exact_flow(make, steps, error, kind):
    schedule = Diffusion(use=steps, spacing="snr")
    start = jnp.linspace(-2, 2, 9)[:, None]
    x = sample(best(kind, schedule), start.shape, schedule=schedule, solver=make(kind),
               rng=jax.random.key(0), start=start)  # fmt: skip
    np.testing.assert_allclose(x, exact(schedule, start), atol=error)


def test_the_second_order_solver_errs_less_and_its_error_falls_faster():
    start = jnp.linspace(-2, 2, 9)[:, None]

    def error(solver, steps):
        schedule = Diffusion(use=steps, spacing="snr")
        x = sample(best("noise", schedule), start.shape, schedule=schedule, solver=solver,
                   rng=jax.random.key(0), start=start)  # fmt: skip
        return np.abs(x - exact(schedule, start)).max()

    first, second = ([error(solver, n) for n in (20, 80)] for solver in (DDIM(), DPMSolver()))
    assert second[0] < first[0] and second[1] < first[1]
    assert second[0] / second[1] > 3 * first[0] / first[1]


def test_euler_follows_the_straight_path_of_one_point_exactly():
    """With one point as data the velocity never changes: a single step returns it."""
    point = jnp.array([0.3, -1.2])
    for steps in (1, 7):
        schedule = Flow(steps, shift=3.0)

        def velocity(x, t):
            return (x - point) / (t[:, None] / 1000)

        x = sample(velocity, (4, 2), schedule=schedule, solver=Euler(), rng=jax.random.key(0))
        np.testing.assert_allclose(x, np.broadcast_to(point, x.shape), atol=1e-5)


def test_euler_gives_the_distribution_of_the_data():
    schedule = Flow(100)
    start = jnp.linspace(-2, 2, 9)[:, None]
    flow = sample(best("flow", schedule), start.shape, schedule=schedule, solver=Euler(),
                  rng=jax.random.key(0), start=start)  # fmt: skip
    np.testing.assert_allclose(flow, exact(schedule, start), atol=0.02)
    x0 = sample(best("clean", schedule), start.shape, schedule=schedule, solver=Euler("clean"),
                rng=jax.random.key(0), start=start)  # fmt: skip
    np.testing.assert_allclose(x0, flow, atol=1e-4)


@pytest.mark.parametrize("solver", [DDPM(), DDIM(eta=1.0), DDPM("velocity", "small")])
def test_solvers_with_noise_give_the_distribution_of_the_data(solver):
    """Mean and deviation of 4,096 samples, within five standard errors and a bias."""
    schedule = Diffusion(use=200)
    x = sample(best(solver.prediction, schedule), (4096, 1), schedule=schedule, solver=solver,
               rng=jax.random.key(0))  # fmt: skip
    assert abs(x.mean() - MEAN) < 5 * DEVIATION / 64
    assert abs(x.std() - DEVIATION) < 5 * DEVIATION / 90 + 0.01


def test_a_learned_variance_at_its_lower_bound_is_the_small_one():
    schedule = Diffusion(use=20)
    predict = best("noise", schedule)

    def with_values(x, t):
        noise = predict(x, t)
        return jnp.concatenate([noise, -jnp.ones_like(noise)], -1)

    runs = [
        sample(p, (8, 3), schedule=schedule, solver=DDPM(variance=v), rng=jax.random.key(2))
        for p, v in ((predict, "small"), (with_values, "learned"))
    ]
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-5)


def test_clean_samples_are_clipped():
    schedule = Diffusion(use=20)
    for solver in (DDPM(clip=0.5), DDIM(clip=0.5), DPMSolver(clip=0.5)):
        x = sample(best("noise", schedule, mean=3.0), (64, 1), schedule=schedule, solver=solver,
                   rng=jax.random.key(0))  # fmt: skip
        assert np.abs(x).max() <= 0.5 + 1e-6


# -------------------------------------------------------------------------------- guidance


def test_guidance_draws_a_line_through_both_predictions():
    """In noise space, for Gaussians of one deviation, this moves the mean along the line, too."""
    schedule = Diffusion(use=50)
    with_it, without = best("noise", schedule, mean=1.0), best("noise", schedule, mean=0.0)

    def run(predict, guidance=None):
        start = jnp.linspace(-1, 1, 5)[:, None]
        return sample(predict, (5, 1), schedule=schedule, solver=DDIM(), rng=jax.random.key(0),
                      guidance=guidance, start=start)  # fmt: skip

    np.testing.assert_array_equal(run(with_it, Guidance(1.0, without)), run(with_it))
    np.testing.assert_allclose(run(with_it, Guidance(0.0, without)), run(without), atol=1e-5)
    double = run(best("noise", schedule, mean=2.0))
    np.testing.assert_allclose(run(with_it, Guidance(2.0, without)), double, atol=1e-4)


def test_guidance_leaves_the_variance_alone():
    def predict(scale):
        return lambda x, t: jnp.concatenate([scale * jnp.ones_like(x), scale * x], -1)

    x = jnp.ones((1, 2))
    out = Guidance(3.0, predict(1.0)).guide(predict(2.0))(x, jnp.zeros(1))
    np.testing.assert_array_equal(out, [[4.0, 4.0, 2.0, 2.0]])


def test_samples_are_a_function_of_the_key():
    schedule = Diffusion(use=5)
    predict = best("noise", schedule)
    runs = [
        sample(predict, (3, 2), schedule=schedule, solver=DDPM(), rng=jax.random.key(key))
        for key in (0, 0, 1)
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert np.abs(runs[0] - runs[2]).max() > 0
