"""What stands beside the weights of a Hugging Face folder: settings that shapes cannot show.

`config.json` says how many heads there are, which activation, which scales; `1_Pooling/config.json`
how a sentence's vector is made; `preprocessor_config.json` how images are fed. `read` turns them
into fields of our models, and refuses in a sentence what the model cannot do.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.system import Preprocessing

Config = Mapping[str, Any]
MAX_CONFIG = 16 << 20  # bytes


@dataclass(frozen=True)
class Kind:
    """How one `model_type` becomes a model.

    Attributes:
      base: the variant whose class and remaining fields are taken.
      fields: key of `config.json` -> field. A field that shapes show is in `shown`.
      shown: the same, for what the weights' shapes say as well.
      only: key -> the values that the model can do; any other is refused.
      more: further fields from the whole configuration.
    """

    base: str
    fields: Mapping[str, str] = field(default_factory=dict)
    shown: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, tuple] = field(default_factory=dict)
    more: Callable[[Config], dict[str, Any]] | None = None


def _architecture(config: Config, default: str = "") -> str:
    """The class that was saved (several in one text), or `default` where the folder names none."""
    return " ".join(config.get("architectures") or [default])


def _classes(config: Config, head: str = "ImageClassification") -> int:
    """How many classes a folder's model has: 0 without a head."""
    architecture = _architecture(config)
    if head not in architecture:
        return 0
    labels = config.get("id2label")
    return len(labels) if labels else config.get("num_labels", 2)


def _vit(config: Config) -> dict[str, Any]:
    activation = config.get("hidden_act", "gelu")
    names = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}
    width = config.get("hidden_size", 768)
    fields = {
        "activation": names.get(activation, activation),
        "num_classes": _classes(config),
        "epsilon": config.get("layer_norm_eps", 1e-12),
    }
    if "intermediate_size" in config:
        fields["mlp_ratio"] = config["intermediate_size"] / width
    return fields


def _deit(config: Config) -> dict[str, Any]:
    architecture = _architecture(config)
    return {**_vit(config), "distilled": True, "distilled_head": "WithTeacher" in architecture}


def _dinov2(config: Config) -> dict[str, Any]:
    registers = config.get("num_register_tokens", 0)
    return {
        **_vit(config),
        "epsilon": config.get("layer_norm_eps", 1e-6),
        "mlp_ratio": float(config.get("mlp_ratio", 4)),
        "layer_scale": config.get("layerscale_value", 1.0),
        "num_registers": registers,
        "pool": "token_avg" if _classes(config) else "token",
        "position": "class" if registers else "all",
    }


def _swin(config: Config) -> dict[str, Any]:
    return {"num_classes": _classes(config)}


_BERT_HEADS = {
    "ForMaskedLM": "masked_lm",
    "LMHeadModel": "masked_lm",
    "ForPreTraining": "pretraining",
    "ForNextSentencePrediction": "next_sentence",
    "ForSequenceClassification": "classification",
    "ForMultipleChoice": "classification",
    "ForTokenClassification": "token_classes",
    "ForQuestionAnswering": "span",
}


def _bert(config: Config) -> dict[str, Any]:
    architecture = _architecture(config)
    fields: dict[str, Any] = {}
    for end, head in _BERT_HEADS.items():
        if end in architecture:
            fields["head"] = head
            fields["pooler"] = head in ("pretraining", "next_sentence", "classification")
            if end == "ForMultipleChoice":  # each choice is a text with a score of its own
                fields["num_classes"] = 1
            elif "id2label" in config:
                fields["num_classes"] = len(config["id2label"])
    return fields


def _bert_with_positions(config: Config) -> dict[str, Any]:
    return {**_bert(config), "position_type": config.get("position_embedding_type") or "absolute"}


def _albert(config: Config) -> dict[str, Any]:
    return {**_bert_with_positions(config), "groups": config.get("num_hidden_groups", 1)}


