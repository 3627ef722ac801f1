"""What forecasters that grew out of Informer's code share: entries of their argument parsers."""

from typing import Any

import golden
import jax
import numpy as np

from zoo.layers.mlp import gelu

NAMES = {
    "context_length": ("seq_len", "context_length", "input_len"),
    "label_length": ("label_len", "label_length"),
    "horizon": ("pred_len", "out_len", "horizon"),
    "embed_dim": ("d_model",),
    "num_heads": ("n_heads", "num_heads"),
    "depth": ("e_layers",),
    "decoder_depth": ("d_layers",),
    "mlp_dim": ("d_ff",),
    "factor": ("factor",),
    "moving_average": ("moving_avg", "kernel_size"),
    "patch_length": ("patch_len", "patch_size"),
    "stride": ("stride",),
}
"""Our field -> their names of it."""

# Training, files and data, and what those models read into an attribute and never use.
UNUSED = """
    activation_dropout attention_dropout batch_size bucket_size channel_independence checkpoints
    class_strategy cols data data_path des devices do_predict dropout efficient_training
    embed_type exp_name features freq gpu inverse is_training itr learning_rate loss lradj
    min_topk_gap model_id n_hashes num_workers output_attention padding partial_start_index
    patience root_path target target_data_path target_root_path train_epochs use_amp use_gpu
    use_multi_gpu
""".split()


def take(config: golden.Config, *ours: str) -> dict[str, Any]:
    """Those of our fields that the configuration gives, under any of their names."""
    return {
        field: config.take(name)
        for field in ours
        for name in NAMES[field]
        if name in config.entries and config.entries[name] is not None
    }


def activation(config: golden.Config) -> Any:
    """ReLU if it says so, else the exact GELU: that is what the official blocks do."""
    return jax.nn.relu if config.take("activation", "gelu") == "relu" else gelu


def time_features(case: golden.Case, name: str = "x_mark_enc") -> np.ndarray | None:
    """Those of an input, if it has any."""
    return case.input(name) if name in case.names else None


def variates(case: golden.Case) -> dict[str, int]:
    """How many series there are: an entry, or what the input has."""
    named = ("n_variates", "enc_in", "c_out", "dec_in")
    found = {n: case.config.take(n) for n in named if case.config.entries.get(n) is not None}
    shape = case.input("x_enc").shape
    return {"variates": found.get("enc_in", found.get("n_variates", shape[-1]))}


# Informer's tables hold a quarter of an hour only where `freq` is minutes.
_TABLES = {"t": 5}


def dated_fields(case: golden.Case) -> dict[str, Any]:
    """Fields of models whose tokens are steps, from what their repositories share."""
    config = case.config
    config.ignore(*UNUSED)
    config.expect(embed=("timeF", "fixed", "learned"))
    embed, freq = config.entries.get("embed", "timeF"), config.take("freq", "h")
    features, count = time_features(case), 0
    if features is not None:
        count = features.shape[-1] if embed == "timeF" else _TABLES.get(freq, 4)
    named = ("context_length", "label_length", "horizon", "embed_dim", "num_heads", "depth",
             "decoder_depth", "mlp_dim", "factor")  # fmt: skip
    series, read = config.take("enc_in"), config.take("c_out")
    config.expect(dec_in=(series, None))
    return {
        **take(config, *named),
        **variates(case),
        "outputs": None if read == series else read,
        "activation": activation(config),
        "time_embedding": "features" if embed == "timeF" else embed,
        "time_features": count,
    }


def dates(case: golden.Case, model: Any) -> list[np.ndarray | None]:
    """Time features of what encoder and decoder see, as the model takes them."""
    found = [time_features(case, name) for name in ("x_mark_enc", "x_mark_dec")]
    if model.time_embedding == "features":
        return found
    return [x if x is None else x[..., : model.time_features].astype("int32") for x in found]
