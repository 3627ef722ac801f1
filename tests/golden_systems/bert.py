"""Hugging Face's BERT and its heads."""

import re
from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np

import zoo

# For training, generation and bookkeeping.
BOOKKEEPING = """
        _attn_implementation _attn_implementation_autoset _name_or_path add_pooling_layer
        architectures attention_probs_dropout_prob attn_implementation bad_words_ids
        begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout cls
        cross_attention_hidden_size decoder_start_token_id directionality diversity_penalty
        do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
        exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
        gradient_checkpointing hidden_dropout_prob id2label initializer_range label2id
        length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups
        num_beams num_labels num_return_sequences output_attentions output_hidden_states
        output_scores pad_token_id pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
        pooler_size_per_head pooler_type prefix problem_type remove_invalid_values
        repetition_penalty return_dict return_dict_in_generate sentences sep_token_id
        suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
        tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
        use_bfloat16 use_cache""".split()


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """Hugging Face's BERT and its heads; the heads are those whose tensors are there."""
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
        causal="is_decoder",
        cross_attention="add_cross_attention",
    )
    fields["position_type"] = config.take("position_embedding_type") or "absolute"
    config.expect(is_encoder_decoder=False, tie_word_embeddings=True,
                  pruned_heads=({}, None),
                  pooling=("masked mean over last_hidden_state, then L2 normalise",
                           None))  # fmt: skip
    # The heads are told by their tensors.
    config.ignore(*BOOKKEEPING)
    names = {name.removeprefix("bert.") for name in case.shapes}
    pooler = "pooler.dense.weight" in names
    classifies = "classification" if pooler else "token_classes"
    words, pairs = "cls.predictions.bias" in names, "cls.seq_relationship.weight" in names
    head = next(
        (
            head
            for head, there in (
                ("pretraining", words and pairs),
                ("masked_lm", words),
                ("next_sentence", pairs),
                (classifies, "classifier.weight" in names),
                ("span", "qa_outputs.weight" in names),
            )
            if there
        ),
        None,
    )
    for name, tied in (
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    ):
        case.filled_as |= {name: tied} if tied in names else {}
    classes = case.shapes.get("classifier.weight", (2,))[0]
    model = zoo.info("bert_test").create(**fields, head=head, num_classes=classes, pooler=pooler)
    return model, run(case, model)


def run(case: golden.Case, model: Any) -> Callable[[dict], golden.Outputs]:
    """Everything that the model gives of the inputs of the case, by the names of references."""
    head = model.head
    inputs = {
        ours: case.input(theirs)
        for ours, theirs in (
            ("tokens", "input_ids"),
            ("token_types", "token_type_ids"),
            ("mask", "attention_mask"),
            ("positions", "position_ids"),
        )
        if theirs in case.names
    }
    choices = inputs["tokens"].shape[:-1]  # two axes where each row has several texts
    inputs = {name: x.reshape(-1, x.shape[-1]).astype(np.int32) for name, x in inputs.items()}
    for ours, theirs in (
        ("memory", "encoder_hidden_states"),
        ("memory_mask", "encoder_attention_mask"),
    ):
        if theirs in case.names:
            inputs[ours] = case.input(theirs)
    check_lengths(case, inputs)
    call = jax.jit(lambda v, x: model.apply(v, **x, method="features"))

    def outputs(variables: dict) -> golden.Outputs:
        from zoo.models.language.bert import mean_pool, unit_length

        out = call(variables, inputs)
        hidden = out["last_hidden_state"]
        keep = np.asarray(inputs.get("mask", np.ones(hidden.shape[:2]))) != 0
        embeddings = unit_length(mean_pool(hidden, keep))
        heads = out["logits"] if head == "pretraining" else (out["logits"],)
        heads = heads if len(choices) == 1 else (heads[0].reshape(choices),)
        span = {"start_logits": heads[0][..., 0], "end_logits": heads[0][..., 1]}
        named = (
            {f"hidden_states_{i + 1}": out[f"layer{i}"] for i in range(model.depth)}
            | ({"pooler_output": out["pooled"]} if "pooled" in out else {})
            | (span if head == "span" else {})
            | dict(zip(("prediction_logits", "seq_relationship_logits"), heads, strict=False))
            | {
                "hidden_states_0": out["embeddings"],
                "logits": heads[0],
                "last_hidden_state": hidden,
                "packed_hidden": hidden[keep],
                "embeddings": embeddings,
                "pair_cosine": np.sum(embeddings[::2] * embeddings[1::2], -1)
                if len(embeddings) % 2 == 0
                else np.zeros(0),
            }
        )
        return named | golden.masked(named, keep)

    return outputs


def check_lengths(case: golden.Case, inputs: dict[str, np.ndarray]) -> None:
    """The reference's offsets of packed examples, if it has them, have to be those of the mask."""
    if "cu_seqlens" not in case.names:
        return
    rows, length = inputs["tokens"].shape
    lengths = inputs["mask"].sum(1) if "mask" in inputs else np.full(rows, length)
    if case.input("cu_seqlens").tolist() != [0, *np.cumsum(lengths).tolist()]:
        raise golden.Unsupported("its cu_seqlens are not the running sums of its attention_mask")


def made_by(case: golden.Case) -> bool:
    return re.search(r"transformers \S+ Bert(Model|For|LMHead)", case.source) is not None