def _longformer(config: Config) -> dict[str, Any]:
    window = config.get("attention_window", 512)
    windows = tuple(window) if isinstance(window, list) else window
    same = isinstance(windows, tuple) and len(set(windows)) == 1
    fields = {"window": windows[0] if same else windows}
    names = {"token_classes": "token_classification", "span": "question_answering"}
    head = _bert(config)
    if "head" in head and "ForMultipleChoice" not in _architecture(config):
        fields |= head | {"head": names.get(head["head"], head["head"]), "pooler": False}
    return fields


def _rope(config: Config) -> dict[str, Any]:
    from zoo.layers import rotary

    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    fields: dict[str, Any] = {}
    theta = said.get("rope_theta", config.get("rope_theta"))
    if theta is not None:
        fields["rope_theta"] = float(theta)
    kind = said.get("rope_type", said.get("type", "default"))
    positions: Any = config.get("max_position_embeddings", 2048)
    makers: dict[str, Callable[[], Any]] = {
        "default": lambda: None,
        "linear": lambda: rotary.Linear(said["factor"]),
        "proportional": lambda: rotary.Proportional(
            said.get("partial_rotary_factor", 1.0), said.get("factor", 1.0)
        ),
        "dynamic": lambda: rotary.Dynamic(said["factor"], positions),
        "llama3": lambda: rotary.Llama3(
            said["factor"],
            said["low_freq_factor"],
            said["high_freq_factor"],
            said["original_max_position_embeddings"],
        ),
        "yarn": lambda: rotary.Yarn(
            said["factor"],
            said.get("original_max_position_embeddings", positions),
            said.get("beta_fast") or 32.0,
            said.get("beta_slow") or 1.0,
            said.get("attention_factor"),
            said.get("truncate", True),
        ),
    }
    if kind not in makers:
        raise ValueError(f"config.json asks for rope type {kind!r}; known are {', '.join(makers)}.")
    return {**fields, "rope_scaling": makers[kind]()}


def _llama(config: Config) -> dict[str, Any]:
    fields = _rope(config)
    bias = config.get("attention_bias", False)
    fields |= {"qkv_bias": bias, "out_bias": bias, "mlp_bias": config.get("mlp_bias", False)}
    return fields | _without_head(config)


def _without_head(config: Config) -> dict[str, Any]:
    """A trunk, or a classifier, has no matrix of logits: the embedding is in its place."""
    architecture = _architecture(config)
    classes = _classes(config, "ForSequenceClassification")
    if classes:
        return {"tie_embeddings": True, "num_classes": classes}
    return {"tie_embeddings": True} if architecture and "ForCausalLM" not in architecture else {}


def _mistral(config: Config) -> dict[str, Any]:
    return {**_llama(config), "window": config.get("sliding_window")}


def _qwen2(config: Config) -> dict[str, Any]:
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    return {**_llama(config), "qkv_bias": True, "out_bias": False, "window": window}


def _opt(config: Config) -> dict[str, Any]:
    width, word = config.get("hidden_size", 768), config.get("word_embed_proj_dim")
    before = config.get("do_layer_norm_before", True)
    return {
        "pre_norm": before,
        "final_norm": before and not config.get("_remove_final_layer_norm", False),
        "word_dim": word if word != width else None,
        "norm_affine": config.get("layer_norm_elementwise_affine", True),
        "use_bias": config.get("enable_bias", True),
        "num_classes": _classes(config, "ForSequenceClassification"),
    }


def _gpt2(config: Config) -> dict[str, Any]:
    return {"num_classes": _classes(config, "ForSequenceClassification")}


def _mamba2(config: Config) -> dict[str, Any]:
    limit = config.get("time_step_limit")
    fields = {"dt_limit": tuple(map(float, limit))} if limit else {}
    return fields | _without_head(config)


def _dinat(config: Config) -> dict[str, Any]:
    dilations = config.get("dilations")  # NAT's folders have none
    return {
        "num_classes": _classes(config),
        "dilations": tuple(map(tuple, dilations)) if dilations else None,
        "layer_scale": config.get("layer_scale_init_value") or None,
    }


