"""ALBERT and DistilBERT: BERT with shared layers and narrow embeddings, and BERT at half its depth.

Lan et al., "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations", ICLR
2020, arXiv 1909.11942 (github.com/google-research/albert, Apache-2.0). Sanh et al., "DistilBERT, a
distilled version of BERT", arXiv 1910.01108 (Apache-2.0). Both are `zoo.models.language.bert.Bert`
with other fields, under the names of Hugging Face's transformers, which we follow.

    ALBERT        x = W LN(E_word + E_position + E_type) + b       E of width 128
                  the layers of a group share one set of weights; tanh-GELU
                  masked words: E_word LN(gelu(W x + b)) + c       of width 128, too
                  scores by distance (`position_type`) are not scaled
    DistilBERT    no segments; no pooler, but heads for whole texts read relu(W x[first] + b)

    features             albert_base_v2
    embeddings           128  128    for 128 tokens
    layer0               128  768    up to layer11
    last_hidden_state    128  768
    pooled                    768
    logits               128  768
"""

from functools import partial
from typing import Any

import numpy as np

from zoo.checkpoints.rules import Rule, Rules, dense_rules, norm_rules, tied
from zoo.models.language.bert import Bert
from zoo.system import File, System, Variant


class Albert(Bert):
    """ALBERT; fields as in `Bert`."""

    word_dim: int | None = 128
    groups: int = 1
    relative_scaled: bool = False
    activation: str = "gelu_new"
    dropout: float = 0.0
    attention_dropout: float = 0.0


class DistilBert(Bert):
    """DistilBERT; fields as in `Bert`."""

    depth: int = 6
    num_token_types: int = 0
    pooler: bool = False
    pooler_activation: str = "relu"


# ---------------------------------------------------------------------------- checkpoints


def _positions(model: Bert) -> np.ndarray:
    return np.arange(model.max_positions)[None]


def _embeddings(prefix: str) -> list[Rule]:
    names = f"{prefix}embeddings"
    return [
        Rule(f"{names}.word_embeddings.weight", "embed/embedding"),
        Rule(f"{names}.position_embeddings.weight", "position_embedding"),
        Rule(f"{names}.position_embeddings.weight", "unused_position_embedding"),
        Rule(f"{names}.token_type_embeddings.weight", "token_type_embedding"),
        *norm_rules(f"{names}.LayerNorm", "embed_norm"),
    ]


def _layers(theirs: str, names: dict[str, str], ours: str = "layers_{i}") -> list[Rule]:
    """Rules of layers that call their parts so; what has `norm` in our name is one."""
    distances = f"{theirs}.attention.distance_embedding.weight"
    return [
        Rule(distances, f"{ours}/relative/distance_embedding"),
        *(
            rule
            for a, b in names.items()
            for rule in (norm_rules if "norm" in b else dense_rules)(f"{theirs}.{a}", f"{ours}/{b}")
        ),
    ]


_ALBERT = {
    "attention.query": "attention/query",
    "attention.key": "attention/key",
    "attention.value": "attention/value",
    "attention.dense": "attention/out",
    "attention.LayerNorm": "norm1",
    "ffn": "mlp/up",
    "ffn_output": "mlp/down",
    "full_layer_layer_norm": "norm2",
}
_INNER = 4  # layers of a set of weights that the rules know; published files have one
_DISTILBERT = {
    "attention.q_lin": "attention/query",
    "attention.k_lin": "attention/key",
    "attention.v_lin": "attention/value",
    "attention.out_lin": "attention/out",
    "sa_layer_norm": "norm1",
    "ffn.lin1": "mlp/up",
    "ffn.lin2": "mlp/down",
    "output_layer_norm": "norm2",
}


