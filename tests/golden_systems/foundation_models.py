"""Objectives of foundation models on small fixed inputs."""

from collections.abc import Callable
from typing import Any

import golden
import jax.numpy as jnp
import numpy as np

from zoo.tasks import objectives


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """All of them; sizes are those that the configuration gives."""
    config = case.config
    batch, width, vocab = config.take("B"), config.take("D"), config.take("V")
    length, keys = config.take("L"), config.take("K")

    def made(name: str, *shape: int, factor: float = 1) -> np.ndarray:
        return case.uniform(name, shape) * np.float32(factor)

    def unit(name: str, rows: int) -> np.ndarray:
        x = made(name, rows, width)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def whole(name: str, *shape: int) -> np.ndarray:
        if name in case.inputs:
            return case.input(name).astype(np.int32)
        return np.floor((case.uniform(name, shape) + 1) / 2 * vocab).astype(np.int32)

    first, second, queue = unit("z1", batch), unit("z2", batch), unit("queue", keys)
    student, teacher = (made(n, batch, vocab, factor=2) for n in ("student", "teacher"))
    center = made("center", vocab, factor=0.1)
    patches, recon, noise = (made(n, batch, length, width) for n in ("patches", "recon", "eps"))
    logits, disc = (
        made("logits", batch, length, vocab, factor=2),
        made("disc", batch, length, factor=2),
    )
    tokens, labels = whole("tokens", batch, length), whole("cls", batch)
    preferred = [made(n, batch) for n in ("rw", "rl", "refw", "refl")]
    sound = np.moveaxis(made("ctc", length + 3, batch, vocab), 0, 1)
    words = np.maximum(whole("ctct", batch, 3), 1)
    # One patch in four is kept, another in each row.
    removed = (np.arange(batch)[:, None] + np.arange(length)) % 4 != 0
    tau = config.take("label_smoothing", 0.1)
    alpha_bar = config.take("alpha_bar", 0.7)
    beta = config.take("beta", 0.1)

    def run(_: dict) -> golden.Outputs:
        dino, following = objectives.dino(student, teacher, center)
        clm = objectives.causal(logits, tokens)
        mlm = objectives.masked(logits, tokens, removed)
        rtd = objectives.replaced(disc, tokens % 3 == 0)
        return {
            "clip": objectives.clip(first, second),
            "simclr": objectives.simclr(first, second),
            "moco": objectives.moco(first, second, queue),
            "dino": dino,
            "dino_center": following,
            "mae_mask": removed,
            "mae": objectives.mae(patches, recon, removed),
            "clm_nats": clm,
            "clm_ppl": jnp.exp(clm),
            "mlm": mlm,
            "rtd_bce": rtd,
            "electra_total": objectives.electra(mlm, rtd),
            "label_smoothing": objectives.smoothed(student, labels, tau),
            "reward": objectives.reward(*preferred[:2]),
            "dpo": objectives.dpo(*preferred, beta),
            "diffusion_xt": objectives.noised(patches, noise, alpha_bar),
            "diffusion_mse": objectives.denoising(recon, noise),
            "ctc": objectives.ctc(sound, words),
        }

    return None, run


def made_by(case: golden.Case) -> bool:
    """Whether its outputs are those objectives."""
    return {"clip", "moco", "dpo", "ctc"} <= set(case.header["outputs"])