def _graphormer(config: Config) -> dict[str, Any]:
    """Its collator compares distances from 1 on with the limit, the authors' from 0 on."""
    return {"max_distance": config.get("spatial_pos_max", 1024) - 1, "masked_pooler": False}


_REFORMER_HEADS = {
    "ForSequenceClassification": "classification",
    "ForQuestionAnswering": "question_answering",
    "ForMaskedLM": "language_model",
    "ModelWithLMHead": "language_model",
}


def _reformer(config: Config) -> dict[str, Any]:
    head = _head(config, _REFORMER_HEADS, "ReformerModelWithLMHead")
    buckets = config.get("num_buckets")
    fields = {
        "head": head,
        "num_buckets": tuple(buckets) if isinstance(buckets, list) else buckets,
        "position": "axial" if config.get("axial_pos_embds", True) else "absolute",
        "causal": config.get("is_decoder", False),
    }
    if head == "classification":
        fields["num_classes"] = len(config.get("id2label") or (0, 1))
    return fields


def _head(config: Config, heads: dict[str, str], default: str) -> str | None:
    """The head of the class that was saved, by the end of its name; None: a trunk."""
    saved = _architecture(config, default)
    return next((head for end, head in heads.items() if end in saved), None)


_PATCHTST = "PatchTSTForPrediction"
_PATCHTST_HEADS = {
    "ForPrediction": "forecast",
    "ForPretraining": "patches",
    "ForClassification": "classes",
    "ForRegression": "numbers",
}


def _patchtst(config: Config) -> dict[str, Any]:
    head = _head(config, _PATCHTST_HEADS, _PATCHTST) or "none"
    if head in ("forecast", "numbers") and config.get("loss", "mse") != "mse":
        raise ValueError(
            f"config.json says loss={config['loss']!r}: this {_architecture(config, _PATCHTST)} "
            f"gives a distribution ({config.get('distribution_output', 'student_t')}), and the "
            "zoo's PatchTST gives numbers. Run it with transformers, or bring one that was trained "
            "with loss='mse'."
        )
    scaling = config.get("scaling", "std")
    reach = config.get("output_range")
    return {
        "head": head,
        "num_classes": config.get("num_targets", 1) if head in ("classes", "numbers") else 0,
        "number_range": tuple(map(float, reach)) if reach and head == "numbers" else None,
        "norm": "layer" if config.get("norm_type") == "layernorm" else "batch",
        "learned_positions": config.get("positional_encoding_type") == "random",
        "scaling": "mean" if scaling is True else scaling or "none",
        "pooling": config.get("pooling_type", "mean") or "none",
        "individual_embedding": not config.get("share_embedding", True),
        "activation": config.get("activation_function", "gelu"),
        "epsilon": config.get("norm_eps", 1e-5),
        "pre_norm": config.get("pre_norm", True),
        "variate_attention": config.get("channel_attention", False),
        "class_token": config.get("use_cls_token", False),
        "mlp_bias": config.get("bias", True),
        "mask_value": float(config.get("mask_value", 0)),
        "num_heads": config.get("num_attention_heads", 4),
    }


_TRANSFORMER = {"num_attention_heads": "num_heads"}
_WIDE = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "intermediate_size": "mlp_dim",
}
_IMAGE = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "in_channels",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
}
_BERT_FIELDS = {**_TRANSFORMER, "hidden_act": "activation", "layer_norm_eps": "epsilon"}
_BERT_SHOWN = {
    **_WIDE,
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "num_token_types",
}
_ENCODER = {"is_decoder": (False, None)}
_LLAMA_FIELDS = {
    **_TRANSFORMER,
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "hidden_act": "activation",
    "rms_norm_eps": "epsilon",
    "tie_word_embeddings": "tie_embeddings",
}
_VIT = Kind("vit_base_patch16_224", {**_TRANSFORMER, "qkv_bias": "qkv_bias"}, _IMAGE, more=_vit)

