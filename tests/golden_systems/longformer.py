"""Hugging Face's Longformer and its heads."""

import re
from collections.abc import Callable
from typing import Any

import golden
import jax
import jax.numpy as jnp
from golden_systems._inputs import BOOKKEEPING, inputs

import zoo

HEADS = {
    "MaskedLM": "masked_lm",
    "SequenceClassification": "classification",
    "TokenClassification": "token_classification",
    "QuestionAnswering": "question_answering",
}


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The encoder; the head is that of the class that the source names."""
    config = case.config
    fields = dict(vocab_size=30522, embed_dim=768, depth=12, num_heads=12, mlp_dim=3072, window=512,
                  max_positions=512, num_token_types=2, pad_token=1, sep_token=2, activation="gelu",
                  epsilon=1e-12)  # fmt: skip
    fields |= config.rename(
        vocab_size="vocab_size",
        embed_dim="hidden_size",
        depth="num_hidden_layers",
        num_heads="num_attention_heads",
        mlp_dim="intermediate_size",
        window="attention_window",
        max_positions="max_position_embeddings",
        num_token_types="type_vocab_size",
        pad_token="pad_token_id",
        sep_token="sep_token_id",
        activation="hidden_act",
        epsilon="layer_norm_eps",
    )
    config.expect(tie_word_embeddings=True)
    config.ignore("attention_probs_dropout_prob", "hidden_dropout_prob", *BOOKKEEPING)
    config.ignore("ignore_attention_mask", "attention_mode", "is_decoder", "add_cross_attention")
    named = re.search(r"LongformerFor(\w+)", case.source)
    if named and named[1] not in HEADS:
        raise golden.Unsupported(f"the zoo's Longformer has no head for {named[1]}")
    head = named and HEADS[named[1]]
    names = {name.removeprefix("longformer.") for name in case.shapes}
    decoder = "lm_head.decoder.weight"
    if decoder in names:
        case.filled_as |= {"longformer.embeddings.word_embeddings.weight": decoder}
        case.filled_as |= {"lm_head.bias": "lm_head.decoder.bias"}
    model = zoo.info("longformer_test").create(
        **fields,
        head=head,
        num_classes=case.shapes.get(
            "classifier.out_proj.weight", case.shapes.get("classifier.weight", (2,))
        )[0],
        pooler="pooler.dense.weight" in names,
        max_global=None,
    )
    given = inputs(
        case,
        tokens="input_ids",
        mask="attention_mask",
        global_mask="global_attention_mask",
        token_types="token_type_ids",
        positions="position_ids",
    )
    run = jax.jit(lambda v, x: model.apply(v, **x, method="features"))

    def outputs(variables: dict) -> golden.Outputs:
        out = run(variables, given)
        hidden = out["last_hidden_state"]
        keep = jnp.asarray(given.get("mask", jnp.ones(hidden.shape[:2], int)))[..., None] != 0
        named = {
            "hidden_states_0": out["embeddings"],
            **{f"hidden_states_{i + 1}": out[f"layer{i}"] for i in range(model.depth)},
            "last_hidden_state": hidden,
            "logits": out["logits"],
        }
        if head == "question_answering":
            named |= {
                f"{end}_logits": out["logits"][..., i] for i, end in enumerate(("start", "end"))
            }
        if "pooled" in out:
            named["pooler_output"] = out["pooled"]
        masked = {
            f"{name}_masked": jnp.where(keep if x.ndim == 3 else keep[..., 0], x, 0)
            for name, x in named.items()
            if x.shape[:2] == keep.shape[:2]
        }
        return named | masked

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names transformers' class."""
    return re.search(r"transformers \S+ Longformer(Model|For)", case.source) is not None
