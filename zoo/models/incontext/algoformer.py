"""AlgoFormer: a transformer with the structure of an algorithm, and the looped transformer.

Gao et al., "AlgoFormer: An Efficient Transformer Framework with Algorithmic Structures", arXiv
2402.13572 (TMLR 2025). Its code could not be found, so `AlgoFormer` is our reading of the paper's
equations; its blocks, ends and loop are those of the looped transformer, which the paper compares
with: Yang et al., "Looped Transformers are Better at Learning Learning Algorithms", arXiv
2311.12424, code github.com/Leiay/looped_transformer (MIT), which `LoopedTransformer` follows.

    z = W_in (x_1, (y_1, 0...), x_2, ...)                 as in `icl_sequential`
    f = GPT-2's blocks and its last LayerNorm             the LayerNorm is part of every loop

    looped       o_0 = 0,  o_t = f(o_t-1 + z + P)         or o_0 = 1, o_t = f(o_t-1 * z + P)
                 prediction_t = W_out o_t
    tied         o_0 = z,  o_t = f(o_t-1 + P)             one loop is the standard decoder
    AlgoFormer   x = pre(z + P),  o_0 = 0,  o_t = loop(o_t-1 + x),  prediction_t = W_out post(o_t)

One set of weights serves all loops. The last `window` loops give predictions, and the loss is the
mean over them; the loops before run without gradients. Whether the authors of AlgoFormer inject
the input in every loop, and add positions there, is not known: both are options. Their tables of
positions exist in each part of ours and are counted, used or not.

    features            algoformer_111
    tokens              40 20           of 20 points
    embed               40 256
    preprocessed        40 256          behind `pre`
    loops               15 40 256       the last `window` of them
    prediction          15 20           by loop and point
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.checkpoints.rules import Rule, Rules, dense_rules, norm_rules
from zoo.models.incontext.prompt import (
    InContextLearner,
    Read,
    Trunk,
    check_prompt,
    interleave,
    read_rules,
)
from zoo.system import System, Variant

INJECT: dict[str, tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]] = {
    "add": (jnp.zeros_like, lambda state, x: state + x),
    "multiply": (jnp.ones_like, lambda state, x: state * x),
    "none": (lambda x: x, lambda state, x: state),
}
"""How a loop takes its input: what the first state is, made from the input, and what goes in."""


def run_loops(
    step: nn.Module, x: Float[Array, "batch tokens channels"], inject: str, loops: int, window: int
) -> Float[Array, "batch window tokens channels"]:
    """The last `window` states of `loops` calls of one module; the calls before have no gradient.

    Args:
      step: called on one array, in the compact method of its parent.
      x: the input of the loop.
      inject: a key of `INJECT`.
      loops: how many calls.
      window: how many states to return; more than `loops`: all.

    Raises:
      ValueError: for an unknown `inject`, or without a loop.
    """
    if inject not in INJECT:
        raise ValueError(f"inject={inject!r} is none of {', '.join(map(repr, INJECT))}.")
    if loops < 1 or window < 1:
        raise ValueError(f"loops={loops} and window={window} must both be at least 1.")
    start, combine = INJECT[inject]

    def body(step: nn.Module, state: Array, x: Array) -> tuple[Array, Array]:
        state = step(combine(state, x))[-1]
        return state, state

    def scan(length: int, state: Array, x: Array) -> tuple[Array, Array]:
        repeat = nn.scan(
            body,
            variable_broadcast="params",
            split_rngs={"params": False, "dropout": True},
            in_axes=nn.broadcast,
            length=length,
        )
        return repeat(step, state, x)

    state, silent = start(x), loops - min(window, loops)
    if silent:
        state = jax.lax.stop_gradient(scan(silent, state, x)[0])
    return jnp.moveaxis(scan(loops - silent, state, x)[1], 0, 1)


class LoopedTransformer(InContextLearner):
    """Predicts each label of a prompt by calling one stack of blocks again and again.

    The standard decoder is `inject="none", loops=1`; the one with tied layers has more loops.
    A call gives a prediction of each label by each of the last loops:
    `[batch, window, points, ...]`.

    Attributes:
      dims: size of an x.
      max_points: longest prompt.
      embed_dim: channels.
      depth: blocks in a loop.
      num_heads: must divide the channels.
      loops: calls of the blocks, at training and test; may be changed between.
      window: predictions of so many last loops; earlier ones have no gradient.
      inject: how a loop sees the prompt; see `INJECT`.
      positions: whether positions are added.
      add_inputs: add what goes into a loop again before each of its blocks.
      outputs: numbers read out at each point: 1, or the classes of a classification.
    """

    dims: int = 20
    max_points: int = 101
    embed_dim: int = 256
    depth: int = 1
    num_heads: int = 8
    loops: int = 30
    window: int = 15
    inject: str = "add"
    positions: bool = True
    add_inputs: bool = False
    outputs: int = 1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def features(
        self,
        xs: Float[Array, "batch points dims"],
        ys: Float[Array, "batch points"],
        train: bool = False,
    ) -> dict[str, Array]:
        """`tokens`, `embed`, `loops` and `prediction`.

        Raises:
          ValueError: if they are no prompt, or a longer one than there are positions for.
        """
        check_prompt(self, xs, ys, self.max_points)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        tokens = interleave(xs, ys)
        embed = Read(self.embed_dim, name="read_in", **types)(tokens)
        step = Trunk(
            self.depth,
            self.num_heads,
            2 * self.max_points + 1,
            self.positions,
            self.add_inputs,
            name="backbone",
            **types,
        )
        states = run_loops(step, embed, self.inject, self.loops, self.window)
        y = Read(self.outputs, name="read_out", **types)(states[:, :, ::2])
        prediction = y[..., 0] if self.outputs == 1 else y
        return {"tokens": tokens, "embed": embed, "loops": states, "prediction": prediction}


class AlgoFormer(InContextLearner):
    """Preprocessing, a loop with one set of weights, postprocessing: three shallow transformers.

    A call gives a prediction of each label by each of the last loops:
    `[batch, window, points, ...]`.

    Attributes:
      dims: size of an x.
      max_points: longest prompt.
      embed_dim: channels.
      depths: blocks of the three parts; a part without blocks is its LayerNorm alone.
      num_heads: must divide the channels.
      loops: calls of the second part, at training and test; may be changed between.
      window: predictions of so many last loops; earlier ones have no gradient.
      inject: how a loop sees the preprocessed prompt; see `INJECT`.
      loop_positions: whether every loop adds positions again.
      post_positions: whether the third part does.
      outputs: numbers read out at each point.
    """

    dims: int = 20
    max_points: int = 101
    embed_dim: int = 256
    depths: tuple[int, int, int] = (1, 1, 1)
    num_heads: int = 8
    loops: int = 20
    window: int = 15
    inject: str = "add"
    loop_positions: bool = False
    post_positions: bool = False
    outputs: int = 1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def features(
        self,
        xs: Float[Array, "batch points dims"],
        ys: Float[Array, "batch points"],
        train: bool = False,
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above).

        Raises:
          ValueError: if they are no prompt, or a longer one than there are positions for.
        """
        check_prompt(self, xs, ys, self.max_points)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        tokens = interleave(xs, ys)
        embed = Read(self.embed_dim, name="read_in", **types)(tokens)
        pre, loop, post = (
            Trunk(depth, self.num_heads, 2 * self.max_points + 1, used, name=name, **types)
            for name, depth, used in zip(
                ("pre", "loop", "post"),
                self.depths,
                (True, self.loop_positions, self.post_positions),
                strict=True,
            )
        )
        x = pre(embed, train)[-1]
        states = run_loops(loop, x, self.inject, self.loops, self.window)
        folded = states.reshape(-1, *states.shape[2:])
        last = post(folded, train)[-1].reshape(states.shape)
        y = Read(self.outputs, name="read_out", **types)(last[:, :, ::2])
        return {
            "tokens": tokens,
            "embed": embed,
            "preprocessed": x,
            "loops": states,
            "prediction": y[..., 0] if self.outputs == 1 else y,
        }


