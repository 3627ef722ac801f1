"""The learners of Boolean functions, and the functions themselves."""

import re
from collections.abc import Callable
from typing import Any

import golden
from golden_systems import _icl, icl_sequential

import zoo
from zoo.data.functions import boolean

OF = {"attn_o": "attention", "ret_o": "retention", "hyena_operator": "hyena", "dss": "dss"}


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """Whichever learner the state dict is of; without one, the labels of the functions."""
    if not case.shapes:
        return None, _labels(case)
    if "_backbone.wpe.weight" in case.shapes:  # its GPT-2
        return icl_sequential.build(case)
    fields = _icl.sizes(case)
    parts = {part for name in case.shapes for part in name.split(".")}
    fields["mixer"] = next((ours for theirs, ours in OF.items() if theirs in parts), None)
    if fields["mixer"] is None:
        rows, width = case.shapes["_backbone.weight_ih_l0"]
        fields["mixer"] = "lstm" if rows == 4 * width else "gru"
    found = _icl.depth(case, "_backbone.blocks.", "_backbone.weight_ih_l")
    fields["depth"] = _icl.agreed(case, found, "n_layer", "n_layers")
    fields |= case.config.rename(order="order", gated="use_gate")
    heads = _icl.first(case, "n_head", "n_heads", "num_heads")
    if heads is not None:
        fields["num_heads"] = heads
    if "_read_in.net.0.weight" in case.shapes:
        fields["read_hidden"] = case.shapes["_read_in.net.0.weight"][0]
    _one_frequency(case)
    # the official retention always decays; the other entries change no output
    case.config.ignore("use_decay", "dropout", "pos_encode_type", "freeze", "family", "rnn_type")
    case.config.ignore("n_positions", "class", "model")
    model = zoo.create("icl_boolean_mysan", **fields)
    return model, _icl.predictions(case, model)


def _one_frequency(case: golden.Case) -> None:
    """Hyena's sines share one tensor, which a file names four times and its maker filled once."""
    for entry in case.header["state_dict"]:
        name, _, _, kind = entry
        if name.endswith(".freq") and ".implicit_filter." in name:
            head, _, leaf = name.rsplit(".", 2)
            if kind == "kept":
                entry[3] = "filled"
                case.filled_as[name] = f"{head}.1.{leaf}"


def _labels(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    """What the functions say at the points of the file, and the teaching sequences."""
    case.config.ignore("n_dims")
    xs, thresholds = case.input("xs"), case.input("thres")
    weights = (name for name in case.inputs if name not in ("xs", "thres"))
    part = {name: case.input(name).squeeze(-1) for name in weights}
    signed, chosen = part["w3"], part["w2"]
    clauses = [part[name] for name in sorted(part) if re.fullmatch(r"c\d", name)]

    def run(_: dict) -> golden.Outputs:
        out = {
            "conjunction": boolean.conjunction(xs, signed),
            "disjunction": boolean.disjunction(xs, signed),
            "majority": boolean.halfspace(xs, chosen),
            "parity": boolean.parity(xs, chosen),
            "int_halfspace": boolean.halfspace(xs, part["int_w"]),
            "sparse_thres": boolean.halfspace(xs, signed, thresholds),
            "dnf": boolean.dnf(xs, clauses),
            "cnf": boolean.cnf(xs, clauses),
        }
        for name in case.header["outputs"]:
            if name.startswith("teach_xs_"):
                term = chosen[int(name.rsplit("_", 1)[1])]
                out[name] = lesson = boolean.teach_conjunction(term)
                out[name.replace("xs", "ys")] = boolean.conjunction(lesson, term)
        if "conjunction_balanced_xs" in case.references:
            # drawn by the official generator: the labels can be compared, the points not
            out["conjunction_balanced_xs"] = balanced = case.references["conjunction_balanced_xs"]
            out["conjunction_balanced"] = boolean.conjunction(balanced, signed)
        return out

    return run


def made_by(case: golden.Case) -> bool:
    """Whether the source is the official repository."""
    return "incontext-bool" in case.source