KINDS: dict[str, Kind] = {
    "vit": _VIT,
    "vit_mae": _VIT,
    "deit": Kind("deit_base_patch16_224", _VIT.fields, _IMAGE, more=_deit),
    "dinov2": Kind(
        "vit_base_patch16_224", _VIT.fields, _IMAGE, {"use_swiglu_ffn": (False, None)}, _dinov2
    ),
    "dinov2_with_registers": Kind(
        "vit_base_patch16_224", _VIT.fields, _IMAGE, {"use_swiglu_ffn": (False, None)}, _dinov2
    ),
    "swin": Kind(
        "swin_tiny_patch4_window7_224",
        {
            "num_heads": "num_heads",
            "qkv_bias": "qkv_bias",
            "use_absolute_embeddings": "absolute_position",
        },
        {
            "image_size": "image_size",
            "patch_size": "patch_size",
            "num_channels": "in_channels",
            "embed_dim": "embed_dim",
            "depths": "depths",
            "window_size": "window_size",
            "mlp_ratio": "mlp_ratio",
        },
        {"hidden_act": ("gelu", None), "layer_norm_eps": (1e-5, None)},
        _swin,
    ),
    **dict.fromkeys(
        ("dinat", "nat"),
        Kind(
            "dinat_mini",
            {"kernel_size": "kernel_size"},
            {
                "num_channels": "in_channels",
                "embed_dim": "embed_dim",
                "depths": "depths",
                "num_heads": "num_heads",
                "mlp_ratio": "mlp_ratio",
                "qkv_bias": "qkv_bias",
            },
            {"hidden_act": ("gelu",), "layer_norm_eps": (1e-5,), "patch_size": (4, [4, 4])},
            _dinat,
        ),
    ),
    "graphormer": Kind(
        "graphormer_base",
        {
            **_TRANSFORMER,
            "activation_fn": "activation",
            "edge_type": "edge_type",
            "multi_hop_max_dist": "max_hops",
        },
        {
            "num_atoms": "num_nodes",
            "num_in_degree": "num_in_degree",
            "num_out_degree": "num_out_degree",
            "num_edges": "num_edges",
            "num_spatial": "num_spatial",
            "num_edge_dis": "num_edge_dis",
            "num_hidden_layers": "depth",
            "embedding_dim": "embed_dim",
            "ffn_embedding_dim": "mlp_dim",
            "pre_layernorm": "pre_norm",
            "num_classes": "num_classes",
        },
        {
            "embed_scale": (1.0,),
            "encoder_normalize_before": (True,),
            "share_input_output_embed": (False,),
        },
        _graphormer,
    ),
    "decision_transformer": Kind(
        "decision_transformer_hopper",
        {
            "n_head": "num_heads",
            "activation_function": "activation",
            "action_tanh": "action_tanh",
        },
        {
            "state_dim": "state_dim",
            "act_dim": "action_dim",
            "hidden_size": "embed_dim",
            "n_layer": "depth",
            "max_ep_len": "max_steps",
            "n_inner": "mlp_dim",
        },
        {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "layer_norm_epsilon": (1e-5,),
        },
    ),
    "bert": Kind("bert_base_uncased", _BERT_FIELDS, _BERT_SHOWN, _ENCODER, _bert_with_positions),
    "albert": Kind(
        "albert_base_v2",
        _BERT_FIELDS,
        {**_BERT_SHOWN, "embedding_size": "word_dim"},
        {"inner_group_num": (1, None)},
        _albert,
    ),
    "distilbert": Kind(
        "distilbert_base_uncased",
        {"n_heads": "num_heads", "activation": "activation"},
        {
            "vocab_size": "vocab_size",
            "dim": "embed_dim",
            "n_layers": "depth",
            "hidden_dim": "mlp_dim",
            "max_position_embeddings": "max_positions",
        },
        more=_bert,
    ),
    "gpt2": Kind(
        "gpt2",
        {
            "n_head": "num_heads",
            "activation_function": "activation",
            "layer_norm_epsilon": "epsilon",
            "scale_attn_weights": "scale_attention",
            "scale_attn_by_inverse_layer_idx": "scale_by_layer",
            "tie_word_embeddings": "tie_embeddings",
            "add_cross_attention": "cross_attention",
        },
        {
            "vocab_size": "vocab_size",
            "n_embd": "embed_dim",
            "n_layer": "depth",
            "n_positions": "max_positions",
            "n_inner": "mlp_dim",
        },
        more=_gpt2,
    ),
    "llama": Kind("llama2_7b", _LLAMA_FIELDS, _WIDE, {}, _llama),
    "mistral": Kind("mistral_7b", _LLAMA_FIELDS, _WIDE, {}, _mistral),
    "qwen2": Kind("llama2_7b", _LLAMA_FIELDS, _WIDE, {}, _qwen2),
    "opt": Kind(
        "opt_125m",
        {**_TRANSFORMER, "activation_function": "activation"},
        {
            "vocab_size": "vocab_size",
            "hidden_size": "embed_dim",
            "num_hidden_layers": "depth",
            "ffn_dim": "mlp_dim",
            "max_position_embeddings": "max_positions",
        },
        {},
        _opt,
    ),
    "mamba2": Kind(
        "mamba2_130m",
        {
            "head_dim": "head_dim",
            "n_groups": "groups",
            "hidden_act": "activation",
            "layer_norm_epsilon": "epsilon",
        },
        {
            "vocab_size": "vocab_size",
            "hidden_size": "embed_dim",
            "num_hidden_layers": "depth",
            "state_size": "state_size",
            "conv_kernel": "conv_size",
            "expand": "expand",
            "use_bias": "use_bias",
            "use_conv_bias": "conv_bias",
            "tie_word_embeddings": "tie_embeddings",
        },
        {},
        _mamba2,
    ),
    "reformer": Kind(
        "reformer_crime_and_punishment",
        {
            **_TRANSFORMER,
            "attention_head_size": "head_dim",
            "hidden_act": "activation",
            "layer_norm_eps": "epsilon",
            "num_hashes": "num_hashes",
            "lsh_attn_chunk_length": "lsh_chunk",
            "lsh_num_chunks_before": "lsh_before",
            "lsh_num_chunks_after": "lsh_after",
            "local_attn_chunk_length": "local_chunk",
            "local_num_chunks_before": "local_before",
            "local_num_chunks_after": "local_after",
            "pad_token_id": "pad_token",
        },
        {
            "vocab_size": "vocab_size",
            "hidden_size": "embed_dim",
            "attn_layers": "attention",
            "feed_forward_size": "mlp_dim",
            "axial_pos_shape": "axial_shape",
            "axial_pos_embds_dim": "axial_dims",
            "max_position_embeddings": "max_positions",
        },
        {},
        _reformer,
    ),
    "patchtst": Kind(
        "transformers_patchtst_512_96",
        {},
        {
            "num_input_channels": "variates",
            "context_length": "context_length",
            "prediction_length": "horizon",
            "patch_length": "patch_length",
            "patch_stride": "stride",
            "num_hidden_layers": "depth",
            "d_model": "embed_dim",
            "ffn_dim": "mlp_dim",
        },
        {"share_projection": (True,)},
        _patchtst,
    ),
    "longformer": Kind("longformer_base_4096", _BERT_FIELDS, _BERT_SHOWN, {}, _longformer),
}
"""`model_type` -> how it becomes a model."""