# ---------------------------------------------------------------------------- checkpoints


def _trunk_rules(theirs: str, ours: str) -> list[Rule]:
    """Rules of one stack; its matrices are PyTorch's, `[out, in]`."""
    theirs = f"{theirs}.transformer"
    block, layer = f"{theirs}.h.{{i}}", f"{ours}/layers_{{i}}"
    return [
        Rule(f"{theirs}.wpe.weight", f"{ours}/position_embedding"),
        Rule(f"{theirs}.wpe.weight", f"{ours}/idle_position_embedding"),
        *norm_rules(f"{block}.ln_1", f"{layer}/norm1"),
        *dense_rules(f"{block}.attn.c_attn", f"{layer}/attention/qkv"),
        *dense_rules(f"{block}.attn.c_proj", f"{layer}/attention/out"),
        *norm_rules(f"{block}.ln_2", f"{layer}/norm2"),
        *dense_rules(f"{block}.mlp.c_fc", f"{layer}/mlp/up"),
        *dense_rules(f"{block}.mlp.c_proj", f"{layer}/mlp/down"),
        *norm_rules(f"{theirs}.ln_f", f"{ours}/norm"),
    ]


def _rules(prefix: str) -> Rules:
    """Rules of all models here; `prefix` begins every name (torch.compile writes one)."""
    parts = (("_backbone", "backbone"), ("pre", "pre"), ("loop", "loop"), ("post", "post"))
    rules = [*read_rules()]
    rules += [rule for theirs, ours in parts for rule in _trunk_rules(theirs, ours)]
    renamed = [Rule(f"{prefix}{rule.source}", rule.target, rule.transform) for rule in rules]
    # PyTorch before 2.0 keeps causal masks.
    derived = {f"{prefix}{part}.transformer.h.{{i}}.attn.bias": None for part, _ in parts}
    return Rules(renamed, derived=derived)


