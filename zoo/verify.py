"""The checks behind `zoo verify`: counts, checkpoint rules, a gradient, reference outputs."""

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zoo
from zoo import registry
from zoo.shapes import count, shapes

if TYPE_CHECKING:
    import flax.linen as nn


@dataclasses.dataclass(frozen=True)
class Check:
    """One check of `verify`: `passed` is None where there was nothing to check."""

    check: str
    passed: bool | None
    detail: str


def verify(name: str, overrides: Mapping[str, Any], weights: str | None = None) -> Iterator[Check]:
    """Runs a system's checks on one variant, cheapest first."""
    model = zoo.create(name, **overrides)
    variables, _ = shapes(model)
    published = None if overrides else zoo.info(name).params
    counted = count(variables)
    yield Check(
        "parameters",
        None if published is None else counted == published,
        f"{counted:,}" + (f", published {published:,}" if published else ", no published number"),
    )
    filled = fill(variables)
    yield from check_layouts(model, filled)
    yield check_gradient(model, filled)
    del filled
    yield from check_goldens(model, weights)


def fill(variables: Any) -> Any:
    """Numbers of ordinary size for every leaf: all differ, unlike at initialisation.

    Variances, which batch norms take the root of, are positive.
    """
    import jax
    import numpy as np

    rng = np.random.default_rng(0)

    def numbers(path: tuple, leaf: Any) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32) * 0.05 + 0.01
        if path[-1].key == "var":
            values = 1 + np.abs(values)
        return jax.numpy.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(numbers, variables)


def check_layouts(model: "nn.Module", variables: Any) -> Iterator[Check]:
    """Every published layout that has a place for all of the model, there and back."""
    import jax
    import numpy as np

    layouts = registry.system(model).layouts
    written = 0
    for layout in layouts:
        try:
            state = zoo.export(model, variables, layout)
        except ValueError:  # this layout is for models with other parts
            continue
        written += 1
        try:
            back = zoo.convert(model, state)
        except ValueError as error:
            yield Check(f"layout {layout}", False, str(error))
            continue
        pairs = zip(jax.tree.leaves(variables), jax.tree.leaves(back), strict=True)
        differ = sum(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in pairs)
        again = zoo.export(model, back, layout)
        differ += sum(
            np.ascontiguousarray(state[k]).tobytes() != np.ascontiguousarray(again[k]).tobytes()
            for k in state
        )
        detail = f"{len(state)} tensors, there and back" + (
            f": {differ} differ" if differ else " bit for bit"
        )
        yield Check(f"layout {layout}", not differ, detail)
    if not written:
        yield Check("layouts", False, f"none of {', '.join(layouts)} has a place for all leaves")


def check_gradient(model: "nn.Module", variables: Any) -> Check:
    """Forward and backward give finite numbers."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)

    def example(spec: jax.ShapeDtypeStruct) -> jax.Array:
        if spec.dtype == jnp.bool_:
            return jnp.ones(spec.shape, spec.dtype)
        if jnp.issubdtype(spec.dtype, jnp.integer):  # 0 and 1 are in every table
            return jnp.asarray(rng.integers(0, 2, spec.shape), spec.dtype)
        return jnp.asarray(rng.standard_normal(spec.shape), spec.dtype)

    inputs: Any = {k: example(s) for k, s in model.example_inputs().items()}
    if "mask" in inputs:
        inputs["mask"] = jnp.ones_like(inputs["mask"])
    rest = {k: v for k, v in variables.items() if k != "params"}

    @jax.jit
    def largest(params: Any) -> tuple[jax.Array, jax.Array]:
        def loss(params: Any) -> jax.Array:
            outputs = model.apply({"params": params, **rest}, **inputs)
            terms = [jnp.sin(x.astype(jnp.float32)).mean() for x in jax.tree.leaves(outputs)]
            return jnp.stack(terms).sum()

        value, grads = jax.value_and_grad(loss)(params)
        return value, jnp.stack([jnp.abs(g).max() for g in jax.tree.leaves(grads)])

    value, maxima = jax.device_get(largest(variables["params"]))
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(variables["params"])]
    broken = [p for p, m in zip(paths, maxima, strict=True) if not np.isfinite(m)]
    if not np.isfinite(value):
        return Check("gradient", False, f"the outputs are not finite ({value})")
    if broken:
        return Check("gradient", False, f"not finite in {', '.join(broken[:4])}")
    if not maxima.any():
        return Check("gradient", False, "zero everywhere")
    return Check("gradient", True, f"finite in all {len(maxima)} leaves")


def check_goldens(model: "nn.Module", weights: str | None) -> Iterator[Check]:
    """Every reference case of the system, where the tests stand beside the package."""
    program, cases = reference_cases(model)
    if not cases:
        yield Check("goldens", None, "there are no reference cases beside the package")
        return
    golden = _load_module("golden", program)
    for case in cases:
        name = f"golden {case.parent.name}/{case.stem}"
        try:
            report = golden.check(case, weights)
        except golden.NoWeights as error:
            yield Check(name, None, str(error))
        except ValueError as error:
            yield Check(name, False, str(error))
        else:
            yield Check(name, report.passed, f"largest relative error {report.worst:.1e}")


def reference_cases(model: "nn.Module") -> tuple[Path, list[Path]]:
    """The program that compares, and the golden files of the model's system."""
    system = type(model).__module__.rpartition(".")[2]
    tests = Path(zoo.__file__).parent.parent / "tests"
    program = tests / "golden.py"
    return program, sorted((tests / "golden" / system).glob("*.npz")) if program.exists() else []


def _load_module(name: str, path: Path) -> Any:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
