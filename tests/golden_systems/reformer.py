"""Hugging Face's Reformer and its heads."""

import re
from collections.abc import Callable
from typing import Any

import fill
import golden
import jax
import numpy as np
from golden_systems._inputs import BOOKKEEPING, inputs

import zoo

HEADS = {
    "ModelWithLMHead": "language_model",
    "ForMaskedLM": "language_model",
    "ForSequenceClassification": "classification",
    "ForQuestionAnswering": "question_answering",
    "Model": None,
}


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The model; its random directions are `fill.uniform('rot/i', shape)` of the i-th lsh layer."""
    config = case.config
    layers = ("local", "lsh") * 3
    fields = dict(vocab_size=320, embed_dim=256, attention=layers, num_heads=12, mlp_dim=512,
                  causal=False, axial_shape=(64, 64), max_positions=4096)  # fmt: skip
    fields |= config.rename(
        vocab_size="vocab_size",
        embed_dim="hidden_size",
        attention="attn_layers",
        num_heads="num_attention_heads",
        head_dim="attention_head_size",
        mlp_dim="feed_forward_size",
        activation="hidden_act",
        epsilon="layer_norm_eps",
        causal="is_decoder",
        axial_shape="axial_pos_shape",
        axial_dims="axial_pos_embds_dim",
        max_positions="max_position_embeddings",
        num_hashes="num_hashes",
        num_buckets="num_buckets",
        lsh_chunk="lsh_attn_chunk_length",
        lsh_before="lsh_num_chunks_before",
        lsh_after="lsh_num_chunks_after",
        local_chunk="local_attn_chunk_length",
        local_before="local_num_chunks_before",
        local_after="local_num_chunks_after",
        pad_token="pad_token_id",
    )
    fields.setdefault("num_buckets", None)
    if "num_hidden_layers" in config.entries:
        config.expect(num_hidden_layers=len(fields["attention"]))
    fields["position"] = "axial" if config.take("axial_pos_embds", True) else "absolute"
    config.ignore("hidden_dropout_prob", "lsh_attention_probs_dropout_prob", "hash_seed",
                  "local_attention_probs_dropout_prob", "rotations", "chunk_size_lm_head",
                  "axial_norm_std", "tie_word_embeddings", *BOOKKEEPING)  # fmt: skip
    named = re.search(r"Reformer(\w+)", case.source)
    if named[1] not in HEADS:
        raise golden.Unsupported(f"the zoo's Reformer has no {named[1]}")
    head = HEADS[named[1]]
    classes = case.shapes.get("classifier.out_proj.weight", (2,))[0]
    model = zoo.info("reformer_test").create(
        **{"head_dim": 64, "lsh_chunk": 64, "local_chunk": 64, "num_hashes": 1,
           "axial_dims": (64, 192), **fields},
        head=head, num_classes=classes,
    )  # fmt: skip
    given = inputs(case, tokens="input_ids", mask="attention_mask", positions="position_ids")
    shape = model.rotation_shape(given["tokens"].shape[1])
    count = sum(kind == "lsh" for kind in model.attention)
    given["rotations"] = [fill.uniform(f"rot/{i}", shape) for i in range(count)]
    run = jax.jit(lambda v, x: model.apply(v, **x, method="features"))

    def outputs(variables: dict) -> golden.Outputs:
        out = dict(run(variables, given))
        if head == "question_answering":
            out |= {
                f"{end}_logits": out["logits"][..., i] for i, end in enumerate(("start", "end"))
            }
        if "mask" in given:
            keep = given["mask"] != 0
            out |= {
                f"{name}_masked": np.where(keep[..., None] if x.ndim == 3 else keep, x, 0)
                for name, x in out.items()
                if x.shape[:2] == keep.shape
            }
        return out

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names transformers' class."""
    return re.search(r"transformers \S+ Reformer(Model|For)", case.source) is not None
