"""Beam search: the likeliest continuations, kept side by side.

found = beam_search(model, variables, prompt, steps=20, beams=4)
found.tokens[0, 0]                                   the best one of the first prompt
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from zoo.inference.generate import check_steps, padded
from zoo.layers.causal import check_tokens


class Beams(NamedTuple):
    """Continuations of each prompt, the best first.

    Attributes:
      tokens: what comes after a stop token is that stop token again.
      scores: the logarithm of the probability, over the number of tokens to the power of
        `length_penalty`; -inf where there are fewer continuations than beams.
    """

    tokens: Int[Array, "batch beams steps"]
    scores: Float[Array, "batch beams"]


def beam_search(
    model: nn.Module,
    variables: Mapping[str, Any],
    prompt: Int[Array, "batch length"] | Sequence[Sequence[int]],
    *,
    steps: int,
    beams: int = 4,
    mask: Array | None = None,
    stop: int | Sequence[int] | None = None,
    length_penalty: float = 1.0,
) -> Beams:
    """Keep the `beams` likeliest continuations at every step.

    They are compared by their probability while they grow, ended ones among them, and ordered by
    their scores at the end.

    Args:
      model: a causal language model with `init_state` and `step`.
      variables: of the model.
      prompt: tokens, `[batch, length]`; or lists of different lengths.
      steps: how many tokens to add.
      beams: continuations of each prompt; 1 is greedy.
      mask: of the prompt: 1 or True for text, 0 for padding, at either side; None: all is text.
      stop: token or tokens that end a text.
      length_penalty: 0 compares probabilities, which short texts win; 1 their mean a token.

    Raises:
      ValueError: for a model without steps, an empty prompt, or numbers below 1.
    """
    check_steps(model, steps)
    if beams < 1:
        raise ValueError(f"beams={beams} should be 1 or more.")
    prompt, mask = padded(prompt, mask)
    check_tokens(model, prompt, mask)
    stops = [] if stop is None else [stop] if np.ndim(stop) == 0 else list(stop)
    return _search(
        variables,
        prompt,
        mask,
        jnp.asarray(stops, jnp.int32),
        length_penalty,
        model=model,
        steps=steps,
        beams=beams,
    )


@partial(jax.jit, static_argnames=("model", "steps", "beams"))
def _search(variables, prompt, mask, stop, length_penalty, *, model, steps, beams):
    batch, length = prompt.shape
    step = partial(model.apply, variables, method="step")
    state = model.init_state(batch, length + steps)
    if length > 1:
        state, _ = step(state, prompt[:, :-1], None if mask is None else mask[:, :-1])
    state = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0) if x.ndim else x, state)
    row = jnp.arange(batch)[:, None] * beams

    def add(carry, i):
        state, token, out, scores, ended, counts = carry
        state, logits = step(state, token.reshape(-1, 1))
        logs = jax.nn.log_softmax(logits[:, 0].astype(jnp.float32)).reshape(batch, beams, -1)
        vocab = logs.shape[-1]
        again = jnp.where(jnp.arange(vocab) == token[..., None], 0.0, -jnp.inf)
        logs = jnp.where(ended[..., None], again, logs)
        scores, best = jax.lax.top_k((scores[..., None] + logs).reshape(batch, -1), beams)
        parent, token = best // vocab, (best % vocab).astype(token.dtype)
        rows = (row + parent).reshape(-1)
        state = jax.tree.map(lambda x: x[rows] if x.ndim else x, state)
        out, ended, counts = (
            jnp.take_along_axis(x, parent.reshape(parent.shape + (1,) * (x.ndim - 2)), axis=1)
            for x in (out, ended, counts)
        )
        counts = counts + ~ended
        ended = ended | jnp.isin(token, stop)
        return (state, token, out.at[:, :, i].set(token), scores, ended, counts), None

    # One beam at first: the others would be the same text.
    scores = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)
    carry = (
        state,
        jnp.repeat(prompt[:, -1:], beams, axis=1),
        jnp.zeros((batch, beams, steps), prompt.dtype),
        jnp.broadcast_to(scores, (batch, beams)),
        jnp.zeros((batch, beams), bool),
        jnp.zeros((batch, beams), jnp.int32),
    )
    (_, _, out, scores, _, counts), _ = jax.lax.scan(add, carry, jnp.arange(steps))
    scores = scores / counts.astype(jnp.float32) ** length_penalty
    order = jnp.argsort(-scores, axis=1, stable=True)
    return Beams(
        jnp.take_along_axis(out, order[..., None], axis=1),
        jnp.take_along_axis(scores, order, axis=1),
    )