_PROBABILISTIC = (
    "config.json says model_type={kind!r}: this model of transformers draws a forecast from a "
    "distribution, given values at set lags, static features and ages; {ours}. Run it with "
    "transformers."
)
_OURS = (
    "the zoo's {name} is that of {code}, which forecasts numbers (its files load, and "
    "configs/timeseries/{config}.py trains it)"
)
REFUSED: dict[str, str] = {
    "informer": _OURS.format(
        name="Informer", code="github.com/zhouhaoyi/Informer2020", config="informer"
    ),
    "autoformer": _OURS.format(
        name="Autoformer", code="github.com/thuml/Autoformer", config="autoformer"
    ),
    "time_series_transformer": "the zoo's forecasters (zoo list --task forecasting) give numbers",
}
"""`model_type` of another model than the one of that name here -> what is here."""

_SHOWN = {"num_classes", "mlp_ratio", "distilled", "distilled_head", "num_registers", "word_dim"}
_SHOWN |= {"qkv_bias", "out_bias", "mlp_bias", "use_bias", "groups", "head", "pooler"}
_SHOWN |= {"layer_scale", "norm_affine", "masked_pooler", "class_token", "individual_embedding"}
_SHOWN |= {"variate_attention"}


@dataclass(frozen=True)
class Beside:
    """What a folder says of its model.

    Attributes:
      base: the variant to begin with.
      hidden: fields that shapes do not show.
      shown: fields that they do.
      preprocessing: of images, if the folder says it.
      notes: sentences for the person who loads it.
      architecture: the class of transformers that was saved, if the folder says it.
      classes: their names, by number.
      stops: tokens that end a text.
      model_type: the kind of model, as the folder says it.
    """

    base: str | None = None
    hidden: Mapping[str, Any] = field(default_factory=dict)
    shown: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    notes: tuple[str, ...] = ()
    architecture: str = ""
    classes: tuple[str, ...] = ()
    stops: tuple[int, ...] = ()
    model_type: str = ""


