"""Every variant's rules are complete and invertible; bits come back for small and large ones."""

import dataclasses
import zlib
from functools import partial

import jax
import numpy as np
import pytest
from model_helpers import representatives

import zoo
from zoo.checkpoints.files import Tensor
from zoo.checkpoints.leaves import model_leaves, nested
from zoo.checkpoints.naming import find
from zoo.checkpoints.plan import make_plan
from zoo.checkpoints.rules import convert, export, manifest
from zoo.checkpoints.ruleset import matches
from zoo.layers.stack import stack_layers
from zoo.registry import SYSTEMS, file_of, system

NAMES = zoo.list_models()
SUMMED = {"decision_transformer_test": ("embed_ln.bias", "encoder.wpe.weight")}
"""Tensors of a file that are added into one leaf, of which only the sum comes back."""
QUICK = 15_000_000  # parameters whose bits are made and compared in a second


def layouts_of(model) -> list[str]:
    """The layouts that have a name for every leaf of the model; the first one must."""
    layouts = system(model).layouts
    manifest(layouts, model)
    names = []
    for layout in layouts:
        try:
            manifest(layouts, model, layout)
        except ValueError as error:
            assert "has no rule that writes" in str(error)
        else:
            names.append(layout)
    return names


def bits(name: str, struct) -> np.ndarray:
    """Any bits at all (NaNs included), a function of the tensor's name."""
    start = zlib.crc32(name.encode())
    count = int(np.prod(struct.shape)) * struct.dtype.itemsize
    words = np.arange(start, start + count // 4 + 1, dtype=np.uint32) * np.uint32(2654435761)
    return words.view(np.uint8)[:count].view(struct.dtype).reshape(struct.shape)


def official(model, layout: str | None) -> dict[str, Tensor]:
    """The state dict of a layout, its tensors made when they are read; two names of one, alike."""
    leaves = model_leaves(model)
    zeros = {p: np.broadcast_to(np.zeros((), x.dtype), x.shape) for p, x in leaves.stored.items()}
    variables = nested(zeros, leaves.collections)
    state = export(system(model).layouts, variables, model, layout)
    first: dict[int, str] = {}
    tensors = {}
    for name, x in state.items():
        struct = jax.ShapeDtypeStruct(x.shape, x.dtype)
        read = partial(bits, first.setdefault(id(x), name), struct)
        tensors[name] = Tensor(x.shape, x.dtype, read)
    return tensors


def assert_same_bits(got: dict, source: dict, ignored: set[str]) -> None:
    assert got.keys() == source.keys()
    for name, tensor in source.items():
        if name not in ignored:
            want, have = tensor.read(), got[name]
            assert have.dtype == want.dtype and have.shape == want.shape, name
            word = f"u{want.dtype.itemsize}"
            assert np.array_equal(have.view(word), want.view(word)), name


def round_trip(name: str, layout: str | None = None, **fields) -> None:
    model = zoo.create(name, **fields)
    layouts = system(model).layouts
    source = official(model, layout)
    rules = layouts[find(layouts, source, model_leaves(model)).layout]
    derived = {n for n in source if matches(rules.derived, n) or n in SUMMED.get(name, ())}
    variables = convert(layouts, source, model)
    assert_same_bits(export(layouts, variables, model, layout), source, derived)


@pytest.mark.parametrize("name", representatives(NAMES, published=False))
def test_every_leaf_is_filled_once_and_every_name_used_once(name):
    model = zoo.create(name)
    layouts, leaves = system(model).layouts, model_leaves(model)
    for layout in layouts_of(model):
        source = official(model, layout)
        naming = find(layouts, source, leaves)
        found, plan = naming.layout, make_plan(layouts, naming, leaves, model, adapt=False)
        steps, fresh = plan.steps, plan.fresh
        filled = [path for step in steps for path in step.targets]
        used = [naming.original[n] for step in steps for n in step.sources]
        assert sorted(filled) == sorted(leaves.unrolled) and not fresh
        assert len(set(used)) == len(used)
        left = set(source) - set(used)
        assert all(matches(layouts[found].derived, n) for n in left)
        read = {n for step in steps for n in step.sources}  # without a wrapper's prefix
        assert set(manifest(layouts, model, found)) >= read


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("_test")])
def test_bits_come_back_in_every_layout(name):
    for layout in layouts_of(zoo.create(name)):
        round_trip(name, layout)


@pytest.mark.parametrize("path", SYSTEMS)
def test_bits_come_back_for_the_smallest_published(path):
    sizes = {n: zoo.info(n).params for n in NAMES if file_of(n) == path and not n.endswith("_test")}
    quick = [n for n, size in sizes.items() if size and size <= QUICK]
    if not quick:
        pytest.skip("its published models are large: the run of every variant has them")
    round_trip(min(quick, key=lambda n: sizes[n]))


@pytest.mark.variants
@pytest.mark.parametrize("name", NAMES)
def test_bits_come_back_for_every_variant(name):
    round_trip(name)


def test_a_system_has_a_variant_for_tests():
    tested = {file_of(n) for n in NAMES if n.endswith("_test")}
    assert tested == set(SYSTEMS)


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("_test")])
def test_the_scanned_form_takes_the_same_file(name):
    model = zoo.create(name)
    shared = getattr(model, "groups", 0)  # sets of weights that several layers share
    if shared or "scan_layers" not in {f.name for f in dataclasses.fields(model)}:
        pytest.skip("its layers are not alike")
    layouts = system(model).layouts
    scanned = model.clone(scan_layers=True)
    want = stack_layers(convert(layouts, official(model, None), model)["params"])
    got = convert(layouts, official(model, None), scanned)["params"]
    assert jax.tree.structure(got) == jax.tree.structure(want)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), got, want)
    assert jax.tree.all(same)
    round_trip(name, scan_layers=True)
