"""Worked numbers of distillation, pruning, INT8, early exit and speculative decoding."""

import re
from collections.abc import Callable
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np

from zoo.methods import compress
from zoo.tasks import imitation
from zoo.tasks.classification import cross_entropy


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """All of them; sizes are those that the configuration gives."""
    config, wanted = case.config, case.header["outputs"]
    batch, classes, temperature = config.take("B"), config.take("C"), config.take("T")
    lam, inputs, outputs = config.take("lam"), config.take("D"), config.take("O")
    keep, group = config.take("N"), config.take("M")
    heads, width = config.take("H"), config.take("dh")
    limit, patience = config.take("S"), config.take("patience")
    layers = config.take("layers") or wanted["entropy"]["shape"][0]
    samples, length, _ = wanted["attention_output"]["shape"]
    vocab = wanted["accept"]["shape"][0]
    alpha = config.take("alpha", 0.5)
    all_heads = heads * width

    def made(name: str, *shape: int, factor: float = 1) -> np.ndarray:
        return case.uniform(name, shape) * np.float32(factor)

    student, teacher = (made(n, batch, classes, factor=3) for n in ("zs", "zt"))
    labels = (
        case.input("y")
        if "y" in case.inputs
        else np.floor((made("y", batch) + 1) / 2 * classes).astype(int)
    )
    weight, x = made("W", outputs, inputs), made("X", batch, inputs, factor=2)
    tokens, targets = made("Xa", samples, length, all_heads), made("Ya", samples, length, all_heads)
    maps = {n: made(f"P{n}", all_heads, all_heads, factor=all_heads**-0.5) for n in "qkvo"}
    base, extra = (
        made("Ebase", batch, classes, factor=3),
        made("E", layers, batch, classes, factor=2),
    )
    rows = np.float32((np.arange(batch) + 1) / batch)[:, None]
    exits = np.arange(layers, dtype=np.float32)[:, None, None] * base * rows + extra
    target, draft = (jax.nn.softmax(made(n, vocab, factor=2)) for n in ("sp", "sq"))

    def attend(gates: Any, x: Any, maps: Any, count: int) -> Any:
        query, key, value = ((x @ maps[n]).reshape(-1, count, width) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("qnd,knd->nqk", query, key) * width**-0.5, -1)
        context = jnp.einsum("nqk,knd->qnd", weights, value) * gates[:, None]
        return context.reshape(-1, count * width) @ maps["o"]

    def run(_: dict) -> golden.Outputs:
        soft = imitation.softened(student, teacher, temperature).mean()
        hard = cross_entropy(student, labels).mean()
        out = {"kd_kl": soft / temperature**2, "kd_total": soft + lam * hard}
        out["soft_ce"] = imitation.soft_cross_entropy(student, teacher).mean()
        out["nm_mask"] = compress.nm_mask(weight, keep, group)
        for name in wanted:
            share = re.fullmatch(r"magnitude_mask_(\d+)", name)
            if share:
                out[name] = compress.magnitude_mask(weight, int(share[1]) / 100)
        out["y_int8"], out["acc_int32"] = compress.int8_matmul(x, weight)
        out |= {"qw": compress.quantise(weight)[0], "qx": compress.quantise(x)[0]}
        out["y_float"] = x @ weight.T
        largest = jnp.abs(x).max(0), jnp.abs(weight).max(0)
        out["smoothquant_scale"] = compress.smoothing(*largest, alpha)

        def loss(gates: Any, example: Any) -> Any:
            x, y = example
            return 0.5 * jnp.sum((attend(gates, x, maps, heads) - y) ** 2)

        importance, normal = compress.head_importance(loss, heads, (tokens, targets))
        out |= {"head_importance": importance, "head_importance_normalised": normal}
        kept = np.delete(np.arange(heads), int(importance.argmin()))
        sliced = {
            n: compress.keep_heads(m, kept, heads, 0 if n == "o" else 1) for n, m in maps.items()
        }
        whole = jnp.stack([attend(jnp.ones(heads), each, maps, heads) for each in tokens])
        fewer = [attend(jnp.ones(len(kept)), each, sliced, len(kept)) for each in tokens]
        out |= {"attention_output": whole, "heads_kept": kept, "pruned_output": jnp.stack(fewer)}
        entropy = compress.entropy(exits)
        out |= {"entropy": entropy, "exit_margin": jnp.abs(entropy - limit).min()}
        out["exit_layer"] = compress.entropy_exit(exits, limit)
        out["patience_exit"] = compress.patience_exit(exits, patience)
        names = ("accept", "residual", "accept_rate")
        return out | dict(zip(names, compress.acceptance(target, draft), strict=True))

    return None, run


def made_by(case: golden.Case) -> bool:
    """Whether its outputs are those of the survey's definitions."""
    return {"kd_kl", "nm_mask", "accept_rate"} <= set(case.header["outputs"])
