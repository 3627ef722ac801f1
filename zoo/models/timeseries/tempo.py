"""TEMPO: a GPT-2 reads trend, season and noise of a series, each behind a prompt, and forecasts.

Cao et al., "TEMPO: Prompt-based Generative Pre-trained Transformer for Time Series Forecasting",
ICLR 2024, arXiv 2310.04948. Official code and weights: github.com/DC-research/TEMPO (MIT), which we
follow. Each variate is read alone, by the same weights; with x its last L steps:

    x       = (x - mean x) / sqrt(var x + 1e-5) * w + b
    trend   = W_t average_25(x) + b_t                 season = MLP(x - trend), width 4L, ReLU
    noise   = x - trend - season                      the three add up to x
    tokens  = prompt, then patches of 16 steps every 8, by a linear map; for each of the three
    h       = GPT-2(trend's tokens, season's, noise's)          causal: trend never sees season
    y       = sum over the three of W flatten(patches' h) + c, standardised backwards

A prompt is the embedding of "Predict the future time step given the {trend|season|residual}", by a
linear map; or, with `pool`, the values of those 3 of 30 keys that are nearest to a summary of the
patches by cosine. GPT-2's map to query, key and value has LoRA beside it. It starts from a
published GPT-2 like this, all that GPT-2 does not have at its initialisation:

    model, variables = zoo.load("tempo_80m_v1", "gpt2/model.safetensors", adapt=True)
    mask = trained(variables["params"])               what the authors train then

Paper and code differ, and we follow the code: the paper decomposes by STL, the code learns to, and
STL gives only targets, whose error they add to the squared one times 0.001 or 0.01: here that is
`zoo.tasks.DecomposedForecasting` on `zoo.data.series.DecomposedWindows`. (Their newest script adds
it for some of its models only, not for the one it calls TEMPO.) The summary of the patches
`[P, channels]` reads them as `[channels, P]` without transposing, and no gradient reaches keys and
summary. The files hold maps that the model never uses (`unused`). Left out: its negative binomial
forecasts, whose heads the code applies to GPT-2's tokens, which fit no forecast.

    features    tempo_80m_v1
    trend       336   1
    season      336   1
    noise       336   1
    tokens      153  768    3 times 9 of a prompt and 42 patches
    layer0      153  768    up to layer5
    norm        153  768
    forecast     96   1
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.checkpoints.rules import Rule, Rules, dense_rules, linear, stack
from zoo.layers.dense import Dense
from zoo.layers.mlp import Mlp
from zoo.layers.model import Model
from zoo.layers.norm import LayerNorm
from zoo.layers.partition import constrain
from zoo.layers.patch import torch_default_init
from zoo.layers.series import bias_init, check_series, moving_average, standardise
from zoo.models.language.gpt2 import GPT2Block, init, residual_init, trunk_rules
from zoo.models.timeseries.patchtst import patch_count, patches
from zoo.system import File, System, Variant

if TYPE_CHECKING:
    from zoo.methods.lora import LoRA

PARTS = ("trend", "season", "noise")
_PREDICT = (47, 17407, 262, 2003, 640, 2239, 1813, 262)
PROMPTS = ((*_PREDICT, 5182), (*_PREDICT, 1622), (*_PREDICT, 29598))
"""Token numbers of the three prompts: "Predict the future time step given the trend", ..."""

FROZEN_IN_PAPER = (
    r"embed/.*|position_embedding|norm/.*",
    r"layers_\d+/(?!attention/qkv/(lora_[ab]|bias)$).*",
)
"""For `TrainConfig.freeze`: the authors train nothing of GPT-2 but LoRA and the biases beside it
(`bias="lora_only"` of peft), and all that is not GPT-2's."""

POOL_SIZE, TOP_K, VALUE_TOKENS = 30, 3, 3


def unit_length(x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
    """`x / sqrt(max(sum x^2, 1e-12))`, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))


class PromptPool(nn.Module):
    """The values of the keys that are nearest to a summary of the patches."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "batch patches channels"]
    ) -> tuple[Float[Array, "batch prompt channels"], Int[Array, "batch top_k"]]:
        """The prompt, and which keys it is of, the nearest first."""
        batch, count, channels = tokens.shape
        normal = nn.initializers.normal(1.0)
        key = self.param("key", normal, (POOL_SIZE, channels), self.param_dtype)
        shape = (POOL_SIZE, VALUE_TOKENS, channels)
        value = self.param("value", normal, shape, self.param_dtype)
        start = {"kernel_init": torch_default_init, "bias_init": bias_init(count)}
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # the official `view`, which mixes patches and channels
        mixed = tokens.reshape(batch, channels, count)
        summary = Dense(1, name="summary", **start, **types)(mixed)[..., 0]
        _, chosen = jax.lax.top_k(unit_length(summary) @ unit_length(key).T, TOP_K)
        return value.astype(self.dtype)[chosen].reshape(batch, -1, channels), chosen