def read(source: str | os.PathLike) -> Beside:
    """What stands in `config.json` and its kin in a folder, or beside a file.

    Raises:
      ValueError: for settings that the model cannot do, in a sentence.
    """
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    config = _json(folder / "config.json") or _json(folder / "0_Transformer" / "config.json")
    if not _is_beside(path, folder):
        return Beside()
    preprocessing = _preprocessing(_json(folder / "preprocessor_config.json"))
    pooling, notes = _pooling(folder)
    hidden: dict[str, Any] = {"pooling": pooling} if pooling else {}
    shown: dict[str, Any] = {"head": "sentence", "pooler": False} if pooling else {}
    config = config if isinstance(config, dict) else {}
    if "architecture" in config and "model_type" not in config:  # a folder of timm
        shown |= {k: config[k] for k in ("num_classes",) if k in config}
        said = config.get("pretrained_cfg") or {}
        if "mean" in said and "std" in said:
            preprocessing = Preprocessing(
                tuple(said["mean"]),
                tuple(said["std"]),
                said.get("crop_pct") or 1.0,
                said.get("interpolation", "bicubic"),
            )
        return Beside(config["architecture"], hidden, shown, preprocessing, notes)
    model_type = config.get("model_type", "")
    if model_type in REFUSED:
        raise ValueError(_PROBABILISTIC.format(kind=model_type, ours=REFUSED[model_type]))
    kind = KINDS.get(model_type)
    if kind is None:
        return Beside(None, hidden, shown, preprocessing, notes, model_type=str(model_type))
    for key, values in kind.only.items():
        if config.get(key) not in (*values, None):
            raise ValueError(
                f"config.json says {key}={config[key]!r}, which this model does not do; it does "
                f"{', '.join(repr(v) for v in values if v is not None)}."
            )
    said = _taken(config, kind.shown)
    hidden |= _taken(config, kind.fields)
    for name, value in (kind.more(config) if kind.more else {}).items():
        (said if name in _SHOWN else hidden)[name] = value
    if "qkv_bias" in hidden:
        said["qkv_bias"] = hidden.pop("qkv_bias")
    return Beside(
        kind.base,
        hidden,
        said | shown,
        preprocessing,
        notes,
        (config.get("architectures") or [""])[0],
        _class_names(config.get("id2label")),
        _stops(_json(folder / "generation_config.json") or {}) or _stops(config),
    )


