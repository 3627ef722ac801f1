"""TEMPO of its official repository."""

from collections.abc import Callable
from typing import Any

import golden
import numpy as np

import zoo
from zoo.models.timeseries.tempo import PARTS, PROMPTS


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The forecaster; with a pool it has to choose the reference's prompts, too."""
    config = case.config
    config.expect(is_gpt=1, num_nodes=1, loss_func=("mse", "prob"), use_token=(0, 1))
    config.ignore("pretrain", "freeze", "min_topk_gap")  # of training; how near a choice is
    config.ignore("dropout", "itr", "stl_weight", "prompt_text", "gpt_model", "mlp", "d_ff")
    fields = config.rename(
        context_length="seq_len",
        horizon="pred_len",
        patch_length="patch_size",
        stride="stride",
        embed_dim="d_model",
        depth="gpt_layers",
    )
    words = config.take("prompt_token_ids") or {}
    lora = {"r": 16, "alpha": 16, "target": "c_attn", "bias": "lora_only"}
    lora |= config.take("lora") or {}
    if (lora["target"], lora["bias"]) != ("c_attn", "lora_only"):
        raise golden.Unsupported(f"its LoRA is {lora}, and the zoo's model has it in c_attn only")
    prompted = config.take("prompt", 1) == 1
    pool = bool(config.take("pool", False))
    parts = ("trend", "season", "residual")
    prompts = tuple(tuple(words[name]) for name in parts) if words else PROMPTS
    model = zoo.create(
        "tempo_80m_v1",
        prompts=prompts if prompted else (),
        pool=pool,
        read_prompts=prompted and config.entries.get("use_token") == 1,
        student=config.entries.get("loss_func") == "prob",
        lora_rank=lora["r"],
        lora_alpha=float(lora["alpha"]),
        **fields,
    )
    run = golden.features(model, case.input("x"))
    selected = config.take("selected_prompts")

    def outputs(variables: dict) -> golden.Outputs:
        out = run(variables)
        if selected is not None:  # [part, example, prompt], sorted
            chosen = np.sort(out["prompts"][:, 0]).swapaxes(0, 1).tolist()
            if chosen != selected:
                raise golden.Unsupported(f"it selects the prompts {selected}, and ours {chosen}")
        named = {"mu": "forecast", "sigma": "scale", "nu": "freedom"}
        student = {name: out[ours] for name, ours in named.items() if ours in out}
        parts = {f"{name}_local": out[name][..., 0] for name in PARTS}
        return {"pred": out["forecast"], **student, **parts}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return case.source.startswith("DC-research/TEMPO@")
