"""Official LMUFormer by the arguments of its constructor."""

from collections.abc import Callable
from typing import Any

import golden

from zoo.models.signal.lmu import impulse_response, legendre, memory_size
from zoo.models.signal.lmuformer import LMUFormer
from zoo.models.signal.spiking import SpikingNetwork

OTHERS = ("slmu_rnn_conv1d", "attn_ms_conv1d")
MODELS = ("lmu_rnn_conv1d", "slmu_rnn_ms_conv1d", *OTHERS)


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The classifier; `features` is the last block, channels first as everything there."""
    config = case.config
    name = config.take("model")
    heads = config.take("num_heads", 8)
    # What the constructor takes and, in these networks, never reads.
    config.ignore("min_threshold_margin", "firing_rates", "img_size_h", "img_size_w", "patch_size")
    config.ignore("qkv_bias", "qk_scale", "drop_rate", "attn_drop_rate", "drop_path_rate", "T")
    config.ignore("sr_ratios", "act_type", "with_head_lif", "use_all_h")
    config.expect(test_mode=("normal", "all_seq", "recurrent"), model=MODELS)
    fields = {"context_length": 128, "theta": 128.0} | config.rename(
        context_length="seq_len", variates="in_channels", theta="theta",
        num_classes="num_classes", embed_dim="embed_dims", depth="depths",
        mlp_ratio="mlp_ratios",
    )  # fmt: skip
    fields["theta"] = float(fields["theta"])
    if name in OTHERS:
        return _other(case, name, heads, fields)
    model = LMUFormer(spiking=name == "slmu_rnn_ms_conv1d", **fields)
    run = golden.features(model, case.input("x"))
    order = memory_size(model.embed_dim, model.spiking)
    A, B = legendre(order, model.theta)

    def outputs(variables: dict) -> golden.Outputs:
        out = run(variables)
        first = {} if model.spiking else {"attn0": out["memory1"].swapaxes(1, 2)}
        return first | {
            **_read(case, out),
            "features": out[f"block{model.depth}"].swapaxes(1, 2),
            "A_head": A[:8, :8],
            "B_head": B[:16],
            "H_head": impulse_response(order, model.theta, model.context_length)[:8, :16],
        }

    return model, outputs


def _other(
    case: golden.Case, name: str, heads: int, fields: dict[str, Any]
) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The networks of `zoo.models.signal.spiking`."""
    model = SpikingNetwork(num_heads=0 if name == "slmu_rnn_conv1d" else heads, **fields)
    run = golden.features(model, case.input("x"))

    def outputs(variables: dict) -> golden.Outputs:
        out = run(variables)
        return {**_read(case, out), "features": out[f"block{model.depth}"].swapaxes(1, 2)}

    return model, outputs


def _read(case: golden.Case, out: dict) -> golden.Outputs:
    """Logits; under `all_seq` those after each frame, frames first."""
    every = out["prefix_logits"].swapaxes(0, 1)
    all_seq = case.config.entries.get("test_mode") == "all_seq"
    return {"logits": every if all_seq else out["logits"], "prefix_logits": every}


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return case.source.startswith("zeyuliu1037/LMUFormer@")
