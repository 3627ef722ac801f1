"""Decision Transformer: a policy that continues a sequence of returns, states and actions.

Chen et al., "Decision Transformer: Reinforcement Learning via Sequence Modeling", NeurIPS 2021,
arXiv 2106.01345. Official code github.com/kzl/decision-transformer (MIT), whose two models are
here: for continuous control ("gym"), and for Atari.

    tokens     R_1, s_1, a_1, R_2, ...     the return still to come, the state, the action
    gym        embedding of each + E[time of its step], LayerNorm, GPT-2's blocks, LayerNorm
               action = tanh(W h) at s_t;  next state and return at a_t, not trained in the paper
    Atari      tanh of each embedding + P[place] + G[time of the first step], blocks, LayerNorm
               logits = W h at s_t, no bias;  states go through three convolutions

Padding of the gym model stands at the left. Its code masks by numbers, not by minus infinity: a
score after the query is -1e4, and -1e4 is added for a padded key. So a padded query sees the padded
tokens before it and, each alike, the real ones behind it. We do the same arithmetic.

    features                decision_transformer_hopper
    embed                   60 128          for 20 steps
    layer0                  60 128          up to layer2
    last_hidden_state       60 128
    state_prediction        20 11
    return_prediction       20 1
    prediction              20 3            of the actions
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import kernels_pallas
from zoo.checkpoints.rules import (
    Rule,
    Rules,
    Transform,
    chain,
    concat,
    conv,
    dense_rules,
    linear,
    norm_rules,
    reshape,
    squeeze,
    transpose,
)
from zoo.layers.causal import init
from zoo.layers.decoder import run_blocks
from zoo.layers.dense import Dense
from zoo.layers.mlp import ACTIVATIONS, Mlp, gelu
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.series import torch_linear
from zoo.models.language.gpt2 import GPT2Block, conv1d_rules
from zoo.system import System, Variant

MASKED = -1e4


class PaddedAttention(nn.Module):
    """Causal attention in which masked scores are -1e4, and padding adds -1e4."""

    num_heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        mask: Float[Array, "batch length"] | None,
        train: bool = False,
    ) -> Float[Array, "batch length channels"]:
        batch, length, channels = x.shape
        if channels % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide {channels} channels.")
        dense = partial(Dense, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype)
        heads = (batch, length, self.num_heads, channels // self.num_heads)
        query, key, value = (
            constrain(t.reshape(heads), "batch", "length", "heads", "head_dim")
            for t in jnp.split(dense(3 * channels, name="qkv")(x), 3, axis=-1)
        )
        dropping = train and self.dropout > 0
        if mask is None:
            y = kernels_pallas.attention(
                query,
                key,
                value,
                mask=kernels_pallas.Causal(),
                dropout=self.dropout if dropping else 0.0,
                rng=self.make_rng("dropout") if dropping else None,
            )
        else:
            scores = jnp.einsum("bind,bjnd->bnij", query, key).astype(jnp.float32)
            scores = scores / heads[-1] ** 0.5
            scores = jnp.where(jnp.tri(length, dtype=bool), scores, MASKED)
            scores = scores + ((1 - mask) * MASKED)[:, None, None]
            weights = nn.softmax(scores, axis=-1).astype(self.dtype)
            weights = nn.Dropout(self.dropout, deterministic=not train)(weights)
            y = jnp.einsum("bnij,bjnd->bind", weights, value)
        return dense(channels, name="out")(y.reshape(x.shape))


class PaddedBlock(nn.Module):
    """GPT-2's block with `PaddedAttention`."""

    num_heads: int
    mlp_dim: int
    activation: Callable[[Array], Array]
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        mask: Float[Array, "batch length"] | None,
        train: bool = False,
    ) -> Float[Array, "batch length channels"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(LayerNorm, epsilon=1e-5, **types)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = PaddedAttention(self.num_heads, self.dropout, name="attention", **types)
        x = x + drop(attention(norm(name="norm1")(x), mask, train))
        mlp = Mlp(self.mlp_dim, self.activation, kernel_init=init, name="mlp", **types)
        x = x + drop(mlp(norm(name="norm2")(x)))
        return constrain(x, "batch", "length", "channels")


class DecisionTransformer(Model):
    """Continuous control: returns, states and actions so far to the next action.

    Attributes:
      state_dim: size of a state.
      action_dim: size of an action.
      embed_dim: channels.
      depth: blocks.
      num_heads: must divide the channels.
      max_steps: rows of the table of times.
      mlp_dim: width of the MLPs; None: four times the channels.
      activation: a key of `zoo.layers.mlp.ACTIVATIONS`.
      action_tanh: whether actions lie in (-1, 1).
      dropout: rate on attention weights and both branches.
    """

    state_dim: int = 11
    action_dim: int = 3
    embed_dim: int = 128
    depth: int = 3
    num_heads: int = 1
    max_steps: int = 1000
    mlp_dim: int | None = None
    activation: str = "relu"
    action_tanh: bool = True
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, steps: int = 20
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for so many steps, the mask left out."""
        shape = lambda *rest: jax.ShapeDtypeStruct((batch_size, steps, *rest), jnp.float32)  # noqa: E731
        return {
            "states": shape(self.state_dim),
            "actions": shape(self.action_dim),
            "returns": shape(1),
            "times": jax.ShapeDtypeStruct((batch_size, steps), jnp.int32),
        }

    def __call__(
        self,
        states: Float[Array, "batch steps state_dim"],
        actions: Float[Array, "batch steps action_dim"],
        returns: Float[Array, "batch steps 1"],
        times: Int[Array, "batch steps"],
        mask: Array | None = None,
        train: bool = False,
    ) -> Float[Array, "batch steps action_dim"]:
        """The action in each state; the action given at a step does not reach it.

        Args:
          states: of the steps.
          actions: what was done in them; anything in the last one.
          returns: what is still to come, scaled as in training.
          times: of the steps in their episode.
          mask: 1 for steps, 0 for padding at the left; None: no padding.
          train: whether to drop out.
        """
        return self.features(states, actions, returns, times, mask, train)["prediction"]

    @nn.compact
    def features(
        self,
        states: Float[Array, "batch steps state_dim"],
        actions: Float[Array, "batch steps action_dim"],
        returns: Float[Array, "batch steps 1"],
        times: Int[Array, "batch steps"],
        mask: Array | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above)."""
        shapes = (states.shape[2:], actions.shape[2:], returns.shape[2:])
        if shapes != ((self.state_dim,), (self.action_dim,), (1,)):
            raise ValueError(
                f"This DecisionTransformer takes states of {self.state_dim}, actions of "
                f"{self.action_dim} and returns of 1 number a step, not {shapes}."
            )
        batch, steps = times.shape
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        start = nn.initializers.normal(1.0)  # as PyTorch's Embedding
        time = nn.Embed(
            self.max_steps, self.embed_dim, embedding_init=start, name="embed_time", **types
        )(times)
        embedded = [
            torch_linear(self, self.embed_dim, t.shape[-1], f"embed_{name}")(t) + time
            for name, t in (("return", returns), ("state", states), ("action", actions))
        ]
        x = jnp.stack(embedded, axis=2).reshape(batch, 3 * steps, self.embed_dim)
        norm = partial(LayerNorm, epsilon=1e-5, **types)
        x = constrain(norm(name="norm_embed")(x), "batch", "length", "channels")
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        out = {"embed": x}
        seen = None if mask is None else jnp.repeat(mask.astype(jnp.float32), 3, axis=1)
        for i in range(self.depth):
            block = PaddedBlock(
                self.num_heads,
                self.mlp_dim or 4 * self.embed_dim,
                ACTIVATIONS[self.activation],
                self.dropout,
                name=f"layers_{i}",
                **types,
            )
            out[f"layer{i}"] = x = block(x, seen, train)
        out["last_hidden_state"] = x = norm(name="norm")(x)
        of_step = x.reshape(batch, steps, 3, self.embed_dim)
        state, action = of_step[:, :, 1], of_step[:, :, 2]
        head = lambda name, width, t: torch_linear(  # noqa: E731
            self, width, self.embed_dim, f"predict_{name}"
        )(t)
        out["state_prediction"] = head("state", self.state_dim, action)
        out["return_prediction"] = head("return", 1, action)
        chosen = head("action", self.action_dim, state)
        return out | {"prediction": jnp.tanh(chosen) if self.action_tanh else chosen}


class StateEncoder(nn.Module):
    """Four grey frames of 84 x 84 to one token."""

    width: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, frames: Float[Array, "images height width channels"]
    ) -> Float[Array, "images channels"]:
        x = frames.astype(self.dtype)
        for i, (channels, size, stride) in enumerate(((32, 8, 4), (64, 4, 2), (64, 3, 1))):
            x = nn.relu(
                nn.Conv(
                    channels,
                    (size, size),
                    stride,
                    padding="VALID",
                    dtype=self.dtype,
                    param_dtype=self.param_dtype,
                    name=f"conv{i}",
                )(x)
            )
        x = x.reshape(x.shape[0], -1)
        return jnp.tanh(torch_linear(self, self.width, x.shape[-1], "dense")(x))


