"""Text from any causal language model: one compiled loop over `model.step`.

    model, variables = zoo.load("gpt2", "model.safetensors")
    tokens = generate(model, variables, prompt, steps=100, rng=jax.random.key(0),
                      sampler=Draw(Temperature(0.8), TopK(40)))

A model needs `init_state(batch, length) -> state` and `step(state, tokens, mask) -> (state,
logits)`. Attention keeps keys and values of all tokens or of a window, recurrent models a state of
one size, so that the length of a text does not matter to them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from zoo.inference.samplers import Sampler, greedy
from zoo.layers.causal import check_tokens

Adjust = Callable[[Float[Array, "batch vocab"], Bool[Array, "batch vocab"]], Array]


def generate(
    model: nn.Module,
    variables: Mapping[str, Any],
    prompt: Int[Array, "batch length"] | Sequence[Sequence[int]],
    *,
    steps: int,
    rng: PRNGKeyArray | None = None,
    sampler: Sampler = greedy,
    mask: Array | None = None,
    stop: int | Sequence[int] | None = None,
    adjust: Adjust | None = None,
) -> Int[Array, "batch steps"]:
    """Continue prompts token by token.

    Greedy tokens are those of a call on the whole text each time. What a row gets depends on its
    own prompt alone, and with a sampler on `rng` and on its place in the batch.

    Args:
      model: a causal language model.
      variables: of the model.
      prompt: tokens, `[batch, length]`; or lists of different lengths.
      steps: how many tokens to add.
      rng: a key of `jax.random`; samplers that draw need one.
      sampler: `(rng, logits) -> tokens`, see `zoo.inference.samplers`.
      mask: of the prompt: 1 or True for text, 0 for padding, at either side; None: all is text.
      stop: token or tokens that end a text. When all texts have ended, the loop does.
      adjust: `(logits, seen) -> logits` before the sampler, where `seen` says for each row which
        tokens its text has, such as `RepetitionPenalty`.

    Returns:
      The new tokens; what comes after a stop token is that stop token again.

    Raises:
      ValueError: for a model without steps, an empty prompt, or one that is not of this form.
    """
    check_steps(model, steps)
    prompt, mask = padded(prompt, mask)
    check_tokens(model, prompt, mask)
    stops = [] if stop is None else [stop] if np.ndim(stop) == 0 else list(stop)
    return _generate(
        variables,
        prompt,
        mask,
        rng,
        jnp.asarray(stops, jnp.int32),
        model=model,
        steps=steps,
        sampler=sampler,
        adjust=adjust,
    )


def check_steps(model: nn.Module, steps: int) -> None:
    """Raise ValueError for a model that cannot continue a text, or for no steps."""
    if not (hasattr(model, "init_state") and hasattr(model, "step")):
        raise ValueError(
            f"{type(model).__name__} has no init_state and step: it cannot continue a text."
        )
    if steps < 1:
        raise ValueError(f"steps={steps} should be 1 or more.")


def padded(
    prompt: Array | Sequence[Sequence[int]], mask: Array | None = None
) -> tuple[Int[Array, "batch length"], Bool[Array, "batch length"] | None]:
    """Prompts with all padding at the left, and their mask (None: there is no padding).

    Args:
      prompt: tokens, `[batch, length]`; or lists of different lengths, without a mask.
      mask: True for text.

    Raises:
      ValueError: for an empty prompt or shapes that do not fit.
    """
    ragged = isinstance(prompt, Sequence) and all(isinstance(row, Sequence) for row in prompt)
    if ragged and mask is None:
        lengths = np.array([len(row) for row in prompt])
        mask = np.arange(max(lengths, default=0)) < lengths[:, None]
        tokens = np.concatenate([np.asarray(row) for row in prompt if len(row)] or [[]])
        rows = np.zeros(mask.shape, tokens.dtype)
        rows[mask] = tokens
        prompt, mask = rows, None if mask.all() else mask
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 2 or not jnp.issubdtype(prompt.dtype, jnp.integer) or 0 in prompt.shape:
        raise ValueError(
            f"A prompt is integers of shape (batch, length), not {prompt.dtype} of shape "
            f"{prompt.shape}; start an empty text with the token that begins texts."
        )
    if mask is None:
        return prompt, None
    mask = jnp.asarray(mask) != 0
    if mask.shape != prompt.shape:
        raise ValueError(
            f"mask has shape {mask.shape}; it should be that of the prompt, {prompt.shape}."
        )
    if not isinstance(mask, jax.core.Tracer) and not np.asarray(mask).any(1).all():
        row = int(np.asarray(mask).any(1).argmin())
        raise ValueError(f"Prompt {row} has no token; start it with the one that begins texts.")
    order = jnp.argsort(mask, axis=1, stable=True)  # padding first, the text in its order
    return jnp.take_along_axis(prompt, order, 1), jnp.take_along_axis(mask, order, 1)


@partial(jax.jit, static_argnames=("model", "steps", "sampler", "adjust"))
def _generate(variables, prompt, mask, rng, stop, *, model, steps, sampler, adjust):
    batch, length = prompt.shape
    step = partial(model.apply, variables, method="step")
    state = model.init_state(batch, length + steps)
    if length > 1:
        state, _ = step(state, prompt[:, :-1], None if mask is None else mask[:, :-1])
    seen = None
    if adjust is not None:
        counted = jnp.ones(prompt.shape, bool) if mask is None else mask
        empty = jnp.zeros((batch, model.vocab_size), bool)
        seen = jax.vmap(lambda s, t, m: s.at[t].max(m))(empty, prompt, counted)

    def going_on(carry):
        i, *_, ended = carry
        return (i < steps) & ~ended.all()

    def add(carry):
        i, state, token, out, seen, ended = carry
        state, logits = step(state, token[:, None])
        logits = logits[:, 0].astype(jnp.float32)
        if adjust is not None:
            logits = adjust(logits, seen)
        new = sampler(None if rng is None else jax.random.fold_in(rng, i), logits)
        token = jnp.where(ended, token, new.astype(token.dtype))
        if adjust is not None:
            seen = seen.at[jnp.arange(batch), token].set(True)
        ended |= jnp.isin(token, stop)
        # The columns from here on: an ended text repeats its stop token, also if the loop ends.
        out = jnp.where(jnp.arange(steps) >= i, token[:, None], out)
        return i + 1, state, token, out, seen, ended

    out = jnp.zeros((batch, steps), prompt.dtype)
    carry = (0, state, prompt[:, -1], out, seen, jnp.zeros(batch, bool))
    return jax.lax.while_loop(going_on, add, carry)[3]
