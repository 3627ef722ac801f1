"""Sampling by diffusion and flow matching: schedules, solvers, guidance.

    x = sample(predict, shape, schedule=Diffusion(use=50), solver=DDIM(), rng=rng)

A noisy sample is `x = alpha x0 + sigma noise`; `predict(x, times)` is a network's answer to it. A
schedule says which levels are visited, from pure noise to none; a solver goes from one level to the
next. What the network predicts is one of

    noise       the noise itself (DDPM)
    velocity    alpha noise - sigma x0 (Salimans & Ho, arXiv 2202.00512)
    clean       x0
    flow        noise - x0, where alpha = 1 - sigma (rectified flow)

Solvers: DDPM (Ho et al., arXiv 2006.11239, with the learned variance of arXiv 2102.09672), DDIM
(arXiv 2010.02502), DPM-Solver++ 2M (arXiv 2211.01095), Euler's method for flows, and `Renoise` for
students of few steps. Everything is a pure function and runs under `jit`; channels are last.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

Predict = Callable[[Array, Array], Array]
KINDS = ("noise", "velocity", "clean", "flow")


class Level(NamedTuple):
    """A level of noise, as scalars, or with an axis for levels or examples.

    Attributes:
      time: what the network is told.
      alpha: factor of the clean sample.
      sigma: factor of the noise.
      beta: variance that the step from the next cleaner level adds.
      log_floor: logarithm of the variance of that step's reversal, given the clean sample; of the
        first step, where it is zero, that of the second.
    """

    time: Array
    alpha: Array
    sigma: Array
    beta: Array
    log_floor: Array


def _levels(times: np.ndarray, alpha: np.ndarray, sigma: np.ndarray) -> Level:
    """Levels from the noisiest to none, in float64 where differences are taken."""
    beta = 1.0 - (alpha[:-1] / alpha[1:]) ** 2
    posterior = beta * sigma[1:] ** 2 / np.maximum(sigma[:-1] ** 2, 1e-300)
    if len(posterior) > 1:
        posterior[-1] = posterior[-2]
    beta, posterior = (np.append(x, 0.0) for x in (beta, posterior))
    arrays = (times, alpha, sigma, beta, np.log(np.maximum(posterior, 1e-40)))
    return Level(*(x.astype(np.float32) for x in arrays))


class Schedule(Protocol):
    """Which levels are visited."""

    def levels(self) -> Level:
        """All, from the noisiest to `sigma = 0`: one more than there are steps."""


def respace(steps: int, use: int | str | tuple[int, ...]) -> list[int]:
    """Which of `steps` are used, rising (ADM's rule).

    Args:
      steps: of the process that was trained.
      use: how many, evenly spread; several numbers, or "10,20": so many of each equal part;
        "ddim50": every n-th for a whole n, as in the DDIM paper.

    Raises:
      ValueError: if there are not so many.
    """
    if isinstance(use, str) and use.startswith("ddim"):
        wanted = int(use.removeprefix("ddim"))
        for stride in range(1, steps):
            if len(range(0, steps, stride)) == wanted:
                return list(range(0, steps, stride))
        raise ValueError(f"No whole stride takes {wanted} of {steps} steps; choose a divisor.")
    if isinstance(use, str):
        use = tuple(int(n) for n in use.split(","))
    parts = (use,) if isinstance(use, int) else tuple(use)
    taken, start = set(), 0
    for i, count in enumerate(parts):
        size = steps // len(parts) + (i < steps % len(parts))
        if size < count:
            raise ValueError(f"{count} steps cannot be taken from a part of {size}.")
        stride = (size - 1) / (count - 1) if count > 1 else 1
        at = 0.0
        for _ in range(count):
            taken.add(start + round(at))
            at += stride
        start += size
    return sorted(taken)


@dataclass(frozen=True)
class Diffusion:
    """Discrete noise levels of a variance-preserving process (DDPM).

    Attributes:
      steps: of the process that was trained; times are 0 ... steps - 1.
      betas: "linear" (1e-4 to 0.02 at 1,000 steps) or "cosine".
      use: which steps are visited (see `respace`); None: all.
      spacing: "time", or "snr": of a number of steps, those nearest to even steps of the logarithm
        of the signal-to-noise ratio (DPM-Solver's choice), without repeats.
    """

    steps: int = 1000
    betas: str = "linear"
    use: int | str | tuple[int, ...] | None = None
    spacing: str = "time"

    def levels(self) -> Level:
        """The levels that are used, from the noisiest to none."""
        kept = np.cumprod(1.0 - self._betas())
        if self.spacing == "snr" and isinstance(self.use, int):
            log_snr = np.log(kept / (1 - kept))
            even = np.linspace(log_snr[0], log_snr[-1], self.use)
            used = np.unique(np.abs(log_snr - even[:, None]).argmin(1))
        elif self.spacing == "time":
            used = np.arange(self.steps) if self.use is None else respace(self.steps, self.use)
        else:
            raise ValueError(
                f"spacing={self.spacing!r} with use={self.use!r} is neither 'time' nor 'snr' with "
                "a number of steps."
            )
        kept, times = kept[used][::-1], np.append(np.asarray(used)[::-1], 0)
        return _levels(times, np.sqrt(np.append(kept, 1.0)), np.sqrt(np.append(1.0 - kept, 0.0)))

    def at(self, index: Int[Array, "batch"]) -> tuple[Level, Level]:
        """The levels of these steps, counted from the cleanest, and those one step cleaner."""
        levels = self.levels()
        row = len(levels.time) - 2 - index
        pick = [Level(*(jnp.asarray(x)[r] for x in levels)) for r in (row, row + 1)]
        return pick[0], pick[1]

    def _betas(self) -> np.ndarray:
        if self.betas == "linear":
            scale = 1000 / self.steps
            return np.linspace(scale * 1e-4, scale * 0.02, self.steps)
        if self.betas == "cosine":
            at = np.arange(self.steps + 1) / self.steps
            kept = np.cos((at + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.minimum(1 - kept[1:] / kept[:-1], 0.999)
        raise ValueError(f"betas={self.betas!r} is neither 'linear' nor 'cosine'.")


@dataclass(frozen=True)
class Flow:
    """Levels of a straight path: `alpha = 1 - sigma`, sigma from 1 to 0.

    Attributes:
      steps: how many.
      shift: above one, more steps are spent near the noise:
        `sigma = shift u / (1 + (shift - 1) u)` for u even between 1 and 0.
      scale: times are sigma times it.
    """

    steps: int
    shift: float = 1.0
    scale: float = 1000.0

    def sigmas(self) -> np.ndarray:
        """The `steps + 1` values of sigma, float64."""
        u = np.linspace(1.0, 0.0, self.steps + 1)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def levels(self) -> Level:
        """The levels, from pure noise to none."""
        sigma = self.sigmas()
        return _levels(sigma * self.scale, 1 - sigma, sigma)


# ----------------------------------------------------------------- what a prediction means


def _wide(value: Array, x: Array) -> Array:
    """A scalar, or one number an example, with axes to stand beside `x`."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value


def _like(level: Level, x: Array) -> Level:
    return Level(*(_wide(value, x) for value in level))


def add_noise(x0: Array, noise: Array, level: Level) -> Array:
    """`alpha x0 + sigma noise`."""
    level = _like(level, x0)
    return level.alpha * x0 + level.sigma * noise


def target(kind: str, x0: Array, noise: Array, level: Level) -> Array:
    """What a network of this kind should predict.

    Raises:
      ValueError: for an unknown kind.
    """
    level = _like(level, x0)
    if kind == "noise":
        return noise
    if kind == "velocity":
        return level.alpha * noise - level.sigma * x0
    if kind == "clean":
        return x0
    if kind == "flow":
        return noise - x0
    raise ValueError(f"A prediction is of kind {' or '.join(KINDS)}, not {kind!r}.")


def clean(kind: str, prediction: Array, x: Array, level: Level) -> Array:
    """The clean sample that a prediction implies (`target` backwards)."""
    level = _like(level, x)
    if kind == "noise":
        return x / level.alpha - level.sigma / level.alpha * prediction
    if kind == "velocity":
        return level.alpha * x - level.sigma * prediction
    if kind == "clean":
        return prediction
    if kind == "flow":
        return x - level.sigma * prediction
    raise ValueError(f"A prediction is of kind {' or '.join(KINDS)}, not {kind!r}.")


def noise_in(x0: Array, x: Array, level: Level) -> Array:
    """The noise that turns a clean sample into `x`."""
    level = _like(level, x)
    return (x - level.alpha * x0) / level.sigma


def posterior_mean(x0: Array, x: Array, level: Level, cleaner: Level) -> Array:
    """Mean of the sample one step cleaner, given the clean one and `x`."""
    level, cleaner = _like(level, x), _like(cleaner, x)
    toward = level.beta * cleaner.alpha / level.sigma**2
    stay = cleaner.sigma**2 * jnp.sqrt(1 - level.beta) / level.sigma**2
    return toward * x0 + stay * x


def log_variance(kind: str, values: Array | None, level: Level, cleaner: Level, x: Array) -> Array:
    """Logarithm of a DDPM step's variance.

    Args:
      kind: "small" (the posterior's), "large" (beta) or "learned", between both.
      values: of a learned variance, the network's numbers in -1 ... 1; else None.
      level: where the step begins.
      cleaner: where it ends.
      x: for its number of axes.
    """
    level, cleaner = _like(level, x), _like(cleaner, x)
    if kind == "small":
        return level.log_floor
    large = jnp.log(level.beta)
    if kind == "large":
        return jnp.where(cleaner.sigma > 0, large, level.log_floor)
    if kind == "learned":
        part = (values + 1) / 2
        return part * large + (1 - part) * level.log_floor
    raise ValueError(f"A variance is small, large or learned, not {kind!r}.")


def variational_bound(
    x0: Array, x: Array, mean: Array, log_var: Array, level: Level, cleaner: Level
) -> Float[Array, "batch"]:
    """Bits per dimension that a step of mean and log variance costs, one number an example.

    The divergence from the true posterior; at the last step, the negative log-likelihood of data
    in 255 equal steps of -1 ... 1. Gradients reach what `mean` and `log_var` let through.
    """
    true_mean = posterior_mean(x0, x, level, cleaner)
    true_log = _like(level, x).log_floor
    apart = (true_mean - mean) ** 2 * jnp.exp(-log_var)
    divergence = 0.5 * (log_var - true_log - 1.0 + jnp.exp(true_log - log_var) + apart)

    def below(z: Array) -> Array:  # the normal distribution function, as ADM approximates it
        return 0.5 * (1.0 + jnp.tanh(np.sqrt(2.0 / np.pi) * (z + 0.044715 * z**3)))

    narrow = jnp.exp(-0.5 * log_var)
    upper, lower = (below(narrow * (x0 - mean + side / 255.0)) for side in (1.0, -1.0))
    inside = jnp.log(jnp.maximum(upper - lower, 1e-12))
    first, last = (jnp.log(jnp.maximum(p, 1e-12)) for p in (upper, 1.0 - lower))
    likelihood = jnp.where(x0 < -0.999, first, jnp.where(x0 > 0.999, last, inside))
    axes = tuple(range(1, x.ndim))
    bits = [v.mean(axes) / math.log(2.0) for v in (divergence, -likelihood)]
    return jnp.where(cleaner.sigma > 0, bits[0], bits[1])


# --------------------------------------------------------------------------------- solvers


class Solver(Protocol):
    """Goes from one level to the next."""

    def init(self, x: Array) -> Any:
        """The state before the first step."""

    def step(
        self, state: Any, x: Array, t: Level, t_next: Level, prediction: Array, rng: PRNGKeyArray
    ) -> tuple[Any, Array]:
        """One step: the state, and the sample at `t_next`."""


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling.

    Attributes:
      prediction: its kind.
      variance: "small", "large" or "learned"; learned ones are the prediction's second half.
      clip: clean samples are kept within -clip ... clip; None: not.
    """

    prediction: str = "noise"
    variance: str = "small"
    clip: float | None = None

    def init(self, x: Array) -> tuple[()]:
        """Nothing."""
        return ()

    def step(
        self, state: tuple[()], x: Array, t: Level, t_next: Level, prediction: Array,
        rng: PRNGKeyArray,
    ) -> tuple[tuple[()], Array]:  # fmt: skip
        """The posterior's mean and noise of the variance; the last step is without noise."""
        mean, log_var, _ = self.reverse(x, t, t_next, prediction)
        noise = jax.random.normal(rng, x.shape, x.dtype)
        deviation = jnp.where(_like(t_next, x).sigma > 0, jnp.exp(0.5 * log_var), 0.0)
        return state, mean + deviation * noise

    def reverse(
        self, x: Array, t: Level, t_next: Level, prediction: Array
    ) -> tuple[Array, Array, Array]:
        """Mean and log variance of the next sample, and the clean sample that is aimed at."""
        values = None
        if self.variance == "learned":
            prediction, values = jnp.split(prediction, 2, -1)
        x0 = _clipped(clean(self.prediction, prediction, x, t), self.clip)
        log_var = log_variance(self.variance, values, t, t_next, x)
        return posterior_mean(x0, x, t, t_next), jnp.broadcast_to(log_var, x.shape), x0


@dataclass(frozen=True)
class DDIM:
    """Deterministic sampling, or with a part `eta` of DDPM's noise."""

    prediction: str = "noise"
    eta: float = 0.0
    clip: float | None = None

    def init(self, x: Array) -> tuple[()]:
        """Nothing."""
        return ()

    def step(
        self, state: tuple[()], x: Array, t: Level, t_next: Level, prediction: Array,
        rng: PRNGKeyArray,
    ) -> tuple[tuple[()], Array]:  # fmt: skip
        """Noise as predicted, at the next level. Channels beyond those of `x` are not used."""
        x0 = _clipped(clean(self.prediction, prediction[..., : x.shape[-1]], x, t), self.clip)
        noise = noise_in(x0, x, t)
        t, t_next = _like(t, x), _like(t_next, x)
        fresh = self.eta**2 * t.beta * t_next.sigma**2 / t.sigma**2
        x = t_next.alpha * x0 + jnp.sqrt(jnp.maximum(t_next.sigma**2 - fresh, 0.0)) * noise
        if self.eta:
            x = x + jnp.sqrt(fresh) * jax.random.normal(rng, x.shape, x.dtype)
        return state, x


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++ of second order with two steps (2M); the first and last are of first order."""

    prediction: str = "noise"
    clip: float | None = None

    def init(self, x: Array) -> tuple[Array, Array]:
        """No clean sample before, after an infinitely long step."""
        return jnp.zeros_like(x), jnp.full((), jnp.inf, jnp.float32)

    def step(
        self, state: tuple[Array, Array], x: Array, t: Level, t_next: Level, prediction: Array,
        rng: PRNGKeyArray,
    ) -> tuple[tuple[Array, Array], Array]:  # fmt: skip
        """Exponential integration of the clean sample, drawn straight through the last two."""
        before, last = state
        x0 = _clipped(clean(self.prediction, prediction[..., : x.shape[-1]], x, t), self.clip)
        half_log = [jnp.log(v.alpha) - jnp.log(v.sigma) for v in (t, t_next)]
        step = half_log[1] - half_log[0]
        second = jnp.isfinite(last) & jnp.isfinite(step) & (last > 0)
        weight = jnp.where(second, step / jnp.where(second, 2 * last, 1.0), 0.0)
        drawn = x0 + weight * (x0 - before)
        x = t_next.sigma / t.sigma * x - t_next.alpha * jnp.expm1(-step) * drawn
        return (x0, step), x


@dataclass(frozen=True)
class Euler:
    """Euler's method for flows: `x + (sigma_next - sigma) (noise - x0)`."""

    prediction: str = "flow"

    def init(self, x: Array) -> tuple[()]:
        """Nothing."""
        return ()

    def step(
        self, state: tuple[()], x: Array, t: Level, t_next: Level, prediction: Array,
        rng: PRNGKeyArray,
    ) -> tuple[tuple[()], Array]:  # fmt: skip
        """Along the predicted velocity."""
        velocity = prediction[..., : x.shape[-1]]
        if self.prediction != "flow":
            x0 = clean(self.prediction, velocity, x, t)
            velocity = noise_in(x0, x, t) - x0
        return state, x + (_like(t_next, x).sigma - _like(t, x).sigma) * velocity


@dataclass(frozen=True)
class Renoise:
    """Down to the clean sample, then up to the next level with fresh noise.

    How consistency models (arXiv 2303.01469, algorithm 1) and few-step students (DMD2, arXiv
    2405.14867) are sampled: every prediction is aimed at the data, not at a path.
    """

    prediction: str = "flow"
    clip: float | None = None

    def init(self, x: Array) -> tuple[()]:
        """Nothing."""
        return ()

    def step(
        self, state: tuple[()], x: Array, t: Level, t_next: Level, prediction: Array,
        rng: PRNGKeyArray,
    ) -> tuple[tuple[()], Array]:  # fmt: skip
        """The clean sample with the noise of the next level."""
        x0 = _clipped(clean(self.prediction, prediction[..., : x.shape[-1]], x, t), self.clip)
        return state, add_noise(x0, jax.random.normal(rng, x.shape, x.dtype), t_next)


def _clipped(x0: Array, limit: float | None) -> Array:
    return x0 if limit is None else jnp.clip(x0, -limit, limit)


# -------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: `u + scale (c - u)` in place of the conditional prediction c.

    Attributes:
      scale: 1 changes nothing and costs nothing; 0 is unconditional.
      unconditional: the prediction u without the condition, same call as `predict`.
    """

    scale: float
    unconditional: Predict

    def guide(self, predict: Predict) -> Predict:
        """The guided prediction; channels beyond the sample's stay those of `predict`."""
        if self.scale == 1.0:
            return predict

        def guided(x: Array, times: Array) -> Array:
            with_it, without = predict(x, times), self.unconditional(x, times)
            channels = x.shape[-1]
            rest = with_it[..., channels:]
            with_it, without = with_it[..., :channels], without[..., :channels]
            return jnp.concatenate([without + self.scale * (with_it - without), rest], -1)

        return guided


def sample(
    predict: Predict,
    shape: tuple[int, ...],
    *,
    schedule: Schedule,
    solver: Solver,
    rng: PRNGKeyArray,
    guidance: Guidance | None = None,
    start: Array | None = None,
) -> Array:
    """Samples from noise, level after level, in one compiled loop.

    Args:
      predict: `(x, times [batch]) -> prediction`, channels last; conditions are in its closure.
      shape: of the samples, batch first.
      schedule: the levels.
      solver: its `prediction` says of which kind predictions are.
      rng: of the first noise and of the solver's.
      guidance: classifier-free guidance.
      start: the first noise; None: normal numbers.

    Returns:
      Samples, float32.
    """
    first, rest = jax.random.split(rng)
    x = jax.random.normal(first, shape) if start is None else jnp.asarray(start, jnp.float32)
    predict = predict if guidance is None else guidance.guide(predict)
    levels = jax.tree.map(jnp.asarray, schedule.levels())
    pairs = tuple(Level(*(v[a:b] for v in levels)) for a, b in ((None, -1), (1, None)))

    def step(carry: tuple, at: tuple) -> tuple[tuple, None]:
        state, x = carry
        t, t_next, rng = at
        prediction = predict(x, jnp.full(shape[:1], t.time)).astype(jnp.float32)
        return solver.step(state, x, t, t_next, prediction, rng), None

    rngs = jax.random.split(rest, len(levels.time) - 1)
    (_, x), _ = jax.lax.scan(step, (solver.init(x), x), (*pairs, rngs))
    return x