class AtariDecisionTransformer(Model):
    """Discrete control from frames: logits of the actions at each step.

    Attributes:
      num_actions: that can be chosen.
      embed_dim: channels.
      depth: blocks.
      num_heads: must divide the channels.
      max_steps: last time in an episode.
      context: steps; there are three tokens and places a step.
      conditioned: on returns; without, this is behaviour cloning ("naive").
      dropout: rate on embeddings, attention weights and both branches.
    """

    num_actions: int = 4
    embed_dim: int = 128
    depth: int = 6
    num_heads: int = 8
    max_steps: int = 2000
    context: int = 30
    conditioned: bool = True
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(
        self, batch_size: int = 1, steps: int = 3
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` for so many steps."""
        inputs = {
            "states": jax.ShapeDtypeStruct((batch_size, steps, 84, 84, 4), jnp.float32),
            "times": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
            "actions": jax.ShapeDtypeStruct((batch_size, steps), jnp.int32),
        }
        if self.conditioned:
            inputs["returns"] = jax.ShapeDtypeStruct((batch_size, steps, 1), jnp.float32)
        return inputs

    def __call__(
        self,
        states: Float[Array, "batch steps 84 84 4"],
        times: Int[Array, "batch"],
        actions: Int[Array, "batch ..."] | None = None,
        returns: Float[Array, "batch steps 1"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch steps actions"]:
        """Logits of the action in each state.

        Args:
          states: frames from 0 to 1.
          times: of the first step.
          actions: of all steps, or of all but the last; None at a first step.
          returns: what is still to come; None if the model is not conditioned.
          train: whether to drop out.
        """
        return self.features(states, times, actions, returns, train)["logits"]

    @nn.compact
    def features(
        self,
        states: Float[Array, "batch steps 84 84 4"],
        times: Int[Array, "batch"],
        actions: Int[Array, "batch ..."] | None = None,
        returns: Float[Array, "batch steps 1"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """`embed`, `layer0 ...`, `last_hidden_state` and `logits`."""
        batch, steps = states.shape[:2]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.conditioned != (returns is not None):
            raise ValueError(
                f"conditioned={self.conditioned} wants {'' if self.conditioned else 'no '}returns."
            )
        if actions is not None and actions.shape not in ((batch, steps), (batch, steps - 1)):
            raise ValueError(
                f"actions have shape {actions.shape}; give one for each of {steps} steps, or for "
                "all but the last."
            )
        embed = partial(nn.Embed, embedding_init=init, **types)
        encoder = StateEncoder(self.embed_dim, name="state_encoder", **types)
        parts = [encoder(states.reshape(-1, *states.shape[2:])).reshape(batch, steps, -1)]
        embed_return = torch_linear(self, self.embed_dim, 1, "embed_return")
        if returns is not None:
            parts.insert(0, jnp.tanh(embed_return(returns)))
        elif self.is_initializing():
            embed_return(jnp.zeros((1, 1)))  # files have it nevertheless
        if actions is not None:
            token = jnp.tanh(embed(self.num_actions, self.embed_dim, name="embed_action")(actions))
            parts.append(jnp.pad(token, ((0, 0), (0, steps - token.shape[1]), (0, 0))))
        x = jnp.stack(parts, axis=2).reshape(batch, -1, self.embed_dim)
        if actions is not None and actions.shape[1] < steps:
            x = x[:, :-1]
        zeros, size = nn.initializers.zeros, self.embed_dim
        places = 3 * self.context + 1
        if x.shape[1] > places:
            raise ValueError(f"There are {places} places, too few for {x.shape[1]} tokens.")
        place = self.param("position_embedding", zeros, (places, size), self.param_dtype)
        time = self.param(
            "time_position_embedding", zeros, (self.max_steps + 1, size), self.param_dtype
        )
        self.param("idle_token_embedding", init, (self.num_actions, size), self.param_dtype)
        x = x + (time[times][:, None] + place[: x.shape[1]]).astype(self.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        out = {"embed": constrain(x, "batch", "length", "channels")}
        block = partial(GPT2Block, self.num_heads, self.dropout, activation=gelu, **types)
        every, _ = run_blocks([block] * self.depth, x, None, train)
        out |= {f"layer{i}": x for i, x in enumerate(every)}
        x = LayerNorm(epsilon=1e-5, name="norm", **types)(every[-1] if every else x)
        out["last_hidden_state"] = x
        # states stand behind returns, if there are any, in each step
        at = x[:, int(self.conditioned) :: len(parts)]
        head = Dense(self.num_actions, use_bias=False, kernel_init=init, name="head", **types)
        return out | {"logits": head(at)}


# ---------------------------------------------------------------------------- checkpoints


def _with_first_position(xs: list[np.ndarray]) -> list[np.ndarray]:
    """Transformers adds row 0 of a table of positions to every token behind the norm."""
    return [xs[0] + xs[1][0]]


def _without_positions(xs: list[np.ndarray]) -> list[np.ndarray]:
    return [xs[0], np.zeros((1024, len(xs[0])), xs[0].dtype)]


def _gym(trunk: str = "transformer") -> Rules:
    """The official names; in transformers' the trunk is called `encoder`."""
    theirs, ours = f"{trunk}.h.{{i}}", "layers_{i}"
    positions = Rule(
        ("embed_ln.bias", "encoder.wpe.weight"),
        "norm_embed/bias",
        Transform(_with_first_position, _without_positions),
    )
    return Rules(
        [
            Rule("embed_timestep.weight", "embed_time/embedding"),
            *(
                rule
                for name in ("return", "state", "action")
                for rule in dense_rules(f"embed_{name}", f"embed_{name}")
            ),
            *([positions] if trunk == "encoder" else []),
            *norm_rules("embed_ln", "norm_embed"),
            *norm_rules(f"{theirs}.ln_1", f"{ours}/norm1"),
            *conv1d_rules(f"{theirs}.attn.c_attn", f"{ours}/attention/qkv"),
            *conv1d_rules(f"{theirs}.attn.c_proj", f"{ours}/attention/out"),
            *norm_rules(f"{theirs}.ln_2", f"{ours}/norm2"),
            *conv1d_rules(f"{theirs}.mlp.c_fc", f"{ours}/mlp/up"),
            *conv1d_rules(f"{theirs}.mlp.c_proj", f"{ours}/mlp/down"),
            *norm_rules(f"{trunk}.ln_f", "norm"),
            *dense_rules("predict_state", "predict_state"),
            *dense_rules("predict_return", "predict_return"),
            *dense_rules("predict_action.0", "predict_action"),
        ],
        unused=(
            f"{trunk}.wte.weight",
            f"{trunk}.h.*.attn.bias",
            f"{trunk}.h.*.attn.masked_bias",
        ),
    )


def _atari() -> Rules:
    theirs, ours = "blocks.{i}", "layers_{i}"
    maps = ("query", "key", "value")
    flat = chain(
        reshape((-1, 64, 7, 7), (-1, 64 * 7 * 7)),
        transpose(2, 3, 1, 0),
        reshape((64 * 7 * 7, -1), (7, 7, 64, -1)),
    )
    convolutions = [
        rule
        for number, name in ((0, "conv0"), (2, "conv1"), (4, "conv2"))
        for rule in (
            Rule(f"state_encoder.{number}.weight", f"state_encoder/{name}/kernel", conv),
            Rule(f"state_encoder.{number}.bias", f"state_encoder/{name}/bias"),
        )
    ]
    return Rules(
        [
            Rule("pos_emb", "position_embedding", squeeze(0)),
            Rule("global_pos_emb", "time_position_embedding", squeeze(0)),
            Rule("tok_emb.weight", "idle_token_embedding"),
            Rule("action_embeddings.0.weight", "embed_action/embedding"),
            *dense_rules("ret_emb.0", "embed_return"),
            *convolutions,
            Rule("state_encoder.7.weight", "state_encoder/dense/kernel", flat),
            Rule("state_encoder.7.bias", "state_encoder/dense/bias"),
            *norm_rules(f"{theirs}.ln1", f"{ours}/norm1"),
            Rule(
                tuple(f"{theirs}.attn.{name}.weight" for name in maps),
                f"{ours}/attention/qkv/kernel",
                chain(linear, concat(-1)),
            ),
            Rule(
                tuple(f"{theirs}.attn.{name}.bias" for name in maps),
                f"{ours}/attention/qkv/bias",
                concat(-1),
            ),
            *dense_rules(f"{theirs}.attn.proj", f"{ours}/attention/out"),
            *norm_rules(f"{theirs}.ln2", f"{ours}/norm2"),
            *dense_rules(f"{theirs}.mlp.0", f"{ours}/mlp/up"),
            *dense_rules(f"{theirs}.mlp.2", f"{ours}/mlp/down"),
            *norm_rules("ln_f", "norm"),
            Rule("head.weight", "head/kernel", linear),
        ],
        unused=("blocks.*.attn.mask",),
    )


LAYOUTS = {"gym": _gym(), "huggingface": _gym("encoder"), "atari": _atari()}

_COMMON = dict(
    module=DecisionTransformer,
    task="control",
    paper="Decision Transformer, arXiv 2106.01345",
    code="github.com/kzl/decision-transformer",
    licence="MIT",
)
_ATARI = _COMMON | dict(module=AtariDecisionTransformer)

VARIANTS: dict[str, Variant] = {
    "decision_transformer_hopper": Variant(fields={}, params=727_567, **_COMMON),
    "decision_transformer_halfcheetah": Variant(
        fields=dict(state_dim=17, action_dim=6), params=729_880, **_COMMON
    ),
    "decision_transformer_breakout": Variant(fields={}, params=1_938_976, **_ATARI),
    "decision_transformer_test": Variant(
        fields=dict(state_dim=4, action_dim=2, embed_dim=32, depth=2, num_heads=2, max_steps=30,
                    dropout=0.0),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(
    variants=VARIANTS,
    layouts=LAYOUTS,
    frozen=(r"predict_(state|return)/.*", r"idle_token_embedding"),
)