def _rules(prefix: str, layers: list[Rule], heads: list[Rule], repeats: tuple, ids: bool) -> Rules:
    """Rules of one naming; `repeats`: the decoder's names of the embedding and its bias."""
    words, (copy, bias, bias_copy) = f"{prefix}embeddings.word_embeddings.weight", repeats
    both = [Rule((words, copy), "embed/embedding", tied)] if copy else []
    if bias_copy:
        both.append(Rule((bias, bias_copy), "predictions/bias", tied))
    return Rules(
        [*both, Rule(bias, "predictions/bias"), *_embeddings(prefix), *layers, *heads],
        derived={f"{prefix}embeddings.position_ids": _positions if ids else None},
        unused=("predictions.*", "sop_classifier.*", "vocab_*", "classifier.*", "pre_classifier.*",
                "qa_outputs.*", f"{prefix}pooler.*"),
        fresh=("head/*", "span/*", "predictions/*", "next_sentence/*", "pooler/*"),
    )  # fmt: skip


_HEADS = [*dense_rules("classifier", "head"), *dense_rules("qa_outputs", "span")]


def _albert(prefix: str, repeated: bool = False, ids: bool = False) -> Rules:
    encoder, group = f"{prefix}encoder", "albert_layer_groups.{i}.albert_layers"
    return _rules(
        prefix,
        [
            *dense_rules(f"{encoder}.embedding_hidden_mapping_in", "embed_map"),
            *_layers(f"{encoder}.{group}.0", _ALBERT),
            *(
                rule
                for j in range(1, _INNER)
                for rule in _layers(f"{encoder}.{group}.{j}", _ALBERT, f"layers_{{i}}_inner_{j}")
            ),
            *dense_rules(f"{prefix}pooler", "pooler"),
        ],
        [
            *dense_rules("predictions.dense", "predictions/transform"),
            *norm_rules("predictions.LayerNorm", "predictions/norm"),
            *dense_rules("sop_classifier.classifier", "next_sentence"),
            *_HEADS,
        ],
        (
            "predictions.decoder.weight" if repeated else None,
            "predictions.bias",
            "predictions.decoder.bias" if repeated else None,
        ),
        ids,
    )


def _distilbert(prefix: str, repeated: bool = False) -> Rules:
    return _rules(
        prefix,
        _layers(f"{prefix}transformer.layer.{{i}}", _DISTILBERT),
        [
            *dense_rules("vocab_transform", "predictions/transform"),
            *norm_rules("vocab_layer_norm", "predictions/norm"),
            *dense_rules("pre_classifier", "pooler"),
            *_HEADS,
        ],
        ("vocab_projector.weight" if repeated else None, "vocab_projector.bias", None),
        False,
    )


LAYOUTS = {
    "albert": _albert(""),
    "albert_heads": _albert("albert."),
    "albert_heads_torch": _albert("albert.", repeated=True),
    "albert_v3": _albert("", ids=True),
    "albert_v3_heads": _albert("albert.", repeated=True, ids=True),
    "distilbert": _distilbert(""),
    "distilbert_heads": _distilbert("distilbert."),
    "distilbert_heads_torch": _distilbert("distilbert.", repeated=True),
}

# ------------------------------------------------------------------------------- variants


def _variant(module: type[Bert], paper: str, params: int | None = None, **fields: Any) -> Variant:
    task = "masked_language_modelling" if fields.get("head") == "masked_lm" else "text_encoding"
    return Variant(
        module=module,
        fields=fields,
        task=task,
        params=params,
        paper=paper,
        code="github.com/huggingface/transformers",
        licence="Apache-2.0",
        files=(File("model.safetensors"),) if params else (),
    )


_lite = partial(_variant, Albert, "ALBERT, arXiv 1909.11942", vocab_size=30000)
_distilled = partial(_variant, DistilBert, "DistilBERT, arXiv 1910.01108")

VARIANTS = {
    "albert_base_v2": _lite(11_683_584),
    "albert_large_v2": _lite(
        17_683_968, embed_dim=1024, depth=24, num_heads=16, mlp_dim=4096
    ),
    "distilbert_base_uncased": _distilled(66_362_880),
    "distilbert_base_uncased_mlm": _distilled(66_985_530, head="masked_lm"),
    "albert_test": _variant(
        Albert, "ALBERT, arXiv 1909.11942", vocab_size=97, word_dim=16, embed_dim=32, depth=2,
        num_heads=4, mlp_dim=64, max_positions=64,
    ),
}  # fmt: skip

SYSTEM = System(variants=VARIANTS, layouts=LAYOUTS)
