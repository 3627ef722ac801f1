"""What builders share: the inputs of a case by our names, none of them ignored."""

import golden
import numpy as np

BOOKKEEPING = """
    _attn_implementation _attn_implementation_internal _name_or_path add_pooling_layer architectures
    attn_implementation bos_token_id chunk_size_feed_forward classifier_dropout dtype eos_token_id
    finetuning_task gradient_checkpointing id2label initializer_factor initializer_range label2id
    model_type num_labels onnx_export output_attentions output_hidden_states problem_type
    return_dict task_specific_params tokenizer_class torch_dtype torchscript transformers_version
    use_cache
""".split()
"""Entries of transformers' configurations that do not change what is compared."""


def inputs(case: golden.Case, **ours: str | tuple[str, ...]) -> dict[str, np.ndarray]:
    """`{our argument: array}` of those that are there; several names are synonyms.

    Raises:
      golden.Unsupported: if the case has an input that none of the names is.
    """
    found, left = {}, set(case.names)
    for argument, theirs in ours.items():
        for name in (theirs,) if isinstance(theirs, str) else theirs:
            if name in left:
                left.discard(name)
                value = case.input(name)
                integral = value.dtype.kind in "iub"
                found[argument] = value.astype(np.int32) if integral else value
    if left:
        raise golden.Unsupported(
            f"it has inputs {', '.join(sorted(left))}, which the harness does not pass on; teach "
            "tests/golden_systems"
        )
    return found
