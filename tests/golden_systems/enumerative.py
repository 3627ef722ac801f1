"""Intersection numbers of psi classes, and DynamicFormer, which learns their logarithms."""

import re
from collections.abc import Callable
from typing import Any

import golden
import jax
import numpy as np

import zoo
from zoo.data.intersection import airy_b, airy_c, exponents, genus, intersection_number, logarithm
from zoo.models.signal.dynamic_mlp import DraMlp, DynamicNetwork, dra, package_dra
from zoo.models.signal.dynamicformer import pool


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """The numbers of all exponents; the parts of the network; or the network itself."""
    if "num" in case.inputs:
        return None, lambda variables: _numbers(case)
    if "dra" in case.config.entries:
        parts = _parts(case)
        return None, lambda variables: parts
    if "trans_1.memory_tokens" not in case.shapes:
        return _mlp(case)
    return _network(case)


# What the shapes of a multilayer perceptron's tensors say, too, and what does not shape it.
_SIZES = """
    activation batch bias dim_in dim_in_2 dim_out dims dra dropout depth hidden hidden_size in_dim
    in_features inputs layers nb_layers num_layers out_dim out_features outputs return_inter sizes
    skip width widths BN
""".split()


def _mlp(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """`MLP_dra` of the repository, or maps with an activation behind each but the last."""
    config, shapes = case.config, case.shapes
    modulation = config.take("modulation", "+")
    config.ignore(*_SIZES, "model", "class", "class_")
    named = f"{config.entries.get('activation', '')} {case.source}"
    types = {"activation": package_dra if "package" in named or "dra/" in named else dra}
    if "lin_final.weight" in shapes:
        second = shapes.get("lin2.weight", (0, 0))[1]
        (hidden, inputs), channels = shapes["lin1.weight"], shapes["lin_final.weight"][0]
        norm, bias = "last_norm.weight" in shapes, "lin1.bias" in shapes
        model = DynamicNetwork(inputs, channels, hidden, second, modulation, bias, norm, **types)
    else:
        maps = [s for name, s in shapes.items() if name.endswith("weight") and len(s) == 2]
        bias = any(name.endswith("bias") for name in shapes)
        widths = tuple(out for out, _ in maps[:-1])
        model = DraMlp(maps[0][1], widths, maps[-1][0], bias, **types)
    x = {name: case.input(name) for name in case.names}
    rows = next((x.pop(name) for name in ("x", "input", "inputs") if name in x), None)
    second = next((x.pop(name) for name in ("y", "z", "cond") if name in x), None)
    mask = x.pop("mask", None)
    if rows is None or x:
        raise golden.Unsupported(f"its inputs are {', '.join(case.names)}, not x, y and mask")
    flat = [None if a is None else a.reshape(-1, a.shape[-1]) for a in (rows, second)]
    if mask is not None and np.any(mask != 1):
        raise golden.Unsupported("its mask hides rows; the model here takes none")
    flat = [a for a in flat if a is not None]

    def outputs(variables: dict) -> golden.Outputs:
        y = jax.jit(model.apply)(variables, *flat).reshape(*rows.shape[:-1], -1)
        return dict.fromkeys(case.header["outputs"], y)

    return model, outputs


def _numbers(case: golden.Case) -> golden.Outputs:
    """Exactly the fractions of the file, which may be a part of all, and their logarithms."""
    rows = [tuple(int(e) for e in row if e >= 0) for row in case.inputs["d"]]
    sizes = list(zip(case.inputs["g"].tolist(), case.inputs["n"].tolist(), strict=True))
    assert [(genus(d), len(d)) for d in rows] == sizes
    assert set(rows) <= {d for size in set(sizes) for d in exponents(*size)}
    values = [intersection_number(d) for d in rows]
    stored = zip(case.inputs["num"], case.inputs["den"], strict=True)
    assert [(str(v.numerator), str(v.denominator)) for v in values] == [
        (str(num), str(den)) for num, den in stored
    ]
    return {"log_value": np.array([logarithm(v) for v in values])}


def _parts(case: golden.Case) -> golden.Outputs:
    scalars = case.config.take("dra")
    typical = np.float32([case.config.take("average_n")])
    x = case.input("x")
    out = {
        "dra_model": dra(x, **scalars),
        "dra_package": package_dra(x, **scalars),
        "lepna": pool(case.input("set"), typical),
    }
    tables = (re.fullmatch(r"[BC]_coo_(\d+)_(\d+)", name) for name in case.header["outputs"])
    for g, n in {(int(found[1]), int(found[2])) for found in tables if found}:
        b = airy_b(3 * g - 3 + n)
        out[f"B_coo_{g}_{n}"] = np.concatenate([b[:, :3], np.log(1 + 100 * b[:, 3:])], 1)
        out[f"C_coo_{g}_{n}"] = airy_c(3 * g - 3 + n)
    return out


def _network(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    case.config.expect(x_transformers="2.31.10")
    changed = case.config.entries["post_fill_add"]["names"]
    case.config.entries["post_fill_add"] = {
        name: 9.0 if name.endswith("average_n") else 1.0 for name in changed
    }
    exponents, sizes, airy = (case.input(name) for name in ("x", "gn", "b"))
    vocab_size, channels = case.shapes["perm_emb.weight"]
    model = zoo.info("dynamicformer_psi").create(
        points=exponents.shape[1],
        rows=airy.shape[1],
        vocab_size=vocab_size,
        channels=channels,
        embed_dim=case.shapes["trans_1.project_in.weight"][0],
        hidden=case.shapes["perm_embedding.lin1.weight"][0],
    )
    # the network finds both masks by itself
    places = np.arange(exponents.shape[1])
    np.testing.assert_array_equal(places < sizes[:, 1:], case.inputs["mask_x"])
    np.testing.assert_array_equal(airy[..., 3] == 0, case.inputs["mask_b"])
    inputs = exponents.astype(np.int32), sizes, airy

    def outputs(variables: dict) -> golden.Outputs:
        out = jax.jit(lambda v, x: model.apply(v, *x, method="features"))(variables, inputs)
        # the logits are near -690 and differ by 60: parity of the differences is parity, too
        centred = out["logits"] - np.asarray(case.references["out"]).mean()
        error = np.abs(centred - (case.references["out"] - case.references["out"].mean()))
        assert error.max() <= golden.TOLERANCE * np.ptp(case.references["out"]), error
        return {"out": out["logits"], "align_loss": out["alignment"]}

    return model, outputs


def made_by(case: golden.Case) -> bool:
    """Whether the header names the recursions or the official repository."""
    return case.source.startswith(("exact rational Python", "Baran-phys/DynamicFormer@"))
