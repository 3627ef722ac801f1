"""The sentence encoder of lsj2408/URPE."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np
from golden_systems._inputs import inputs

import zoo


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The encoder, and the buckets of relative positions that it uses."""
    config = case.config
    # What the official class takes where it is not told.
    fields = dict(depth=6, embed_dim=768, mlp_dim=3072, num_heads=8, max_length=256, num_segments=2,
                  use_positions=True, embed_norm=False, activation="relu", unique=False,
                  factor_unique=False)  # fmt: skip
    fields |= config.rename(
        vocab_size="vocab_size",
        depth="num_encoder_layers",
        embed_dim="embedding_dim",
        mlp_dim="ffn_embedding_dim",
        num_heads="num_attention_heads",
        max_length="max_seq_len",
        pad_token="padding_idx",
        num_segments="num_segments",
        use_positions="use_position_embeddings",
        embed_norm="encoder_normalize_before",
        embed_scale="embed_scale",
        activation="activation_fn",
        relative="rel_pos",
        unique="rel_pos_unique",
        buckets="rp_bucket",
        max_distance="max_rp",
        universal="ur_attn",
        factor_unique="ur_attn_unique",
        factor_buckets="ur_rp_bucket",
        factor_max_distance="ur_max_rp",
    )
    fields["activation"] = {"gelu_fast": "gelu_new", "gelu_accurate": "gelu_new"}.get(
        fields["activation"], fields["activation"]
    )
    config.expect(offset_positions_by_padding=True, learned_pos_embedding=True)
    config.ignore("dropout", "attention_dropout", "activation_dropout", "layerdrop", "q_noise",
                  "apply_bert_init", "freeze_embeddings", "n_trans_layers_to_freeze", "export",
                  "traceable", "qn_block_size", "last_state_only")  # fmt: skip
    head = "language_model" if "encoder.lm_head.bias" in case.shapes else None
    if head:
        case.filled_as["encoder.sentence_encoder.embed_tokens.weight"] = "encoder.lm_head.weight"
    model = zoo.info("urpe_test").create(**fields, head=head)
    tables = {}
    for name, ours in zip(("rp_bucket", "ur_bucket"), model.bucket_tables(), strict=True):
        if name in case.names:
            given = case.input(name)
            side = len(given)
            if not np.array_equal(ours[:side, :side], given):
                raise golden.Unsupported(f"our {name} differs from the file's")
            tables[name] = None
    given = inputs(
        case,
        tokens=("tokens", "input_ids", "src_tokens"),
        segments=("segment_labels", "segments"),
        positions="positions",
        **{name: name for name in tables},
    )
    given = {name: x for name, x in given.items() if name not in tables}
    run = jax.jit(lambda v, x: model.apply(v, **x, method="features"))

    def outputs(variables: dict) -> golden.Outputs:
        out = dict(run(variables, given))
        hidden = out["last_hidden_state"]
        keep = (given["tokens"] != model.pad_token)[..., None]
        out |= {f"inner_state_{i}": out[f"layer{i - 1}" if i else "embed"]
                for i in range(model.depth + 1)}  # fmt: skip
        out |= {f"{n}_masked": np.where(keep, x, 0) for n, x in out.items() if x.ndim == 3}
        return out | {
            "last_state": hidden,
            "last_state_masked": np.where(keep, hidden, 0),
            "sentence_rep": hidden[:, 0],
        }

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository."""
    return "lsj2408/URPE" in case.source
