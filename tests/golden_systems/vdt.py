"""Official VDT, alone or inside its diffusion: the masked loss and one masked reverse step."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np

from zoo.inference.diffusion import DDPM, Diffusion, add_noise, target, variational_bound
from zoo.models.video.vdt import VDT, fixed_tables, given_and_noisy

KEPT = {"position_embedding": "pos_embed", "frame_position_embedding": "time_embed"}


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The network by its constructor; with "diffusion", what its process makes of it."""
    config = case.config
    cls = config.take("class", "VDT")
    nested = golden.Config(config.take("model") or config.entries)
    model = _model(nested)
    for ours, table in fixed_tables(model).items():
        case.kept[KEPT[ours]] = table
    if cls == "VDT":
        config.ignore(*(n for n in config.entries if n in nested.entries))
        nested.finish()
        return model, _network(case, model)
    if "Diffusion" not in cls:
        raise golden.Unsupported(f"its class is {cls!r}, and the harness has VDT and its diffusion")
    nested.finish()
    return model, _diffusion(case, model)


def _model(config: golden.Config) -> VDT:
    fields = config.rename(
        patch_size="patch_size",
        in_channels="in_channels",
        embed_dim="hidden_size",
        depth="depth",
        num_heads="num_heads",
        mlp_ratio="mlp_ratio",
        class_dropout="class_dropout_prob",
        num_classes="num_classes",
        learned_variance="learn_sigma",
    )
    video = config.take("mode", "video") == "video"
    frames = config.take("num_frames", 16)
    config.ignore("class")
    clip = (frames if video else 1, *golden.pair(config.take("input_size", 32)))
    return VDT(clip_size=clip, temporal=video, **fields)


def _last(x: np.ndarray) -> np.ndarray:
    """`[B, T, C, H, W]` with channels last."""
    return np.moveaxis(x, 2, -1)


def _network(case: golden.Case, model: VDT) -> Callable[[dict], golden.Outputs]:
    x, t = _last(case.input("x")), case.input("t")
    if "y" in case.names:
        case.unread("y")  # the official network always takes class 0

    def outputs(variables: dict) -> golden.Outputs:
        out = jax.jit(lambda v, x, t: model.apply(v, x, t))(variables, x, t)
        out = np.moveaxis(np.asarray(out), -1, 2)
        return dict.fromkeys(("y", "out", "prediction"), out)

    return outputs


def _diffusion(case: golden.Case, model: VDT) -> Callable[[dict], golden.Outputs]:
    config = case.config
    kind, steps = str(config.take("schedule", "linear 1000")).split()
    betas = {"linear": "linear", "squaredcos_cap_v2": "cosine", "cosine": "cosine"}[kind]
    full = Diffusion(int(steps), betas)
    use = config.take("respace")
    use = tuple(use) if isinstance(use, list) else use or None
    spaced = Diffusion(int(steps), betas, use)
    times = spaced.levels().time[:-1][::-1].astype(int).tolist()
    config.expect(timestep_map=(times, None))
    config.ignore("mask_kind", "index")
    start = bool(config.take("predict_xstart", False))
    small = bool(config.take("sigma_small", False))
    rescaled = bool(config.take("rescale_learned_sigmas", False))
    variance = "learned" if model.learned_variance else "small" if small else "large"
    clip = 1.0 if config.take("clip_denoised", False) else None
    solver = DDPM("clean" if start else "noise", variance)
    given = {name: case.input(name) for name in case.names}
    x0 = _last(given.get("x_start", given.get("raw_x")))
    mask = given.get("mask", np.ones(x0.shape[:4], np.float32))

    def first(x: np.ndarray) -> np.ndarray:  # [B, C, T, H, W] here and below
        return np.moveaxis(x, 1, -1)

    def training(variables: dict) -> golden.Outputs:
        noise, t = first(given["noise"]), given["t"]
        level, cleaner = full.at(t)
        x = add_noise(x0, noise, level)
        prediction = model.apply(variables, given_and_noisy(x0, x, mask), level.time)
        channels = x.shape[-1]
        error = prediction[..., :channels] - target(solver.prediction, x0, noise, level)
        mse = ((error * mask[..., None]) ** 2).mean((1, 2, 3, 4))
        if variance != "learned":
            return {"mse": mse, "loss": mse}
        mean, log_var, _ = solver.reverse(x, level, cleaner, prediction)
        bits = variational_bound(x0, x, mean, log_var, level, cleaner)
        bits = bits * (int(steps) / 1000.0 if rescaled else 1.0)
        return {"mse": mse, "vb": bits, "loss": mse + bits}

    def reverse(variables: dict) -> golden.Outputs:
        x = first(given["x_t"])
        index = given.get("index", np.full(len(x), config.entries.get("index", 0)))
        level, cleaner = spaced.at(index)
        prediction = model.apply(variables, given_and_noisy(x0, x, mask), level.time)
        step = DDPM(solver.prediction, variance, clip)
        mean, log_var, aim = step.reverse(x, level, cleaner, prediction)
        named = {"mean": mean, "variance": jnp.exp(log_var), "pred_xstart": aim}
        named["log_variance"] = log_var
        return {name: jnp.moveaxis(value, -1, 1) for name, value in named.items()}

    def outputs(variables: dict) -> golden.Outputs:
        out = {}
        for part, needed in ((training, "noise"), (reverse, "x_t")):
            out |= jax.jit(part)(variables) if needed in given else {}
        return out

    return outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return "RERV/VDT" in case.source
