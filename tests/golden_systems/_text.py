"""What cases of causal language models share: their inputs, and outputs under other names."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np

IGNORED = (
    "class_", "model_type", "architectures", "torch_dtype", "dtype", "attn_implementation",
    "_attn_implementation", "use_cache", "initializer_range", "init_std", "bos_token_id",
    "eos_token_id", "pad_token_id", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout",
    "attention_dropout", "activation_dropout", "layerdrop", "pretraining_tp", "summary_type",
    "summary_use_proj", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "parameters", "logits_step", "hidden_step", "n_ctx",
)  # fmt: skip
"""Entries that change nothing in evaluation."""


def run(case: golden.Case, model: Any) -> Callable[[dict], Mapping[str, Any]]:
    """All features, and what references call by other names, of `input_ids` and their padding."""
    arguments = inputs(case)
    taken = inspect.signature(model.features).parameters
    if unknown := set(arguments) - set(taken):
        raise golden.Unsupported(f"it has {', '.join(unknown)}, which the zoo's model has not")
    depth = model.depth

    def outputs(variables: dict) -> Mapping[str, Any]:
        call = jax.jit(lambda v, x: model.apply(v, **x, method="features"))
        out = dict(call(variables, arguments))
        states = [out["embed"], *(out[f"layer{i}"] for i in range(depth - 1))]
        states.append(out["last_hidden_state"])
        out |= {f"hidden_states.{i}": x for i, x in enumerate(states)}
        out |= {f"hidden_{i}": x for i, x in enumerate(states)}
        middle = re.search(r"hidden_mid = state number (\d+)", case.header.get("notes") or "")
        out["hidden_mid"] = states[int(middle[1]) if middle else len(states) // 2]
        out["hidden_last"] = out["last_hidden_state"]
        out["embedding_sum"] = out["embed"]
        out["loss"] = loss(out["logits"], arguments)[None]
        out |= golden.masked(out, arguments.get("mask", np.ones_like(arguments["tokens"])) != 0)
        return {name: strided(case, name, x) for name, x in out.items()}

    return outputs


def as_filed(case: golden.Case, model: Any) -> Any:
    """The model, without a head of its own where the file has none (`LlamaModel` and its like)."""
    headless = not any(name.endswith("lm_head.weight") for name in case.shapes)
    return model.clone(tie_embeddings=True) if headless else model


def inputs(case: golden.Case) -> dict[str, np.ndarray]:
    """Arguments of the model, by name; others in the file are refused."""
    names = {"input_ids": "tokens", "attention_mask": "mask", "position_ids": "positions",
             "token_type_ids": "token_types", "encoder_hidden_states": "memory",
             "encoder_attention_mask": "memory_mask"}  # fmt: skip
    if unknown := set(case.names) - set(names):
        raise golden.Unsupported(f"it has the inputs {', '.join(sorted(unknown))}")
    arguments = {}
    for name in case.names:
        if name == "input_ids" and name not in case.inputs:  # described in words, the same in all
            tokens = (case.uniform(name) + 1) / 2 * case.config.entries["vocab_size"]
            arguments["tokens"] = np.floor(tokens).astype(np.int32)
        else:
            given = case.input(name)
            floats = name == "encoder_hidden_states"
            arguments[names[name]] = given if floats else given.astype(np.int32)
    return arguments


def loss(logits: jax.Array, arguments: Mapping[str, np.ndarray]) -> jax.Array:
    """The mean loss of next tokens, over pairs of two tokens of text."""
    tokens = arguments["tokens"]
    mask = arguments.get("mask", np.ones_like(tokens))
    each = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    each = jnp.take_along_axis(each, tokens[:, 1:, None], axis=-1)[..., 0]
    counted = mask[:, 1:] * mask[:, :-1]
    return -(each * counted).sum() / counted.sum()


def strided(case: golden.Case, name: str, x: jax.Array) -> jax.Array:
    """Every k-th channel, where the file says that it kept no more."""
    entries = case.config.entries
    step = entries.get("logits_step" if name.startswith("logits") else "hidden_step", 1)
    return x[..., ::step] if x.ndim == 3 and step > 1 else x