class Unused(nn.Module):
    """Parameters that the official files hold and the official model never reads."""

    context_length: int
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self) -> None:
        """Declare them."""
        length = self.context_length
        normal, ones, zeros = (
            nn.initializers.normal(1.0),
            nn.initializers.ones,
            nn.initializers.zeros,
        )
        for name, start, shape in (
            ("noise_kernel", torch_default_init, (length, length)),
            ("noise_bias", bias_init(length), (length,)),
            ("fourier_cos", normal, (2, 1)),
            ("fourier_sin", normal, (2, 1)),
            ("season_scale", ones, (1,)),
            ("season_shift", zeros, (1,)),
            ("noise_scale", ones, (1,)),
            ("noise_shift", zeros, (1,)),
        ):
            self.param(name, start, shape, self.param_dtype)


class TEMPO(Model):
    """TEMPO forecaster.

    Attributes:
      context_length: steps of the past that it sees, L.
      horizon: steps that it forecasts.
      variates: of `example_inputs`; it takes any number, each read alone.
      patch_length: steps of a patch.
      stride: steps from one patch to the next.
      embed_dim: width of GPT-2.
      depth: its blocks.
      vocab_size: its tokens.
      max_positions: its positions.
      prompts: token numbers before trend, season and noise; none: there is no prompt, and each
        part goes through GPT-2 by itself before all go through it together, as in the code.
      pool: prompts from the pool instead.
      read_prompts: the heads read the prompts' tokens, too.
      student: the forecast is a Student's t distribution, its mean, scale and degrees of freedom
        read off the sum of the heads.
      moving_average: steps of the average under the trend; odd.
      lora_rank: of the matrices beside GPT-2's `qkv`; 0: none (`zoo.methods.lora.merged` makes such
        variables).
      lora_alpha: what they count, times the rank.
      dropout: GPT-2's rates, and the one in front of LoRA.
    """

    context_length: int = 336
    horizon: int = 96
    variates: int = 1
    patch_length: int = 16
    stride: int = 8
    embed_dim: int = 768
    depth: int = 6
    num_heads: int = 12
    vocab_size: int = 50257
    max_positions: int = 1024
    prompts: tuple[tuple[int, ...], ...] = PROMPTS
    pool: bool = False
    read_prompts: bool = False
    student: bool = False
    moving_average: int = 25
    lora_rank: int = 16
    lora_alpha: float = 16.0
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def lora(self) -> "LoRA":
        """The method beside GPT-2's `qkv`."""
        from zoo.methods.lora import LoRA  # methods import all tasks: not for `zoo list`

        return LoRA(self.lora_rank, self.lora_alpha, r"(.*/)?attention/qkv", self.dropout)

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, self.context_length, self.variates)
        return {"series": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def __call__(
        self, series: Float[Array, "batch context variates"], train: bool = False
    ) -> Float[Array, "batch horizon variates"]:
        """The forecast."""
        return self.features(series, train)["forecast"]

    @nn.compact
    def features(
        self, series: Float[Array, "batch context variates"], train: bool = False
    ) -> dict[str, Array]:
        """Every named intermediate (see the table above); tokens of all variates as one batch.

        With a pool also `prompts`: which keys are chosen, `[batch, variates, 3, 3]`. For a
        Student's t distribution also `scale` and `freedom`, of the shape of the forecast, its mean.
        """
        self._check(series)
        Unused(self.context_length, self.param_dtype, name="unused")()
        batch, _, variates = series.shape
        x, mean, deviation = standardise(series)
        scale, shift = (
            self.param(name, start, (1,), self.param_dtype)
            for name, start in (
                ("series_scale", nn.initializers.ones),
                ("series_shift", nn.initializers.zeros),
            )
        )
        x = x * scale + shift
        x = constrain(x.swapaxes(1, 2).reshape(batch * variates, -1), "batch", "time")
        parts = self._decompose(x)
        out = {
            name: part.reshape(batch, variates, -1).swapaxes(1, 2) for name, part in parts.items()
        }
        gpt2 = self._gpt2(train)
        x, chosen = self._tokens(parts, gpt2)
        if chosen:
            out["prompts"] = jnp.stack(chosen, 1).reshape(batch, variates, len(PARTS), TOP_K)
        out["tokens"] = x
        out |= gpt2(x)
        y = self._read(out["norm"]).reshape(batch, variates, -1).swapaxes(1, 2)
        y = (y.astype(jnp.float32) - shift) / (scale + 1e-10) * deviation + mean
        return out | (self._student(y) if self.student else {"forecast": y.astype(self.dtype)})

    def _student(self, y: Float[Array, "batch horizon variates"]) -> dict[str, Array]:
        """Mean, scale and degrees of freedom, each a map of the whole horizon."""
        y = y.swapaxes(1, 2)
        mu, sigma, nu = (
            self._dense(self.horizon, self.horizon, name)(y).swapaxes(1, 2)
            for name in ("mu", "sigma", "nu")
        )
        scale, freedom = nn.softplus(sigma) + 1e-6, nn.softplus(nu) + 2
        return {"forecast": mu, "scale": scale, "freedom": freedom}

    def _dense(self, width: int, fan_in: int, name: str) -> nn.Module:
        start = {"kernel_init": torch_default_init, "bias_init": bias_init(fan_in)}
        return Dense(width, name=name, dtype=self.dtype, param_dtype=self.param_dtype, **start)

    def _decompose(self, x: Float[Array, "batch time"]) -> dict[str, Float[Array, "batch time"]]:
        """Trend, season and noise."""
        length = self.context_length
        smooth = moving_average(x[..., None], self.moving_average)[..., 0]
        trend = self._dense(length, length, "trend")(smooth)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mlp = Mlp(4 * length, nn.relu, kernel_init=torch_default_init, name="season_mlp", **types)
        season = mlp(x - trend)
        return dict(zip(PARTS, (trend, season, x - trend - season), strict=True))

    def _tokens(
        self, parts: Mapping[str, Float[Array, "batch time"]], gpt2: Callable
    ) -> tuple[Float[Array, "batch length channels"], list[Int[Array, "batch top_k"]]]:
        """Prompt and patches of all parts, and the keys that a pool has chosen for each.

        Without prompts, what `gpt2` makes of the patches of each part.
        """
        width, types = self.embed_dim, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = nn.Embed(self.vocab_size, width, embedding_init=init, name="embed", **types)
        pool = PromptPool(name="pool", **types) if self.pool else None
        pieces, chosen = [], []
        for (name, part), words in zip(parts.items(), self.prompts or (None,) * 3, strict=True):
            x = patches(part[:, None], self.patch_length, self.stride)[:, 0]
            x = self._dense(width, self.patch_length, f"embed_{name}")(x)
            if words is None:
                embed(jnp.zeros(1, jnp.int32))  # in the files, and never read
                pieces.append(gpt2(x)["norm"])
                continue
            prompt = self._dense(width, width, f"prompt_{name}")(embed(jnp.array(words)))
            prompt = jnp.broadcast_to(prompt, (x.shape[0], *prompt.shape))
            if pool is not None:
                prompt, keys = pool(x)
                chosen.append(keys)
            pieces += [prompt, x]
        return constrain(jnp.concatenate(pieces, 1), "batch", "length", "channels"), chosen

    def _gpt2(self, train: bool) -> Callable[[Array], dict[str, Array]]:
        """What each block makes of tokens, and the last LayerNorm."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shape = (self.max_positions, self.embed_dim)
        table = self.param("position_embedding", init, shape, self.param_dtype)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        start = residual_init(12)  # the code builds all 12 blocks and keeps the first
        blocks = [
            GPT2Block(self.num_heads, self.dropout, start, name=f"layers_{i}", **types)
            for i in range(self.depth)
        ]
        norm = LayerNorm(epsilon=1e-5, name="norm", **types)

        def run(x: Float[Array, "batch length channels"]) -> dict[str, Array]:
            x, out = drop(x + table[: x.shape[1]].astype(self.dtype)), {}
            with self.lora().applied() if self.lora_rank else contextlib.nullcontext():
                for i, block in enumerate(blocks):
                    x, _ = block(x, None, train)
                    out[f"layer{i}"] = x
            return out | {"norm": norm(x)}

        return run

    def _read(self, x: Float[Array, "batch length channels"]) -> Float[Array, "batch horizon"]:
        """The sum of what is read off the patches of each part, and perhaps its prompt."""
        each = x.shape[1] // len(PARTS)
        count = patch_count(self.context_length, self.patch_length, self.stride)
        count = each if self.read_prompts else count
        y = 0.0
        for i, name in enumerate(PARTS):
            part = x[:, (i + 1) * each - count : (i + 1) * each].reshape(x.shape[0], -1)
            y = y + self._dense(self.horizon, part.shape[1], f"head_{name}")(part)
        return y

    def _check(self, series: Array) -> None:
        check_series(self, series, self.context_length)
        if self.pool and not self.prompts:
            raise ValueError("pool=True takes the place of prompts; give prompts, or pool=False.")
        sizes = {len(words) for words in self.prompts} or {0}
        if len(self.prompts) not in (0, len(PARTS)) or len(sizes) != 1:
            raise ValueError(
                f"prompts are the token numbers before {', '.join(PARTS)}: three of one length "
                f"or none at all, not {self.prompts}."
            )
        count = patch_count(self.context_length, self.patch_length, self.stride)
        prompt = TOP_K * VALUE_TOKENS if self.pool else sizes.pop()
        length = len(PARTS) * (prompt + count)
        if length > self.max_positions:
            raise ValueError(
                f"Three times {prompt} tokens of a prompt and {count} patches are {length}, more "
                f"than the {self.max_positions} positions of this GPT-2; choose a longer stride or "
                "a shorter context_length."
            )


# ---------------------------------------------------------------------------- checkpoints


def _official(base: str) -> Rules:
    """Rules of the authors' files; `base` is where peft keeps the map that LoRA is beside."""
    gpt2 = "gpt2_trend.base_model.model."
    qkv = f"{gpt2}h.{{i}}.attn.c_attn"
    rules = trunk_rules(gpt2, f"c_attn{base}")
    for name in "AB":
        target = f"layers_{{i}}/attention/qkv/lora_{name.lower()}"
        rules.append(Rule(f"{qkv}.lora_{name}.default.weight", target, linear))
    for theirs, ours in {
        "map_trend": "trend",
        "map_season.0": "season_mlp/up",
        "map_season.2": "season_mlp/down",
        "summary_map": "pool/summary",
        **{name: name for name in ("mu", "sigma", "nu")},
        **{f"in_layer_{name}": f"embed_{name}" for name in PARTS},
        **{f"prompt_layer_{name}": f"prompt_{name}" for name in PARTS},
        **{f"out_layer_{name}": f"head_{name}" for name in PARTS},
    }.items():
        rules += dense_rules(theirs, ours)
    for name in ("key", "value"):
        each = tuple(f"prompt_{name}_dict.prompt_{name}_{k}" for k in range(POOL_SIZE))
        rules.append(Rule(each, f"pool/{name}", stack()))
    for name in PARTS:
        ours = "series" if name == "trend" else f"unused/{name}"
        rules.append(Rule(f"rev_in_{name}.affine_weight", f"{ours}_scale"))
        rules.append(Rule(f"rev_in_{name}.affine_bias", f"{ours}_shift"))
    rules += [
        Rule("map_resid.weight", "unused/noise_kernel", linear),
        Rule("map_resid.bias", "unused/noise_bias"),
        Rule("mul_season.a", "unused/fourier_cos"),
        Rule("mul_season.b", "unused/fourier_sin"),
    ]
    masks = (f"{gpt2}h.{{i}}.attn.bias", f"{gpt2}h.{{i}}.attn.masked_bias")
    return Rules(rules, derived=dict.fromkeys(masks))


LAYOUTS = {
    "official": _official(".base_layer"),
    "official_peft_0.5": _official(""),
    # A published GPT-2, whose first blocks are taken; the rest starts afresh (`adapt=True`).
    "gpt2": Rules(
        [*trunk_rules("transformer."), *trunk_rules("")],
        unused=("transformer.h.*", "h.*", "lm_head.weight"),
        fresh=(
            "layers_{i}/attention/qkv/lora_a",
            "layers_{i}/attention/qkv/lora_b",
            *(f"{name}*" for name in ("trend/", "season_mlp/", "pool/", "unused/", "series_")),
            *(f"{place}_{name}/*" for place in ("embed", "prompt", "head") for name in PARTS),
        ),
    ),
}

PARTITION = {r".*attention/qkv/lora_b": ("rank", "heads")}

_COMMON = dict(
    module=TEMPO,
    task="forecasting",
    paper="TEMPO: Prompt-based Generative Pre-trained Transformer for Time Series Forecasting, "
    "arXiv 2310.04948",
    code="github.com/DC-research/TEMPO",
    licence="MIT",
)

VARIANTS: dict[str, Variant] = {
    "tempo_80m_v1": Variant(
        fields={}, params=94_439_770, files=(File("TEMPO-80M_v1.pth"),), **_COMMON
    ),
    "tempo_test": Variant(
        fields=dict(context_length=32, horizon=12, variates=2, patch_length=8, stride=4,
                    embed_dim=32, depth=2, num_heads=4, vocab_size=97, max_positions=64,
                    prompts=((1, 2, 3), (1, 2, 4), (1, 2, 5)), moving_average=9, lora_rank=4,
                    lora_alpha=4.0),
        **_COMMON,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS, partition=PARTITION, frozen=(r"unused/.*",))
