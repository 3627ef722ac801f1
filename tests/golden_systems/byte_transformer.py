"""BERT run on packed tokens: Hugging Face's BERT at the valid positions."""

import re
from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np
from golden_systems._inputs import BOOKKEEPING, inputs

import zoo
from zoo.models.language.byte_transformer import rows_for


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The encoder on as many rows as there are tokens."""
    config = case.config
    fields = dict(vocab_size=30522, embed_dim=768, depth=12, num_heads=12, mlp_dim=3072,
                  max_positions=512, num_token_types=2, activation="gelu",
                  epsilon=1e-12)  # fmt: skip
    fields |= config.rename(
        vocab_size="vocab_size",
        embed_dim="hidden_size",
        depth="num_hidden_layers",
        num_heads="num_attention_heads",
        mlp_dim="intermediate_size",
        max_positions="max_position_embeddings",
        num_token_types="type_vocab_size",
        activation="hidden_act",
        epsilon="layer_norm_eps",
    )
    config.expect(position_embedding_type=("absolute", None), is_decoder=False,
                  add_cross_attention=False, tie_word_embeddings=True)  # fmt: skip
    config.ignore("attention_probs_dropout_prob", "hidden_dropout_prob", "pad_token_id",
                  *BOOKKEEPING)  # fmt: skip
    given = inputs(
        case,
        tokens="input_ids",
        token_types="token_type_ids",
        mask=("attention_mask", "mask"),
        lengths=("lengths", "seq_lens"),
        offsets="cu_seqlens",
    )
    offsets, lengths = given.pop("offsets", None), given.pop("lengths", None)
    if "mask" not in given and lengths is not None:
        given["mask"] = np.arange(given["tokens"].shape[1]) < lengths[:, None]
    mask = given.get("mask", np.ones_like(given["tokens"])) != 0
    for name, value in (("cu_seqlens", offsets), ("lengths", lengths)):
        wanted = mask.sum(1) if name == "lengths" else np.append(0, np.cumsum(mask.sum(1)))
        if value is not None and not np.array_equal(value, wanted):
            raise golden.Unsupported(f"its {name} are not those of its mask")
    tokens = int(mask.sum())
    model = zoo.info("byte_transformer_test").create(
        **fields, rows=rows_for(mask, 16), pooler="pooler.dense.weight" in case.shapes
    )
    run = jax.jit(lambda v, x: model.apply(v, **x, method="features"))

    def outputs(variables: dict) -> golden.Outputs:
        out = dict(run(variables, given))
        hidden = out["last_hidden_state"]
        out |= {"last_hidden_state_masked": hidden, "packed_hidden": out["packed_hidden"][:tokens]}
        return out | ({"pooler_output": out["pooled"]} if "pooled" in out else {})

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether it is a case of BERT with packed outputs."""
    return "packed_hidden" in case.header["outputs"] and (
        re.search(r"transformers \S+ Bert(Model|For)", case.source) is not None
    )
