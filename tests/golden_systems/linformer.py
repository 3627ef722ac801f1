"""The Linformer of lucidrains."""

from collections.abc import Callable
from typing import Any

import golden
from golden_systems._inputs import inputs

import zoo


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The model with its word head."""
    config = case.config
    fields = dict(projected=256, num_heads=8)
    fields |= config.rename(
        vocab_size="num_tokens",
        embed_dim="dim",
        max_length="seq_len",
        depth="depth",
        projected="k",
        num_heads="heads",
        head_dim="dim_head",
        one_kv_head="one_kv_head",
        share_kv="share_kv",
        reversible="reversible",
    )
    config.ignore("dropout")
    model = zoo.info("linformer_test").create(**fields)
    given = inputs(case, tokens=("input_ids", "x"))
    return model, golden.features(model, given["tokens"])


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository."""
    return "lucidrains/linformer" in case.source
