"""Hugging Face's ALBERT and DistilBERT and their heads."""

import re
from collections.abc import Callable
from typing import Any

import golden
from golden_systems import bert

from zoo.models.language.albert import Albert, DistilBert


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The encoder and the head whose tensors are there."""
    distilled = "DistilBert" in case.source
    fields = distilbert_fields(case) if distilled else albert_fields(case)
    case.config.ignore(*bert.BOOKKEEPING)
    names = {re.sub(r"^(albert|distilbert)\.", "", name) for name in case.shapes}
    copies = {
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
        "vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight",
    }
    case.filled_as |= {first: copy for copy, first in copies.items() if copy in names}
    pooler = bool(names & {"pooler.weight", "pre_classifier.weight"})
    classifies = "classification" if pooler else "token_classes"
    heads = {
        "predictions.bias": "masked_lm",
        "vocab_projector.bias": "masked_lm",
        "classifier.weight": classifies,
        "qa_outputs.weight": "span",
    }
    head = next((head for tensor, head in heads.items() if tensor in names), None)
    if "sop_classifier.classifier.weight" in names:
        head = "pretraining"
    classes = case.shapes.get("classifier.weight", (2,))[0]
    module = DistilBert if distilled else Albert
    model = module(**fields, head=head, num_classes=classes, pooler=pooler)
    return model, bert.run(case, model)


def albert_fields(case: golden.Case) -> dict[str, Any]:
    """From `AlbertConfig`."""
    config = case.config
    position_type = config.take("position_embedding_type") or "absolute"
    config.expect(tie_word_embeddings=True)
    config.ignore("classifier_dropout_prob", "down_scale_factor", "gap_size", "net_structure_type")
    config.ignore("num_memory_blocks")
    defaults = dict(vocab_size=30000, word_dim=128, embed_dim=4096, depth=12, groups=1,
                    num_heads=64, mlp_dim=16384, position_type=position_type)  # fmt: skip
    return defaults | config.rename(
        vocab_size="vocab_size",
        word_dim="embedding_size",
        embed_dim="hidden_size",
        depth="num_hidden_layers",
        groups="num_hidden_groups",
        inner_layers="inner_group_num",
        num_heads="num_attention_heads",
        mlp_dim="intermediate_size",
        max_positions="max_position_embeddings",
        num_token_types="type_vocab_size",
        activation="hidden_act",
        epsilon="layer_norm_eps",
    )


def distilbert_fields(case: golden.Case) -> dict[str, Any]:
    """From `DistilBertConfig`."""
    config = case.config
    config.expect(tie_word_embeddings=True, tie_weights_=True)
    config.ignore("sinusoidal_pos_embds")  # how the table starts; files hold it either way
    config.ignore("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout")
    return config.rename(
        vocab_size="vocab_size",
        embed_dim="dim",
        depth="n_layers",
        num_heads="n_heads",
        mlp_dim="hidden_dim",
        max_positions="max_position_embeddings",
        activation="activation",
    )


def made_by(case: golden.Case) -> bool:
    """Whether the header names transformers' classes."""
    return re.search(r"transformers \S+ (Albert|DistilBert)(Model|For)", case.source) is not None