LAYOUTS = {
    "official": _rules(""),
    "compiled": _rules("_orig_mod."),
}

_ALGOFORMER = dict(
    module=AlgoFormer,
    task="in_context_regression",
    paper="AlgoFormer, arXiv 2402.13572",
    licence="none: no published weights",
)
_LOOPED = _ALGOFORMER | dict(
    module=LoopedTransformer,
    paper="Looped Transformers are Better at Learning Learning Algorithms, arXiv 2311.12424",
    code="github.com/Leiay/looped_transformer",
    licence="MIT",
)

VARIANTS: dict[str, Variant] = {
    "algoformer_111": Variant(fields={}, params=2_532_353, **_ALGOFORMER),
    "looped_linear": Variant(fields=dict(loops=30, window=15), params=847_873, **_LOOPED),
    "looped_sparse": Variant(fields=dict(loops=20, window=10), params=847_873, **_LOOPED),
    "looped_tree": Variant(fields=dict(loops=70, window=15), params=847_873, **_LOOPED),
    "looped_relu": Variant(fields=dict(loops=12, window=5), params=847_873, **_LOOPED),
    "looped_openml": Variant(fields=dict(loops=20, window=20, outputs=2), **_LOOPED),
    "looped_standard": Variant(
        fields=dict(depth=12, inject="none", loops=1, window=1), params=9_535_233, **_LOOPED
    ),
    "looped_tied": Variant(fields=dict(inject="none", loops=12, window=1), **_LOOPED),
    "algoformer_test": Variant(
        fields=dict(dims=3, max_points=9, embed_dim=32, num_heads=4, loops=3, window=2),
        **_ALGOFORMER,
    ),
}  # fmt: skip

SYSTEM = System(
    variants=VARIANTS,
    layouts=LAYOUTS,
    frozen=(r".*idle_position_embedding",),
)
