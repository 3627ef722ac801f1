"""Short PyTorch models of systems that timm, transformers and torchvision do not hold.

Peers for `benchmarks/models.py`, written from the equations in the docstrings of the zoo's files.
Parameters have the names of the official checkpoints, so that `zoo.convert` reads their state
dicts. They are made as one would make them fast in PyTorch: attention is
`scaled_dot_product_attention`, convolutions of width 1 are matrix products, linear attention and
the delta rule run in chunks. There is no dropout.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------ CSWin


class Stripes(nn.Module):
    """Attention inside stripes of a map, plus a depthwise convolution of the values."""

    def __init__(self, channels: int, heads: int, stripe: tuple[int, int]) -> None:
        """A stripe has so many rows and columns."""
        super().__init__()
        self.heads, self.stripe = heads, stripe
        self.get_v = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, qkv: Tensor) -> Tensor:
        """From `[3, batch, height, width, channels]` to a map."""
        _, batch, height, width, channels = qkv.shape
        rows, columns = self.stripe
        x = qkv.reshape(3, batch, height // rows, rows, width // columns, columns, channels)
        x = x.permute(0, 1, 2, 4, 3, 5, 6).reshape(3, -1, rows * columns, channels)
        heads = x.reshape(*x.shape[:3], self.heads, -1).transpose(2, 3)
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(x.shape[1:])
        value = x[2].reshape(-1, rows, columns, channels).permute(0, 3, 1, 2)
        y = y + self.get_v(value).permute(0, 2, 3, 1).reshape(y.shape)
        y = y.reshape(batch, height // rows, width // columns, rows, columns, channels)
        return y.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)


class Feed(nn.Module):
    """Two linear maps with a GELU between."""

    def __init__(self, channels: int, hidden: int) -> None:
        """Of so many channels."""
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class CSWinBlock(nn.Module):
    """Attention in a cross of stripes, then an MLP."""

    def __init__(self, channels: int, heads: int, stripes: Sequence[tuple[int, int]]) -> None:
        """One branch for each kind of stripes."""
        super().__init__()
        count = len(stripes)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.attns = nn.ModuleList(Stripes(channels // count, heads // count, s) for s in stripes)
        self.mlp = Feed(channels, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """A map of the same shape."""
        qkv = self.qkv(self.norm1(x)).reshape(*x.shape[:3], 3, -1).permute(3, 0, 1, 2, 4)
        parts = qkv.chunk(len(self.attns), dim=-1)
        branches = [attend(part) for attend, part in zip(self.attns, parts, strict=True)]
        x = x + self.proj(torch.cat(branches, dim=-1))
        return x + self.mlp(self.norm2(x))


class Merge(nn.Module):
    """A convolution of stride 2 and a LayerNorm."""

    def __init__(self, channels: int) -> None:
        """Doubles the channels."""
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Half the map."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class CSWin(nn.Module):
    """CSWin Transformer of images whose maps the stripes tile."""

    def __init__(
        self,
        image_size: int = 224,
        embed_dim: int = 64,
        depths: Sequence[int] = (1, 2, 21, 1),
        stripe_widths: Sequence[int] = (1, 2, 7, 7),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        num_classes: int = 1000,
    ) -> None:
        """Fields as those of the zoo's."""
        super().__init__()
        self.stage1_conv_embed = nn.Sequential(
            nn.Conv2d(3, embed_dim, 7, stride=4, padding=2), nn.Identity(), nn.LayerNorm(embed_dim)
        )
        side, channels, self.stages = image_size // 4, embed_dim, len(depths)
        for i, (depth, width, heads) in enumerate(
            zip(depths, stripe_widths, num_heads, strict=True), 1
        ):
            whole = i == self.stages or side == width
            stripes = [(side, side)] if whole else [(side, width), (width, side)]
            blocks = (CSWinBlock(channels, heads, stripes) for _ in range(depth))
            setattr(self, f"stage{i}", nn.Sequential(*blocks))
            if i < self.stages:
                setattr(self, f"merge{i}", Merge(channels))
                side, channels = side // 2, 2 * channels
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of `[batch, 3, height, width]`."""
        x = self.stage1_conv_embed[0](images).permute(0, 2, 3, 1)
        x = self.stage1_conv_embed[2](x)
        for i in range(1, self.stages + 1):
            x = getattr(self, f"stage{i}")(x)
            if i < self.stages:
                x = getattr(self, f"merge{i}")(x)
        return self.head(self.norm(x).mean((1, 2)))


# ------------------------------------------------------------------------------- time series


def sinusoids(length: int, channels: int) -> Tensor:
    """Fixed positions: sines at even channels, cosines at odd ones."""
    rates = torch.exp(torch.arange(0, channels, 2).float() * -(math.log(10000.0) / channels))
    angles = torch.arange(length).float()[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of `[batch, length, heads, head_dim]`."""
    parts = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*parts).transpose(1, 2)


