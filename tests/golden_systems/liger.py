"""Liger of OpenSparseLLMs/Linearization."""

from collections.abc import Callable
from typing import Any

import golden
from golden_systems import _text, llama

from zoo.models.language.liger import Liger


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The language model; the class that the header names says which recurrence."""
    config = case.config
    fields = llama.fields(config)
    fields["window"] = 64  # whatever sliding window the base has
    for name in ("window_size", "window"):
        fields |= config.rename(window=name)
    for ours, theirs in (("qkv_bias", "q_proj"), ("out_bias", "o_proj")):  # Qwen's has the first
        fields[ours] = any(name.endswith(f"{theirs}.bias") for name in case.shapes)
    text = f"{case.source} {config.entries.get('model_type', '')} {config.entries.get('kind', '')}"
    text = text.lower()
    kinds = {"hgrn2": "hgrn2", "gsa": "gsa", "slot": "gsa"}
    fields["kind"] = next((kind for word, kind in kinds.items() if word in text), "gla")
    for name in ("pool_size", "num_slots", "slots"):
        fields |= config.rename(slots=name)
    config.ignore("kind")
    model = Liger(**fields)
    return model, _text.run(case, model)


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository or its classes."""
    return "Linearization" in case.source or "Liger" in case.source
