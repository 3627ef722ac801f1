"""The looped transformer, its standard and tied decoders, and AlgoFormer of the same blocks."""

from collections.abc import Callable
from typing import Any

import golden
from golden_systems import _icl

import zoo

INJECT = {"z=f(x+z)": "add", "z=f(x*z)": "multiply", "mul": "multiply"}
PARTS = ("pre", "loop", "post")


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """Whichever model the state dict is of; predictions come by loop first, as there."""
    fields = _loops(case)
    fields["num_heads"] = _icl.first(case, "n_head", "n_heads", default=4)
    if _icl.first(case, "pred_type", default="regression") == "classification":
        fields["outputs"] = case.shapes["_read_out.weight"][0]
    algoformer = any(name.startswith("pre.") for name in case.shapes)
    model = _algoformer(case, fields) if algoformer else _looped(case, fields)
    case.config.ignore("bias", "dropout", "n_loop_window", "vocab_size")
    return model, _icl.predictions(case, model, axis=1)


def _loops(case: golden.Case) -> dict[str, Any]:
    loops = _icl.first(case, "n_loops", "loops", "T")
    silent = _icl.first(case, "n_loop_start", "loop_start", default=0)
    inject = _icl.first(case, "loop_func", "inject")
    fields = {} if loops is None else {"loops": loops, "window": loops - silent}
    return fields if inject is None else fields | {"inject": INJECT.get(inject, inject)}


def _points(case: golden.Case, table: str) -> int:
    case.config.ignore("block_size")
    return _icl.agreed(case, (case.shapes[table][0] - 1) // 2, "n_positions")


def _looped(case: golden.Case, fields: dict) -> Any:
    depth = _icl.depth(case, "_backbone.transformer.h.")
    fields |= _icl.sizes(case) | {"depth": depth}
    fields["max_points"] = _points(case, "_backbone.transformer.wpe.weight")
    fields["positions"] = not _icl.first(case, "rm_pos_embd", default=False)
    # the looped and the tied model never pass it on
    add_inputs = bool(_icl.first(case, "add_inputs_embeds", default=False))
    family = _icl.first(case, "family", "class", "model", default="")
    if "tying" in f"{family} {case.source}".lower():  # as many loops as it was asked for layers
        fields |= {"loops": _icl.first(case, "n_layer"), "window": 1}
        return zoo.create("looped_tied", **fields)
    _icl.agreed(case, depth, "n_layer")
    if "loops" in fields:
        return zoo.create("looped_linear", **fields)
    return zoo.create("looped_standard", **fields, add_inputs=add_inputs)


def _algoformer(case: golden.Case, fields: dict) -> Any:
    found = [_icl.depth(case, f"{part}.transformer.h.") for part in PARTS]
    asked = _icl.first(case, "layers", "n_layers", "n_layer", default=found)
    asked = [asked[part] for part in PARTS] if isinstance(asked, dict) else asked
    if list(asked) != found:
        raise golden.Unsupported(f"layers are {asked}, but the tensors say {found}")
    for name in ("loop_positions", "post_positions"):
        if (value := _icl.first(case, name)) is not None:
            fields[name] = bool(value)
    fields["max_points"] = _points(case, "pre.transformer.wpe.weight")
    return zoo.create("algoformer_111", **fields, **_icl.sizes(case), depths=tuple(found))


def made_by(case: golden.Case) -> bool:
    """Whether a table of positions stands where the looped transformer has it."""
    return any(name.endswith("transformer.wpe.weight") for name in case.shapes) and (
        "_read_in.weight" in case.shapes
    )
