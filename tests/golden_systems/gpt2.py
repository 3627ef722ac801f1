"""GPT-2 of Hugging Face's transformers."""

import re
from collections.abc import Callable
from typing import Any

import golden
import numpy as np

import zoo


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The language model."""
    fields = case.config.rename(
        vocab_size="vocab_size",
        max_positions="n_positions",
        embed_dim="n_embd",
        depth="n_layer",
        num_heads="n_head",
    )
    model = zoo.create("gpt2", **fields)
    return model, golden.features(model, case.input("input_ids").astype(np.int32))


def made_by(case: golden.Case) -> bool:
    """Whether the header names transformers' class."""
    return re.search(r"transformers \S+ GPT2(LMHead)?Model", case.source) is not None