class Projected(nn.Module):
    """The four projections of an attention; `mix` reads heads out as if they came before steps."""

    def __init__(self, channels: int, heads: int, mix: bool = False) -> None:
        """So many channels and heads."""
        super().__init__()
        self.heads, self.mix = heads, mix
        for name in ("query", "key", "value", "out"):
            setattr(self, f"{name}_projection", nn.Linear(channels, channels))

    def forward(self, x: Tensor, memory: Tensor, attend: Callable = softmax_attention) -> Tensor:
        """Queries are of `x`, keys and values of `memory`."""
        maps = (
            self.query_projection(x),
            self.key_projection(memory),
            self.value_projection(memory),
        )
        y = attend(*(m.reshape(*m.shape[:2], self.heads, -1) for m in maps))
        y = y.transpose(1, 2) if self.mix else y
        return self.out_projection(y.reshape(x.shape))


class Pointwise(nn.Module):
    """The MLP of Informer and its descendants: two convolutions of width 1."""

    def __init__(self, channels: int, hidden: int, bias: bool = True) -> None:
        """Adds `conv1` and `conv2`."""
        super().__init__()
        self.conv1 = nn.Conv1d(channels, hidden, 1, bias=bias)
        self.conv2 = nn.Conv1d(hidden, channels, 1, bias=bias)

    def feed(self, x: Tensor) -> Tensor:
        """The MLP of `[batch, length, channels]`."""
        x = F.gelu(F.linear(x, self.conv1.weight[..., 0], self.conv1.bias))
        return F.linear(x, self.conv2.weight[..., 0], self.conv2.bias)


class EncoderLayer(Pointwise):
    """Self-attention and MLP, LayerNorm after each."""

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        """So many channels, heads, and channels in the MLP's middle."""
        super().__init__(channels, hidden)
        self.attention = Projected(channels, heads)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)

    def forward(self, x: Tensor, attend: Callable = softmax_attention) -> Tensor:
        """The same shape."""
        x = self.norm1(x + self.attention(x, x, attend))
        return self.norm2(x + self.feed(x))


def group(**modules: nn.Module) -> nn.Module:
    """Modules under names."""
    parent = nn.Module()
    for name, module in modules.items():
        parent.add_module(name, module)
    return parent


