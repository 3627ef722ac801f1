"""GTSP's masks of tokens, heads and weights."""

from collections.abc import Callable
from typing import Any

import fill
import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden_systems._graphs import padded

import zoo
from zoo.methods.gtsp import (
    COLLECTION,
    PERTURBED,
    SparseHeads,
    SparseLayers,
    SparseTokens,
    SparseWeights,
    death_and_growth,
    global_masks,
    perturbations,
    worth,
)


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """By what the case masks."""
    if "final_density" in case.config.entries:
        return None, _weights(case)
    config = case.config
    inputs, real = padded(case)
    inputs["nodes"] = inputs["nodes"].astype(np.float32)
    inputs.pop("edge_features", None)
    walks = case.input("pe").astype(np.float32)
    inputs["walks"] = np.zeros((*real.shape, walks.shape[1]), np.float32)
    inputs["walks"][real] = walks
    edges = case.shapes.get("edge_emb.weight", (0,))[0]
    model = zoo.info("gps_nci1").create(
        node_features=inputs["nodes"].shape[-1],
        walk_steps=walks.shape[1],
        embed_dim=config.take("channels", 64),
        depth=config.take("layers", 4),
        num_heads=config.take("heads", 4),
        edge_types=edges,
        num_classes=case.shapes["lin.weight"][0],
        max_nodes=real.shape[1],
        max_edges=inputs["edges"].shape[1],
        attention_dropout=0.0,
    )
    config.ignore("model", "smallest_gap", "attn_dropout", "dropout", "drop_path")
    labels = np.arange(len(real)) % model.num_classes
    if "labels" in case.names:
        labels = case.input("labels")

    def loss_of(y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean()

    if "ratio" in config.entries or "token_ratio" in config.entries:
        return _tokens(case, model, inputs, loss_of)
    if "heads_before" in case.names:
        return _heads(case, model, inputs, loss_of)
    model = SparseLayers().wrap(model)  # which drops nothing in evaluation

    def outputs(variables: dict) -> golden.Outputs:
        y = jax.jit(lambda v: model.apply(v, **inputs))(variables)
        return {"y": y, "loss": loss_of(y)}

    return model, outputs


def _tokens(
    case: golden.Case, model: Any, inputs: dict, loss_of: Callable
) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    ratio = case.config.take("ratio", case.config.take("token_ratio"))
    method = SparseTokens(ratio, official=True)
    if case.config.take("k", 0) not in (0, method.kept(inputs["nodes"].shape[1])):
        raise golden.Unsupported(f"it keeps k={case.config.entries['k']} tokens")
    noise = {
        f"layers_{i}": {"attention": {"gumbel": case.input(f"gumbel{i}").astype(np.float32)}}
        for i in range(model.depth)
        if f"gumbel{i}" in case.names
    }
    wrapped = method.wrap(model)

    @jax.jit
    def run(params: dict, rest: dict) -> Any:
        def loss(params: dict) -> Any:
            given = {**rest, "params": params, "noise": noise}
            y, sown = wrapped.apply(given, **inputs, mutable=["intermediates"])
            return loss_of(y), (y, sown["intermediates"])

        return jax.value_and_grad(loss, has_aux=True)(params)

    def outputs(variables: dict) -> golden.Outputs:
        rest = {k: v for k, v in variables.items() if k != "params"}
        (loss, (y, sown)), grads = run(variables["params"], rest)
        out = {"y": y, "loss": loss}
        for i in range(model.depth):
            out[f"topk_mask{i}"] = sown[f"layers_{i}"]["attention"]["kept"][0]
            score = grads[f"layers_{i}"]["attention"]["token_score"]
            out[f"dloss_dgumbel{i}"] = score["kernel"].T
            out[f"dloss_dgumbel{i}_bias"] = score["bias"]
        return out

    return wrapped, outputs


def _heads(
    case: golden.Case, model: Any, inputs: dict, loss_of: Callable
) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    config = case.config
    density, death = config.take("density", 1.0), config.take("death", 0.5)
    method, before = SparseHeads(density, death), case.input("heads_before").astype(np.float32)
    wrapped = method.wrap(model)
    masks = {f"layers_{i}": {"attention": {"heads": row}} for i, row in enumerate(before)}

    def outputs(variables: dict) -> golden.Outputs:
        given = {**variables, COLLECTION: masks}
        zeros = perturbations(wrapped, given, inputs)

        @jax.jit
        def run(given: dict, zeros: dict) -> Any:
            def loss(zeros: dict) -> Any:
                y = wrapped.apply({**given, PERTURBED: zeros}, **inputs)
                return loss_of(y), y

            return jax.value_and_grad(loss, has_aux=True)(zeros)

        (loss, y), grads = run(given, zeros)
        found = worth(grads)
        out, after = {"y": y, "loss": loss}, []
        for i, row in enumerate(before):
            scores, norms = found[(f"layers_{i}", "attention")]
            out |= {f"grad_scores{i}": scores, f"grad_norm{i}": norms}
            after.append(death_and_growth(jnp.asarray(row), scores, norms, death))
        return out | {"heads_after": np.stack(after)}

    return model, outputs


def _weights(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    config = case.config
    epoch, every = config.take("steps_per_epoch"), config.take("update_frequency")
    begin, end = (config.take(f"{which}_prune_epoch") * epoch for which in ("init", "final"))
    densities = config.take("init_density", 1.0), config.take("final_density")
    method = SparseWeights(*densities, begin, end, every)
    at, shapes = config.take("mask_at_index"), config.take("shapes", [])
    config.ignore("model", "epochs")
    names = [name for name in case.names if name[:1] == "w" and name[1:].isdigit()]
    names.sort(key=lambda name: int(name[1:]))
    weights = []
    for i, name in enumerate(names):
        how = config.entries["inputs"].get(name, {}).get("how", "")
        stored = name in case.inputs
        if not stored and "fill.weight" not in how:
            raise golden.Unsupported(f"its input {name!r} is made by {how!r}")
        case.unread(name)
        made = case.inputs[name] if stored else fill.weight(f"{name}.weight", tuple(shapes[i]))
        weights.append(jnp.abs(jnp.asarray(made)))

    def run(variables: dict) -> golden.Outputs:
        with jax.enable_x64(True):
            steps = [s for s in range(1, end + 1) if s % every == 0 and s >= begin]
            steps = [s for s in steps if s // every <= end // every - 1]
            rates = np.array([method.rate(np.float64(s)) for s in steps])
            out = {"steps": np.array(steps, float), "prune_rate": rates}
            masks = global_masks(weights, rates[at])
            return out | {f"mask_{name}": m for name, m in zip(names, masks, strict=True)}

    return run


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository, or its schedule."""
    return "GTSP" in case.source or "gps_weight" in case.source
