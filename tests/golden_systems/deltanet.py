"""DeltaNet of flash-linear-attention."""

from collections.abc import Callable
from typing import Any

import golden
from golden_systems import _fla


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """See `_fla.build`."""
    return _fla.build(case, base="deltanet")


def made_by(case: golden.Case) -> bool:
    """Whether the header names `DeltaNetForCausalLM`."""
    return case.header["config"].get("class_") == "DeltaNetForCausalLM"