def standardised(series: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each series by its own mean and deviation, and both."""
    mean = series.mean(1, keepdim=True).detach()
    deviation = torch.sqrt(series.var(1, keepdim=True, unbiased=False) + 1e-5)
    return (series - mean) / deviation, mean, deviation


class ITransformer(nn.Module):
    """iTransformer with time features."""

    def __init__(
        self, context_length: int, horizon: int, embed_dim: int, depth: int, num_heads: int,
        mlp_dim: int,
    ) -> None:  # fmt: skip
        """Fields as those of the zoo's."""
        super().__init__()
        self.enc_embedding = group(value_embedding=nn.Linear(context_length, embed_dim))
        layers = (EncoderLayer(embed_dim, num_heads, mlp_dim) for _ in range(depth))
        self.encoder = group(attn_layers=nn.ModuleList(layers), norm=nn.LayerNorm(embed_dim))
        self.projector = nn.Linear(embed_dim, horizon)

    def forward(self, series: Tensor, time_features: Tensor) -> Tensor:
        """The forecast."""
        x, mean, deviation = standardised(series)
        x = torch.cat([x, time_features], dim=-1).transpose(1, 2)
        x = self.enc_embedding.value_embedding(x)
        for layer in self.encoder.attn_layers:
            x = layer(x)
        y = self.projector(self.encoder.norm(x))[:, : series.shape[-1]].transpose(1, 2)
        return y * deviation + mean


class PatchTST(nn.Module):
    """PatchTST as Time-Series-Library has it."""

    def __init__(
        self, context_length: int, horizon: int, patch_length: int, stride: int, embed_dim: int,
        depth: int, num_heads: int, mlp_dim: int,
    ) -> None:  # fmt: skip
        """Fields as those of the zoo's."""
        super().__init__()
        self.patch_length, self.stride = patch_length, stride
        count = (context_length - patch_length) // stride + 2
        self.register_buffer("positions", sinusoids(count, embed_dim), persistent=False)
        embed = nn.Linear(patch_length, embed_dim, bias=False)
        self.patch_embedding = group(value_embedding=embed)
        layers = (EncoderLayer(embed_dim, num_heads, mlp_dim) for _ in range(depth))
        norm = nn.Sequential(nn.Identity(), nn.BatchNorm1d(embed_dim))
        self.encoder = group(attn_layers=nn.ModuleList(layers), norm=norm)
        self.head = group(linear=nn.Linear(embed_dim * count, horizon))

    def forward(self, series: Tensor) -> Tensor:
        """The forecast."""
        x, mean, deviation = standardised(series)
        x = F.pad(x.transpose(1, 2), (0, self.stride), mode="replicate")
        x = x.unfold(-1, self.patch_length, self.stride).flatten(0, 1)
        x = self.patch_embedding.value_embedding(x) + self.positions
        for layer in self.encoder.attn_layers:
            x = layer(x)
        x = self.encoder.norm[1](x.transpose(1, 2))
        y = self.head.linear(x.reshape(*series.shape[::2], -1)).transpose(1, 2)
        return y * deviation + mean


def circular(channels: int, out: int, bias: bool) -> nn.Conv1d:
    """A convolution over three steps of which the last is next to the first."""
    return nn.Conv1d(channels, out, 3, padding=1, padding_mode="circular", bias=bias)


def over_time(convolve: nn.Conv1d, x: Tensor) -> Tensor:
    """A convolution of `[batch, time, channels]`."""
    return convolve(x.transpose(1, 2)).transpose(1, 2)


class DatedEmbedding(nn.Module):
    """A convolution of the series and a linear map of the time features, perhaps positions."""

    def __init__(self, variates: int, features: int, channels: int, positions: bool) -> None:
        """Without positions there are no biases either."""
        super().__init__()
        self.value_embedding = group(tokenConv=circular(variates, channels, positions))
        self.temporal_embedding = group(embed=nn.Linear(features, channels, bias=positions))
        table = sinusoids(5000, channels) if positions else None
        self.register_buffer("positions", table, persistent=False)

    def forward(self, series: Tensor, features: Tensor) -> Tensor:
        """`[batch, time, channels]`."""
        x = over_time(self.value_embedding.tokenConv, series)
        x = x + self.temporal_embedding.embed(features)
        return x if self.positions is None else x + self.positions[: x.shape[1]]


# --------------------------------------------------------------------------------- Informer


def prob_sparse(
    query: Tensor, key: Tensor, value: Tensor, samples: Tensor, factor: int, causal: bool
) -> Tensor:
    """Attention of the queries that differ most over sampled keys; averages for the others."""
    count = min(factor * math.ceil(math.log(query.shape[1])), query.shape[1])
    scores = torch.einsum("bqhd,bqshd->bhqs", query, key[:, samples])
    measure = scores.amax(-1) - scores.sum(-1) / key.shape[1]
    top = measure.topk(count, sorted=False).indices  # [batch, heads, count]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    index = top[..., None].expand(-1, -1, -1, query.shape[-1])
    mask = None
    if causal:
        mask = torch.arange(key.shape[2], device=key.device) <= top[..., None]
    rows = F.scaled_dot_product_attention(query.gather(2, index), key, value, attn_mask=mask)
    base = value.cumsum(2) if causal else value.mean(2, keepdim=True).expand_as(query)
    return base.scatter(2, index, rows).transpose(1, 2)


class Distil(nn.Module):
    """Halves a series between two layers of the encoder."""

    def __init__(self, channels: int) -> None:
        """So many channels."""
        super().__init__()
        self.downConv, self.norm = circular(channels, channels, True), nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Every other step."""
        x = F.elu(self.norm(self.downConv(x.transpose(1, 2))))
        return F.max_pool1d(x, 3, 2, 1).transpose(1, 2)


class InformerDecoderLayer(Pointwise):
    """Self-attention, attention to the encoder, MLP; LayerNorm after each."""

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        """So many channels, heads, and channels in the MLP's middle."""
        super().__init__(channels, hidden)
        self.self_attention = Projected(channels, heads, mix=True)
        self.cross_attention = Projected(channels, heads)
        for i in (1, 2, 3):
            setattr(self, f"norm{i}", nn.LayerNorm(channels))

    def forward(self, x: Tensor, memory: Tensor, attend: Callable) -> Tensor:
        """The same shape as `x`."""
        x = self.norm1(x + self.self_attention(x, x, attend))
        x = self.norm2(x + self.cross_attention(x, memory))
        return self.norm3(x + self.feed(x))


class Informer(nn.Module):
    """Informer with time features; the sampled keys of each layer are given."""

    def __init__(
        self, label_length: int, horizon: int, variates: int, time_features: int, embed_dim: int,
        depth: int, decoder_depth: int, num_heads: int, mlp_dim: int, factor: int,
        samples: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """Fields as those of the zoo's; `samples`: `[queries, sampled]` of each self-attention."""
        super().__init__()
        self.label_length, self.horizon, self.factor = label_length, horizon, factor
        self.samples = list(samples)
        self.enc_embedding = DatedEmbedding(variates, time_features, embed_dim, True)
        self.dec_embedding = DatedEmbedding(variates, time_features, embed_dim, True)
        sizes = (embed_dim, num_heads, mlp_dim)
        self.encoder = group(
            attn_layers=nn.ModuleList(EncoderLayer(*sizes) for _ in range(depth)),
            conv_layers=nn.ModuleList(Distil(embed_dim) for _ in range(depth - 1)),
            norm=nn.LayerNorm(embed_dim),
        )
        self.decoder = group(
            layers=nn.ModuleList(InformerDecoderLayer(*sizes) for _ in range(decoder_depth)),
            norm=nn.LayerNorm(embed_dim),
        )
        self.projection = nn.Linear(embed_dim, variates)

    def _attend(self, index: int, causal: bool) -> Callable:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return prob_sparse(query, key, value, self.samples[index], self.factor, causal)

        return attend

    def forward(self, series: Tensor, features: Tensor, future: Tensor) -> Tensor:
        """The forecast."""
        x = self.enc_embedding(series, features)
        depth = len(self.encoder.attn_layers)
        for i, layer in enumerate(self.encoder.attn_layers):
            x = layer(x, self._attend(i, False))
            if i < depth - 1:
                x = self.encoder.conv_layers[i](x)
        memory = self.encoder.norm(x)
        start = F.pad(series[:, -self.label_length :], (0, 0, 0, self.horizon))
        dates = torch.cat([features[:, -self.label_length :], future], dim=1)
        x = self.dec_embedding(start, dates)
        for i, layer in enumerate(self.decoder.layers):
            x = layer(x, memory, self._attend(depth + i, True))
        return self.projection(self.decoder.norm(x))[:, -self.horizon :]


# ------------------------------------------------------------------------------- Autoformer


def decompose(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Season and trend; the trend is a moving average."""
    half = width // 2
    padded = F.pad(x.transpose(1, 2), (half, half), mode="replicate")
    trend = F.avg_pool1d(padded, width, 1).transpose(1, 2)
    return x - trend, trend


def auto_correlation(query: Tensor, key: Tensor, value: Tensor, factor: int) -> Tensor:
    """Values shifted by the delays at which query and key are most alike, for each example."""
    length = query.shape[1]
    more = max(0, length - key.shape[1])
    key, value = (F.pad(x[:, :length], (0, 0, 0, 0, 0, more)) for x in (key, value))
    spectrum = torch.fft.rfft(query, dim=1) * torch.fft.rfft(key, dim=1).conj()
    correlation = torch.fft.irfft(spectrum, n=length, dim=1).mean((2, 3))
    found, delays = correlation.topk(min(int(factor * math.log(length)), length))
    weights = found.softmax(-1)
    steps = torch.arange(length, device=value.device)
    out = torch.zeros_like(value)
    for i in range(delays.shape[1]):
        index = (steps + delays[:, i, None]) % length
        shifted = value.gather(1, index[..., None, None].expand_as(value))
        out = out + weights[:, i, None, None, None] * shifted
    return out


class AutoformerLayer(Pointwise):
    """Auto-correlation and MLP, each followed by a decomposition; for a decoder with a memory."""

    def __init__(
        self, channels: int, heads: int, hidden: int, factor: int, width: int, variates: int = 0
    ) -> None:
        """With variates it is a layer of the decoder."""
        super().__init__(channels, hidden, bias=False)
        self.factor, self.width = factor, width
        if not variates:
            self.attention = Projected(channels, heads)
            return
        self.self_attention = Projected(channels, heads)
        self.cross_attention = Projected(channels, heads)
        self.projection = circular(channels, variates, False)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return auto_correlation(query, key, value, self.factor)

    def encode(self, x: Tensor) -> Tensor:
        """The season."""
        x, _ = decompose(x + self.attention(x, x, self._attend), self.width)
        return decompose(x + self.feed(x), self.width)[0]

    def decode(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Season, and what the trend gains."""
        x, first = decompose(x + self.self_attention(x, x, self._attend), self.width)
        x, second = decompose(x + self.cross_attention(x, memory, self._attend), self.width)
        x, third = decompose(x + self.feed(x), self.width)
        return x, over_time(self.projection, first + second + third)


def season_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm less its mean over time."""
    x = norm(x)
    return x - x.mean(1, keepdim=True)


class Autoformer(nn.Module):
    """Autoformer with time features."""

    def __init__(
        self, label_length: int, horizon: int, variates: int, time_features: int, embed_dim: int,
        depth: int, decoder_depth: int, num_heads: int, mlp_dim: int, factor: int,
        moving_average: int,
    ) -> None:  # fmt: skip
        """Fields as those of the zoo's."""
        super().__init__()
        self.label_length, self.horizon, self.width = label_length, horizon, moving_average
        self.enc_embedding = DatedEmbedding(variates, time_features, embed_dim, False)
        self.dec_embedding = DatedEmbedding(variates, time_features, embed_dim, False)
        sizes = (embed_dim, num_heads, mlp_dim, factor, moving_average)
        self.encoder = group(
            attn_layers=nn.ModuleList(AutoformerLayer(*sizes) for _ in range(depth)),
            norm=group(layernorm=nn.LayerNorm(embed_dim)),
        )
        self.decoder = group(
            layers=nn.ModuleList(AutoformerLayer(*sizes, variates) for _ in range(decoder_depth)),
            norm=group(layernorm=nn.LayerNorm(embed_dim)),
            projection=nn.Linear(embed_dim, variates),
        )

    def forward(self, series: Tensor, features: Tensor, future: Tensor) -> Tensor:
        """The forecast."""
        x = self.enc_embedding(series, features)
        for layer in self.encoder.attn_layers:
            x = layer.encode(x)
        memory = season_norm(self.encoder.norm.layernorm, x)
        season, trend = (part[:, -self.label_length :] for part in decompose(series, self.width))
        season = F.pad(season, (0, 0, 0, self.horizon))
        trend = torch.cat([trend, series.mean(1, keepdim=True).expand(-1, self.horizon, -1)], 1)
        dates = torch.cat([features[:, -self.label_length :], future], dim=1)
        x = self.dec_embedding(season, dates)
        for layer in self.decoder.layers:
            x, more = layer.decode(x, memory)
            trend = trend + more
        season = self.decoder.projection(season_norm(self.decoder.norm.layernorm, x))
        return (season + trend)[:, -self.horizon :]


# ------------------------------------------------------------------------- GLA and DeltaNet


def chunks(x: Tensor, size: int) -> Tensor:
    """`[batch, length, heads, channels]` as `[batch, heads, chunks, size, channels]`."""
    return x.transpose(1, 2).unflatten(2, (-1, size))


def joined(parts: list[Tensor]) -> Tensor:
    """Chunks `[batch, heads, size, channels]` as `[batch, length, heads, channels]`."""
    return torch.cat(parts, dim=2).transpose(1, 2)


def gated_linear(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, size: int = 64) -> Tensor:
    """S_t = diag(exp g_t) S_(t-1) + k_t v_t^T and o_t = S_t^T q_t / sqrt(d), in chunks.

    Inside a chunk it divides by the gates' product, which must stay far from the least float: the
    sum of the gates over a chunk may not fall below -80.
    """
    query, key, value, gate = (chunks(x, size) for x in (query, key, value, gate))
    since = gate.cumsum(3)  # of the chunk's beginning
    whole = since[..., -1:, :]
    query = query * query.shape[-1] ** -0.5 * since.exp()
    inside = (query @ (key * (-since).exp()).transpose(-1, -2)).tril() @ value
    written = (key * (whole - since).exp()).transpose(-1, -2) @ value
    decay = whole.exp().transpose(-1, -2)
    state, out = torch.zeros_like(written[:, :, 0]), []
    for i in range(query.shape[2]):
        out.append(inside[:, :, i] + query[:, :, i] @ state)
        state = decay[:, :, i] * state + written[:, :, i]
    return joined(out)


def delta_rule(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, size: int = 64) -> Tensor:
    """S_t = S_(t-1) + beta_t k_t (v_t - S_(t-1)^T k_t)^T and o_t = S_t^T q_t / sqrt(d), in chunks.

    What a chunk's tokens write, u_t = beta_t (v_t - S_(t-1)^T k_t), solves a triangular system.
    """
    query, key, value, beta = (chunks(x, size) for x in (query, key, value, beta[..., None]))
    query = query * query.shape[-1] ** -0.5
    weighted = beta * key
    system = (weighted @ key.transpose(-1, -2)).tril(-1)  # its diagonal of ones is implied
    both = torch.cat([beta * value, weighted], dim=-1)
    both = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
    fresh, read = both.split([value.shape[-1], key.shape[-1]], dim=-1)
    inside = (query @ key.transpose(-1, -2)).tril()
    state = query.new_zeros(*query.shape[:2], key.shape[-1], value.shape[-1])
    out = []
    for i in range(query.shape[2]):
        written = fresh[:, :, i] - read[:, :, i] @ state
        out.append(query[:, :, i] @ state + inside[:, :, i] @ written)
        state = state + key[:, :, i].transpose(-1, -2) @ written
    return joined(out)


def linear(channels: int, out: int) -> nn.Linear:
    """A matrix."""
    return nn.Linear(channels, out, bias=False)


class GatedLinearAttention(nn.Module):
    """The mixer of GLA."""

    def __init__(self, channels: int, heads: int, rank: int = 16) -> None:
        """Keys have half of the channels."""
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = linear(channels, channels // 2), linear(channels, channels // 2)
        self.v_proj, self.g_proj = linear(channels, channels), linear(channels, channels)
        self.gk_proj = nn.Sequential(linear(channels, rank), nn.Linear(rank, channels // 2))
        self.g_norm_swish_gate = nn.RMSNorm(channels // heads, eps=1e-6)
        self.o_proj = linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        gate = F.logsigmoid(self.gk_proj(x)) / 16
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x), gate)
        y = gated_linear(*(p.unflatten(-1, (self.heads, -1)) for p in parts))
        y = self.g_norm_swish_gate(y).flatten(2) * F.silu(self.g_proj(x))
        return self.o_proj(y)


class ShortConv(nn.Conv1d):
    """Each channel over the last four tokens."""

    def __init__(self, channels: int) -> None:
        """So many channels."""
        super().__init__(channels, channels, 4, padding=3, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return super().forward(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class DeltaRule(nn.Module):
    """The mixer of DeltaNet."""

    def __init__(self, channels: int, heads: int) -> None:
        """Keys and values are as wide as the model."""
        super().__init__()
        self.heads = heads
        for name in "qkv":
            setattr(self, f"{name}_proj", linear(channels, channels))
            setattr(self, f"{name}_conv1d", ShortConv(channels))
        self.b_proj, self.o_proj = linear(channels, heads), linear(channels, channels)
        self.o_norm = nn.RMSNorm(channels // heads, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        maps = ((getattr(self, f"{n}_proj"), getattr(self, f"{n}_conv1d")) for n in "qkv")
        parts = (F.silu(convolve(project(x))) for project, convolve in maps)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        query, key = (
            t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (query, key)
        )
        y = delta_rule(query, key, value, self.b_proj(x).sigmoid())
        return self.o_proj(self.o_norm(y).flatten(2))


class GatedMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, channels: int, hidden: int) -> None:
        """Of so many channels."""
        super().__init__()
        self.gate_proj, self.up_proj = linear(channels, hidden), linear(channels, hidden)
        self.down_proj = linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LanguageModel(nn.Module):
    """A decoder of mixers and gated MLPs, each behind an RMSNorm, in fla's naming."""

    def __init__(
        self, vocab_size: int, embed_dim: int, depth: int, mlp_dim: int, mixer: Callable
    ) -> None:
        """`mixer` makes the mixer of a layer."""
        super().__init__()
        norm = lambda: nn.RMSNorm(embed_dim, eps=1e-6)  # noqa: E731
        layers = (
            group(attn_norm=norm(), attn=mixer(), mlp_norm=norm(), mlp=GatedMlp(embed_dim, mlp_dim))
            for _ in range(depth)
        )
        embeddings = nn.Embedding(vocab_size, embed_dim)
        self.model = group(embeddings=embeddings, layers=nn.ModuleList(layers), norm=norm())
        self.lm_head = linear(embed_dim, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        x = self.model.embeddings(tokens)
        for layer in self.model.layers:
            x = x + layer.attn(layer.attn_norm(x))
            x = x + layer.mlp(layer.mlp_norm(x))
        return self.lm_head(self.model.norm(x))
