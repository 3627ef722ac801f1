"""Models as programs that run without the zoo: `jax.export`, weights beside it, any batch size.

A folder of `write_program` holds

    program.jax           the model for any batch size (and any length of text), of `jax.export`
    weights.safetensors   its variables by path
    program.json          shapes of inputs and outputs, and how the authors feed images

Images go in as bytes `[batch, height, width, channels]`: dividing by 255, subtracting the mean and
dividing by the deviation are part of the program. Running it needs JAX and safetensors alone:

    program = jax.export.deserialize(bytearray(open("program.jax", "rb").read()))
    weights = safetensors.numpy.load_file("weights.safetensors")
    logits = program.call(weights, {"images": images})
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from zoo.system import Preprocessing


def symbolic_inputs(
    model: nn.Module, batch: int | None = None, length: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a model's inputs for any batch size and, where it reads tokens, any length.

    Args:
      model: a module with `example_inputs`.
      batch: this size; None: any, the dimension `b`.
      length: this length; None: any, the dimension `t`, where `example_inputs` takes one. Models
        that read whole blocks have a method `any_length`, which gives the size of a block and the
        fewest blocks: their length is then a multiple of `t`.

    Raises:
      ValueError: if a length is given for a model whose inputs have one size, or the model's
        settings make its operations depend on the length.
    """
    for name, size in (("batch", batch), ("length", length)):
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} is no size; give 1 or more, or leave it out for any.")
    makes = model.example_inputs
    free = "length" in inspect.signature(makes).parameters
    if length is not None and not free:
        raise ValueError(f"The inputs of {type(model).__name__} have no length to choose.")
    one, other = makes(2), makes(3)
    # Lengths that stay different behind a limit of the model's positions.
    short, long = (makes(2, length=n) for n in (16, 8)) if free else (one, one)
    limits: list[str] = []
    text = str(length)
    if free and length is None:
        block, fewest = model.any_length() if hasattr(model, "any_length") else (1, 2)
        text = "t" if block == 1 else f"{block}*t"
        limits = [f"t >= {fewest}", *_most(makes, block)]
    scope = jax.export.SymbolicScope(limits)
    shapes = {}
    for name, example in short.items():
        sizes = [
            str("b" if batch is None else batch) if one[name].shape[axis] != other[name].shape[axis]
            else text if size != long[name].shape[axis]
            else str(size)
            for axis, size in enumerate(example.shape)
        ]  # fmt: skip
        shape = jax.export.symbolic_shape(",".join(sizes), scope=scope) if sizes else ()
        shapes[name] = jax.ShapeDtypeStruct(shape, example.dtype)
    return shapes


def _most(makes: Callable[..., Mapping[str, Any]], block: int) -> list[str]:
    """The limit of the number of blocks: examples are not longer than a model's tables."""
    endless = 1 << 30
    sizes = [x.shape[1] for x in makes(1, length=endless).values() if len(x.shape) > 1]
    most = min(sizes, default=endless)
    return [f"t <= {most // block}"] if most < endless else []


def export_program(
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    preprocessing: Preprocessing | None = None,
    batch: int | None = None,
    length: int | None = None,
    platforms: Sequence[str] | None = None,
) -> jax.export.Exported:
    """The model as `f(weights, inputs) -> outputs`, where weights are by path.

    Args:
      model: the module.
      variables: of the model, or their shapes.
      preprocessing: images go in as bytes and are normalised so; None: as the model reads them.
      batch: this batch size; None: any.
      length: this length of text; None: any.
      platforms: what it is compiled for (`cpu`, `cuda`, `tpu`); None: what runs here.

    Raises:
      ValueError: if the model cannot be exported so, in a sentence.
    """
    inputs = symbolic_inputs(model, batch, length)
    images = preprocessing is not None and "images" in inputs
    if images:
        inputs["images"] = jax.ShapeDtypeStruct(inputs["images"].shape, jnp.uint8)

    def program(weights: dict[str, jax.Array], inputs: dict[str, jax.Array]) -> Any:
        if images:
            mean, std = (np.asarray(x, np.float32) for x in (preprocessing.mean, preprocessing.std))
            inputs = {**inputs, "images": (inputs["images"] / np.float32(255) - mean) / std}
        return model.apply(unflatten_dict(weights, sep="/"), **inputs)

    weights = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), flatten_dict(dict(variables), sep="/")
    )
    lower = jax.export.export(jax.jit(program), platforms=platforms)
    try:
        return lower(weights, inputs)
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        free = [name for name, size in (("batch", batch), ("length", length)) if size is None]
        raise ValueError(
            f"{type(model).__name__} cannot be exported for any {' and '.join(free)}: "
            f"{str(error).splitlines()[0]} Give a number for one of them."
        ) from error


def write_program(
    folder: Path,
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    preprocessing: Preprocessing | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a program, its weights and its description; `options` are those of `export_program`.

    Returns:
      The description.

    Raises:
      FileExistsError: if the folder exists.
    """
    from safetensors.numpy import save_file

    exported = export_program(model, variables, preprocessing=preprocessing, **options)
    (_, inputs), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    about = {
        "inputs": {name: _described(x) for name, x in inputs.items()},
        "outputs": jax.tree.map(_described, outputs),
        "platforms": list(exported.platforms),
        "jax": jax.__version__,
    }
    if preprocessing is not None and "images" in inputs:
        about["preprocessing"] = {
            "image_size": list(model.image_size),
            "crop": preprocessing.crop,
            "interpolation": preprocessing.interpolation,
            "in the program": {
                "scale": 1 / 255,
                "mean": list(preprocessing.mean),
                "std": list(preprocessing.std),
            },
        }
    folder.mkdir(parents=True)
    (folder / "program.jax").write_bytes(exported.serialize())
    flat = flatten_dict(dict(variables), sep="/")
    save_file({k: np.ascontiguousarray(v) for k, v in flat.items()}, folder / "weights.safetensors")
    (folder / "program.json").write_text(json.dumps(about, indent=2) + "\n")
    return about


def _described(x: Any) -> str:
    return f"{np.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"
