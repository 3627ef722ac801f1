"""VPT's prompts in timm's ViT."""

from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np
from golden_systems.vit import timm_vit

import zoo
from zoo.methods.prompts import Prompts


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The classifier with and without its prompts."""
    config = case.config
    config.entries["timm_model"] = config.take("arch", "vit_tiny_patch16_224")
    config._left.add("timm_model")
    count = config.take("num_prompts", config.take("num_tokens", 5))
    width = config.take("project", config.take("prompt_dim", -1))
    width = None if width in (None, -1) else width
    prompts = Prompts(count, deep=bool(config.take("deep", False)), width=width)
    config.ignore("dropout", "prompt_dropout", "initiation")
    config.expect(location=("prepend", None), deep_shared=(False, None), num_deep_layers=(None,))
    model = zoo.info("vit_test").create(**timm_vit(case))
    wrapped = prompts.wrap(model)
    images = np.moveaxis(case.input("x"), 1, -1)
    run = jax.jit(lambda v: (wrapped.apply(v, images), model.apply(v, images)))

    def outputs(variables: dict) -> golden.Outputs:
        return dict(zip(("logits", "logits_without_prompts"), run(variables), strict=True))

    return wrapped, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository."""
    return "KMnP/vpt" in case.source
