"""TEMPO of its official repository."""

from collections.abc import Callable
from typing import Any

import golden
import numpy as np

import zoo


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The forecaster; with a pool it has to choose the reference's prompts, too."""
    config = case.config
    config.expect(is_gpt=1, prompt=1, use_token=0, num_nodes=1, loss_func="mse")
    config.ignore("pretrain", "freeze", "min_topk_gap")  # of training; how near a choice is
    fields = config.rename(
        context_length="seq_len",
        horizon="pred_len",
        patch_length="patch_size",
        stride="stride",
        embed_dim="d_model",
        depth="gpt_layers",
        pool="pool",
    )
    words, lora = config.take("prompt_token_ids"), config.take("lora")
    if (lora["target"], lora["bias"]) != ("c_attn", "lora_only"):
        raise golden.Unsupported(f"its LoRA is {lora}, and the zoo's model has it in c_attn only")
    model = zoo.create(
        "tempo_80m_v1",
        prompts=tuple(tuple(words[name]) for name in ("trend", "season", "residual")),
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
        return {"pred": out["forecast"], "trend_local": out["trend"][..., 0]}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the official repository."""
    return case.source.startswith("DC-research/TEMPO@")
