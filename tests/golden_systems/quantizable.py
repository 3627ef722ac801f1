"""Clipped softmax and gates in BERT's and OPT's attention; outlier metrics, quantisers."""

import re
from collections.abc import Callable
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers.attention import Attention
from zoo.layers.causal import Context
from zoo.methods.quiet_attention import (
    QuietAttention,
    clipped_softmax,
    infinity_norm,
    kurtosis,
    quantised,
)
from zoo.models.language.opt import SeparateAttention


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """By what the case has."""
    case.own_weights = True
    entries = case.config.entries
    if "hidden_size" in entries or "embed_dim" in entries:
        return None, _attention(case)
    return None, _numeric(case)


def _softmax(words: dict[str, str]) -> dict[str, Any]:
    """Our fields of the softmax, from the arguments in words."""
    if words.get("alpha") not in (None, "None"):
        return {"alpha": float(words["alpha"]), "span": int(float(words["max_seq_length"]))}
    text = words.get("softmax") or words.get("softmax_fn") or "vanilla"
    named = re.fullmatch(r".*clipped\((-?[\d.]+):(-?[\d.]+)\).*", text)
    if named:
        # The official table's one slip.
        gamma = -0.003 if "(-.005:1.005)" in text else float(named[1])
        return {"gamma": gamma, "zeta": float(named[2])}
    number = r"=?\s*(-?[\d.]+(?:e-?\d+)?)"
    found = {k: re.search(rf"\b{k}{number}", text) for k in ("gamma", "eta", "zeta")}
    if any(found.values()):
        zeta = found["zeta"] or found["eta"]
        return {"gamma": float(found["gamma"][1]) if found["gamma"] else -0.1,
                "zeta": float(zeta[1]) if zeta else 1.1}  # fmt: skip
    if "vanilla" in text or text == "softmax":
        return {}
    raise golden.Unsupported(f"its softmax is {text!r}, which the harness does not know")


def _gate(words: dict[str, str], state: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Our fields and leaves of the gate, whose kind its tensors tell."""
    kind = f"{words.get('gate', '')} {words.get('attn_gate_type', '')}"
    fields = {"per_head": "conditional_per_head" in kind and "unconditional" not in kind}
    if words.get("fine_tuning") == "True" and words.get("attn_gate_init") not in (None, "None"):
        fields["factor"] = 1 / float(words["attn_gate_init"])
    if "alpha" in state:
        return {"gate": "constant", **fields}, {"gate_bias": state["alpha"]}
    if "alpha.weight" in state:
        leaves = {"gate_kernel": state["alpha.weight"].T, "gate_bias": state["alpha.bias"]}
        return {"gate": "all", **fields}, leaves
    if not any(name.startswith("alpha.") for name in state):
        return {}, {}

    def stacked(name: str) -> np.ndarray:
        heads = sorted({int(n.split(".")[1]) for n in state if n.startswith("alpha.")})
        return np.stack([state[f"alpha.{h}.{name}"] for h in heads])

    if "alpha.0.weight" in state:
        leaves = {"gate_kernel": stacked("weight")[:, 0], "gate_bias": stacked("bias")[:, 0]}
        return {"gate": "linear", **fields}, leaves
    hidden = stacked("0.weight")
    gate = "mlp" if hidden.shape[1] < hidden.shape[2] else "mlp_wide"
    return {"gate": gate, **fields}, {
        "gate_hidden_kernel": hidden.swapaxes(1, 2),
        "gate_hidden_bias": stacked("0.bias"),
        "gate_kernel": stacked("2.weight")[:, 0],
        "gate_bias": stacked("2.bias")[:, 0],
    }


def _attention(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    config, state = case.config, case.state_dict()
    causal = "embed_dim" in config.entries
    width = config.take("embed_dim" if causal else "hidden_size")
    heads = config.take("heads", config.take("num_heads"))
    given = {**(config.take("inp") or {}), **(config.take("kw") or {})}
    words = {name: str(value) for name, value in given.items()}
    known = {"softmax", "softmax_fn", "alpha", "max_seq_length", "gate", "attn_gate_type",
             "attn_gate_init", "attn_gate_mlp", "attn_gate_mlp2", "attn_gate_linear_all_features",
             "fine_tuning", "ssm_eps", "tau", "bias", "is_decoder", "dropout"}  # fmt: skip
    if set(words) - known:
        raise golden.Unsupported(f"its attention has {sorted(set(words) - known)}")
    fields, leaves = _gate(words, state)
    method = QuietAttention(**_softmax(words), **fields)
    names = ("q_proj", "k_proj", "v_proj") if causal else ("query", "key", "value")
    maps = dict(zip(("query", "key", "value"), names, strict=True))
    maps |= {"out": "out_proj"} if causal else {}
    params: dict[str, Any] = {
        ours: {"kernel": state[f"{theirs}.weight"].T}
        | ({"bias": state[f"{theirs}.bias"]} if f"{theirs}.bias" in state else {})
        for ours, theirs in maps.items()
    }
    biased = "bias" in params["query"]
    if causal:
        layer = SeparateAttention(heads, use_bias=biased)
    else:  # its output map stands outside
        params["out"] = {"kernel": np.eye(width, dtype=np.float32)}
        layer = Attention(heads, fused=False, qkv_bias=biased, out_bias=False)
    x, visible = case.input("x"), None
    for name in ("mask", "attention_mask"):
        if name in case.names:
            mask = case.input(name)
            mask = mask.reshape(mask.shape[0], -1, mask.shape[-1])[:, -1]  # of the last query
            visible = mask == 0 if mask.min() < 0 else mask != 0  # added to scores, or of tokens
    args: tuple = (x,) if visible is None else (x, visible)
    if causal and visible is not None:
        args = (x, None, False, Context(mask=jnp.asarray(visible)))
    module, variables = method.wrap(layer), {"params": {**params, **leaves}}

    def run(_: dict) -> golden.Outputs:
        y, made = module.apply(variables, *args, mutable=["intermediates"])
        probabilities = jax.tree.leaves(made["intermediates"]["probabilities"])[-1]
        return {"out" if causal else "context": y[0] if causal else y, "probs": probabilities}

    return run


def _numeric(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    config, wanted = case.config, case.header["outputs"]
    gamma, zeta = config.take("gamma", -0.1), config.take("eta", 1.1)
    shape = tuple(wanted["clipped"]["shape"])
    factor = re.match(r"\s*([\d.]+)\s*\*", str(config.entries["inputs"]["z"]))
    z = case.uniform("z", shape) * np.float32(factor[1] if factor else 1)
    g, act = case.uniform("g", shape), case.input("act")

    def run(_: dict) -> golden.Outputs:
        y, back = jax.vjp(lambda z: clipped_softmax(z, gamma, zeta), z)
        out = {"clipped": y, "clipped_grad": back(g)[0]}
        out |= {"kurtosis": kurtosis(act), "inf_norm": infinity_norm(act)}
        for name in wanted:
            found = re.fullmatch(r"int(\d+)_(asym|sym)(_codes|_scale|_zero|)", name)
            if found:
                made = quantised(act, act.min(), act.max(), int(found[1]), found[2] == "sym")
                parts = dict(zip(("", "_codes", "_scale", "_zero"), made, strict=True))
                out[name] = jnp.reshape(parts[found[3]], wanted[name]["shape"])
        return out

    return run


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository."""
    return "outlier-free-transformers" in case.source
