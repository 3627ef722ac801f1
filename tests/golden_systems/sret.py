"""Official SReT by its constructor."""

import re
from collections.abc import Callable
from typing import Any

import fill
import golden
import numpy as np

from zoo.models.vision.sret import SReT

CLASSES = ("SReT", "Distilled_SReT", "RecursiveTransformer", "DistilledRecursiveTransformer")


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The classifier, with the permutation that the references were made with."""
    config = case.config
    fields = config.rename(
        image_size="image_size",
        in_channels="in_chans",
        num_classes="num_classes",
        depths="depth",
        recursive_num="recursive_num",
        num_heads="heads",
        groups1="groups1",
        groups2="groups2",
        mlp_ratio="mlp_ratio",
        bridge_ratio="np_mlp_ratio",
    )
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    if "groups1" not in fields:  # the class without slices
        fields["groups1"] = fields["groups2"] = (1,) * len(fields["depths"])
    fields["image_size"] = golden.pair(fields["image_size"])
    (fields["head_dim"],) = set(config.take("base_dims"))
    config.expect(cls=CLASSES)
    # the official code uses neither of the first two
    config.ignore("patch_size", "stride", "drop_rate", "attn_drop_rate", "drop_path_rate")
    for name in case.shapes:  # the second run's name is filled last
        found = re.fullmatch(r"(transformers\.\d+\.blocks\.)(\d+)(\..*)", name)
        if found and int(found[2]) % 4 == 0:
            case.filled_as[name] = f"{found[1]}{int(found[2]) + 2}{found[3]}"
    model = SReT(permutation=permutation, **fields)
    run = golden.features(model, case.images())

    def outputs(variables: dict) -> golden.Outputs:
        """Maps as the references store them, channels first."""
        return {k: np.moveaxis(x, -1, 1) if x.ndim == 4 else x for k, x in run(variables).items()}

    return model, outputs


def permutation(length: int) -> np.ndarray:
    """What the references have in place of torch.randperm."""
    return np.argsort(fill.uniform(f"in/perm{length}", (length,)), kind="stable")


def made_by(case: golden.Case) -> bool:
    cls = case.header["config"].get("cls")
    return cls in CLASSES