def _class_names(labels: Any) -> tuple[str, ...]:
    """Names by number, where all numbers have one."""
    if not isinstance(labels, dict):
        return ()
    named = {str(number): str(name) for number, name in labels.items()}
    return tuple(named[str(i)] for i in range(len(named)) if str(i) in named)


def _stops(config: Config) -> tuple[int, ...]:
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return tuple(end for end in ends if isinstance(end, int))


def _taken(config: Config, names: Mapping[str, str]) -> dict[str, Any]:
    taken = {ours: config[key] for key, ours in names.items() if config.get(key) is not None}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in taken.items()}


_POOLINGS = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}


def _pooling(folder: Path) -> tuple[str, tuple[str, ...]]:
    """How sentence-transformers makes a sentence's vector, or nothing."""
    config = _json(folder / "1_Pooling" / "config.json")
    if config is None:
        return "", ()
    on = [k.removeprefix("pooling_mode_") for k, v in config.items()
          if k.startswith("pooling_mode_") and v is True]  # fmt: skip
    on = on or [f"{config['pooling_mode']}"] if "pooling_mode" in config else on
    names = [_POOLINGS.get(name, name if name in _POOLINGS.values() else "") for name in on]
    if len(names) != 1 or not names[0]:
        raise ValueError(
            f"1_Pooling/config.json asks for {', '.join(on) or 'no'} pooling; this model does one "
            f"of {', '.join(_POOLINGS.values())}."
        )
    modules = _json(folder / "modules.json")
    kinds = [str(m.get("type", "")) for m in modules] if isinstance(modules, list) else []
    if any("Dense" in kind for kind in kinds):
        raise ValueError("modules.json has a Dense layer behind the pooling, which is not read.")
    plain = bool(kinds) and not any("Normalize" in kind for kind in kinds)
    note = "modules.json does not normalise the sentences' vectors; this model does."
    return names[0], (note,) if plain else ()


def _preprocessing(config: Config | None) -> Preprocessing | None:
    if not config or config.get("image_mean") is None or not config.get("do_normalize", True):
        return None
    mean, std = config["image_mean"], config.get("image_std")

    def numbers(x: Any) -> bool:
        return (
            isinstance(x, list) and len(x) in (1, 3) and all(isinstance(n, int | float) for n in x)
        )

    if not numbers(mean) or not isinstance(std, list) or not numbers(std) or min(std) <= 0:
        raise ValueError(
            f"preprocessor_config.json has image_mean {mean!r} and image_std {std!r}; lists of "
            "numbers were expected, of std above 0."
        )
    names: dict[Any, str] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
    size, crop = config.get("size"), config.get("crop_size")
    edge = [_edge(size), _edge(crop)]
    ratio = edge[1] / edge[0] if all(edge) and config.get("do_center_crop") else 1.0
    return Preprocessing(
        tuple(mean),
        tuple(std),
        config.get("crop_pct") or ratio,
        names.get(config.get("resample"), "bicubic"),
        squash=isinstance(size, Mapping) and "height" in size,
    )


def _edge(size: Any) -> int:
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or size.get("height") or 0
    return size if isinstance(size, int) else 0


def _is_beside(path: Path, folder: Path) -> bool:
    """Whether `config.json` is about this file, as about a folder's weights."""
    known = ("model", "pytorch_model", "flax_model")
    return path.is_dir() or path.name.split(".")[0].split("-")[0] in known


def _json(path: Path) -> Any:
    """What a JSON file holds, or None if there is none.

    Raises:
      ValueError: if it is broken or too long.
    """
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_CONFIG:
        raise ValueError(f"{path}: more than {MAX_CONFIG} bytes are no configuration.")
    try:
        return json.loads(path.read_text("utf-8"), object_hook=_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}).") from None


def _number(value: dict[str, Any]) -> Any:
    """Transformers writes infinity as `{"__float__": "Infinity"}`."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value
