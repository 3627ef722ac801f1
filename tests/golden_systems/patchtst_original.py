"""PatchTST, from the arguments of its authors' code."""

from collections.abc import Callable
from typing import Any

import golden
import jax
from golden_systems import _series

import zoo

NARROW = ("zero", "normal", "gauss", "uniform", "lin1d", "exp1d")
"""Positions of one number each; all are tensors of the checkpoint, whatever they start as."""


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The forecaster."""
    config = case.config
    named = ("context_length", "horizon", "embed_dim", "depth", "num_heads", "mlp_dim",
             "patch_length", "stride")  # fmt: skip
    config.ignore(*_series.UNUSED, "embed", "label_len", "d_layers", "moving_avg", "factor")
    config.ignore("distil", "activation", "fc_dropout", "head_dropout", "attn_dropout", "model")
    config.ignore("pct_start", "test_flop", "random_seed", "max_seq_len", "verbose", "store_attn")
    config.ignore("learn_pe", "padding_var", "key_padding_mask", "use_norm")
    config.ignore("norm")  # it never reaches the layers, which have BatchNorm
    config.expect(head_type="flatten", pretrain_head=(False, 0), attn_mask=None)
    width = config.entries.get("d_model", 128) // config.entries.get("n_heads", 16)
    config.expect(d_k=(None, width), d_v=(None, width))
    average = config.take("kernel_size", 25)
    model = zoo.info("original_patchtst_test").create(
        **_series.take(config, *named),
        variates=config.take("enc_in", config.take("c_in", case.input(_name(case)).shape[-1])),
        activation=jax.nn.relu if config.take("act") == "relu" else _series.gelu,
        pad_end=config.take("padding_patch", "end") == "end",
        pre_norm=bool(config.take("pre_norm", False)),
        residual_attention=bool(config.take("res_attention", True)),
        wide_positions=config.take("pe", "zeros") not in NARROW,
        standardise=bool(config.take("revin", True)),
        affine=bool(config.take("affine", False)),
        subtract_last=bool(config.take("subtract_last", False)),
        individual=bool(config.take("individual", False)),
        moving_average=average if config.take("decomposition") else 0,
    )
    case.unread("x_mark_enc", "x_dec", "x_mark_dec")

    def outputs(variables: dict) -> golden.Outputs:
        run = jax.jit(lambda v, x: model.apply(v, x, method="features"))
        found = run(variables, case.input(_name(case)))
        return {**found, "pred": found["forecast"], "out": found["forecast"]}

    return model, outputs


def _name(case: golden.Case) -> str:
    return "x" if "x" in case.names else "x_enc"


def made_by(case: golden.Case) -> bool:
    """Whether the header names the authors' repository."""
    return case.source.startswith("yuqinie98/PatchTST@")
