"""Quantisers and a ternary BERT whose teacher intervenes."""

import re
from collections.abc import Callable
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np

import zoo
from zoo.methods import ternary
from zoo.tasks import imitation


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """By what the case has."""
    case.own_weights = True
    if "vocab_size_or_config_json_file" in case.config.entries:
        return None, _bert(case)
    return None, _quantisers(case)


def _quantisers(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    config, wanted = case.config, case.header["outputs"]
    clip = float(config.take("clip", [-2.5, 2.5])[1])
    shape = (config.take("R"), config.take("C"))
    factor = re.match(r"\s*([\d.]+)\s*\*", str(config.entries["inputs"]["x"]))
    x = case.uniform("x", shape) * np.float32(factor[1] if factor else 1)
    g = case.uniform("g", shape)

    def run(_: dict) -> golden.Outputs:
        out = {}
        for name in wanted:
            found = re.fullmatch(r"(sym|asym|twn)(\d*)_(tensor|row)(_grad)?", name)
            if not found:
                continue
            options = {"rows": found[3] == "row", "clip": clip}

            def quantise(x: Any, found: Any = found, options: Any = options) -> Any:
                if found[1] == "twn":
                    return ternary.ternary(x, **options)
                kind = ternary.symmetric if found[1] == "sym" else ternary.asymmetric
                return kind(x, int(found[2]), **options)

            y, back = jax.vjp(quantise, x)
            out[name] = back(g)[0] if found[4] else y
        return out

    return run


def _bert(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    config = case.config
    config.ignore("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")
    state = case.state_dict()
    depth = config.take("num_hidden_layers", 12)
    vocab = config.take("vocab_size_or_config_json_file")
    labels = config.take("num_labels", state["classifier.weight"].shape[0])
    model = zoo.info("bert_test").create(
        vocab_size=vocab,
        embed_dim=config.take("hidden_size"),
        depth=depth,
        num_heads=config.take("num_attention_heads"),
        mlp_dim=config.take("intermediate_size"),
        max_positions=config.take("max_position_embeddings", 512),
        num_token_types=config.take("type_vocab_size", 2),
        epsilon=config.take("layer_norm_eps", 1e-12),
        activation=config.take("hidden_act") or "gelu",
        head="classification",
        num_classes=labels,
        pooler=True,
    )
    config.ignore(
        "mean_scale", "weight_bits", "input_bits"
    )  # which the official code does not read
    maps = {
        "qkv_q": r"attention/(query|key|value|out)",
        "ffn_q_1": "mlp/up",
        "ffn_q_2": "mlp/down",
        "cls_q": "pooler",
    }
    whole = config.take("quantize", True)
    chosen = [
        pattern
        for flag, pattern in maps.items()
        if config.take(flag, True) and (whole or flag == "qkv_q")
    ]
    quantiser = {
        "clip": config.take("clip_val", 2.5),
        "targets": rf"(.*/)?({'|'.join(chosen)})" if chosen else r"(?!)",
        "embeddings": r"(.*/)?embed" if config.take("emb_q", True) and whole else r"(?!)",
    }
    if not whole and chosen[:1] == [maps["qkv_q"]]:
        # attention/out alone, whose flag the official code reads by itself
        quantiser["targets"] = r"(.*/)?attention/out"
    tokens, mask = (case.input(name).astype(np.int32) for name in ("ids", "mask"))
    inputs = {"tokens": tokens, "mask": mask}
    for name in ("token_type_ids", "types"):
        inputs |= {"token_types": case.input(name).astype(np.int32)} if name in case.names else {}
    filled = {n: x for n, x in state.items() if not re.search(r"(_clip_val|\.clip_\w+)$", n)}
    params = zoo.convert(model, filled)["params"]

    def look(method: Any, params: Any) -> tuple[dict, dict[str, ternary.Seen], list, list]:
        """Features, what attention computed, all hidden states, attention behind its norm."""
        out, made = method.wrap(model).apply(
            {"params": params},
            **inputs,
            method="features",
            capture_intermediates=lambda module, name: module.name == "norm1",
            mutable=["intermediates"],
        )
        made = made["intermediates"]
        norms = [made[f"layers_{i}"]["norm1"]["__call__"][0] for i in range(depth)]
        hidden = [out["embeddings"], *(out[f"layer{i}"] for i in range(depth))]
        return out, ternary.seen(made), hidden, norms

    def run(_: dict) -> golden.Outputs:
        taught, teacher, their_hidden, their_norms = look(ternary.Teacher(), params)
        names = [f"layers_{i}/attention" for i in range(depth)]
        out = {"teacher_logits": taught["logits"]}
        for i, name in enumerate(names):
            saw = teacher[name]
            out |= {f"teacher_probs_{i}": saw.weights, f"teacher_context_{i}": saw.context}
            out[f"teacher_saout_{i}"] = saw.output
        for mode in (None, "map", "context", "output"):
            method = ternary.Ternary(intervention=mode, teacher=teacher, **quantiser)

            def total(params: Any, method: Any = method) -> Any:
                made, student, hidden, norms = look(method, params)
                pairs = imitation.mean_square
                losses = (
                    imitation.soft_cross_entropy(made["logits"], taught["logits"]).mean(),
                    sum(map(pairs, hidden, their_hidden)),
                    sum(map(pairs, norms, their_norms)),
                    sum(imitation.score_square(student[n].scores, teacher[n].scores)
                        for n in names),
                )  # fmt: skip
                return sum(losses), (made["logits"], hidden[-1], jnp.stack(losses))

            (_, (logits, last, losses)), grads = jax.value_and_grad(total, has_aux=True)(params)
            key = mode or "none"
            up = grads[f"layers_{depth - 1}"]["mlp"]["up"]["kernel"].T
            out |= {f"logits_{key}": logits, f"hidden_last_{key}": last, f"losses_{key}": losses}
            out |= {f"grad_q0_{key}": grads["layers_0"]["attention"]["query"]["kernel"].T}
            out |= {f"grad_ffn_last_{key}": up}
        return out

    return run


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository."""
    return "ti-kd-qat" in case.source
