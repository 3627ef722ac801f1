"""LLaMA of Hugging Face's transformers."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import golden
from golden_systems import _text

import zoo
from zoo.layers import rotary


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The language model."""
    model = _text.as_filed(case, zoo.create("llama2_7b", **fields(case.config)))
    return model, _text.run(case, model)


def fields(config: golden.Config) -> dict[str, Any]:
    """Fields of the model from a configuration; what it does not say is as in the class."""
    own = {"epsilon": 1e-6} | config.rename(
        vocab_size="vocab_size",
        embed_dim="hidden_size",
        mlp_dim="intermediate_size",
        depth="num_hidden_layers",
        num_heads="num_attention_heads",
        num_kv_heads="num_key_value_heads",
        head_dim="head_dim",
        epsilon="rms_norm_eps",
        tie_embeddings="tie_word_embeddings",
        mlp_bias="mlp_bias",
        activation="hidden_act",
        window="sliding_window",
    )
    own["qkv_bias"] = own["out_bias"] = config.take("attention_bias", False)
    positions = config.take("max_position_embeddings", 2048)
    rope = dict(config.take("rope_parameters") or config.take("rope_scaling") or {})
    config.ignore("rope_scaling")
    own["rope_theta"] = float(rope.pop("rope_theta", None) or config.take("rope_theta", 10000.0))
    config.ignore("rope_theta")
    own["rope_scaling"] = scaling(rope, positions)
    config.ignore(*_text.IGNORED)
    return own


def scaling(rope: dict[str, Any], positions: int) -> Callable | None:
    """The scaling that transformers' rope parameters describe."""
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind == "default":  # which turns whole heads whatever it says
        rope.pop("partial_rotary_factor", None)
    if kind != "proportional" and rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise golden.Unsupported("it turns a part of each head only")
    known: Mapping[str, tuple[type | None, dict[str, str]]] = {
        "default": (None, {}),
        "linear": (rotary.Linear, {"factor": "factor"}),
        "proportional": (
            rotary.Proportional,
            {"factor": "factor", "partial_rotary_factor": "share"},
        ),
        "dynamic": (rotary.Dynamic, {"factor": "factor"}),
        "llama3": (
            rotary.Llama3,
            {
                "factor": "factor",
                "low_freq_factor": "low",
                "high_freq_factor": "high",
                "original_max_position_embeddings": "original",
            },
        ),
        "yarn": (
            rotary.Yarn,
            {
                "factor": "factor",
                "original_max_position_embeddings": "original",
                "beta_fast": "beta_fast",
                "beta_slow": "beta_slow",
                "attention_factor": "amplitude",
                "truncate": "truncate",
            },
        ),
        "longrope": (
            rotary.LongRope,
            {
                "short_factor": "short",
                "long_factor": "long",
                "original_max_position_embeddings": "original",
                "factor": "factor",
                "attention_factor": "amplitude",
            },
        ),
    }
    if kind == "longrope":
        rope.setdefault("factor", positions / rope["original_max_position_embeddings"])
        rope |= {name: tuple(rope[name]) for name in ("short_factor", "long_factor")}
    if kind not in known:
        raise golden.Unsupported(f"its rope_type is {kind!r}, not one of {', '.join(known)}")
    make, names = known[kind]
    if kind in ("default", "linear", "dynamic"):
        rope.pop("original_max_position_embeddings", None)
    if make is None:
        rope.pop("factor", None)
    if unknown := {name for name, value in rope.items() if value is not None} - set(names):
        raise golden.Unsupported(f"its rope parameters have {', '.join(sorted(unknown))}")
    own = {names[name]: value for name, value in rope.items() if value is not None}
    if kind == "dynamic":
        own["max_positions"] = positions
    return make and make(**own)


def made_by(case: golden.Case) -> bool:
    """Whether the header names the class itself."""
    return re.match(r"transformers \S+ Llama(ForCausalLM|Model)", case.source) is not None
