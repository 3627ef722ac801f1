"""Rules: what they fill, what they refuse and how they say it, forwards and backwards."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from zoo import registry
from zoo.checkpoints import leaves as leaves_module
from zoo.checkpoints.files import open_checkpoint, save_safetensors
from zoo.checkpoints.leaves import flat_leaves
from zoo.checkpoints.patterns import Pattern
from zoo.checkpoints.rules import (
    CheckpointMismatch,
    Rule,
    Rules,
    Transform,
    chain,
    concat,
    conv,
    convert,
    export,
    identity,
    linear,
    manifest,
    reshape,
    split,
    squeeze,
    stack,
    tied,
    transpose,
    unsqueeze,
)
from zoo.layers.stack import stack_layers

WIDTH = 4


class Layer(nn.Module):
    """Separate q and k, an MLP of two matrices."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.Dense(WIDTH, name="query")(x) * nn.Dense(WIDTH, name="key")(x)
        return x + nn.Dense(WIDTH, name="up")(x), None


class Net(nn.Module):
    """A convolution, a batch norm, a position table, layers and a head: each kind of rule."""

    depth: int = 2
    grid: int = 4
    num_classes: int = 3
    scan_layers: bool = False
    tables: bool = True

    def example_inputs(self, batch_size=1):
        shape = (batch_size, self.grid, self.grid, 3)
        return {"images": jax.ShapeDtypeStruct(shape, jnp.float32)}

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(WIDTH, (1, 1), name="embed")(images)
        x = nn.BatchNorm(use_running_average=not train, name="bn")(x)
        x = x.reshape(x.shape[0], -1, WIDTH)
        x = x + self.param("position", nn.initializers.normal(), (self.grid**2, WIDTH))
        if self.scan_layers:
            layers = nn.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
            )
            x, _ = layers(name="layers")(x, None)
        else:
            for i in range(self.depth):
                x, _ = Layer(name=f"layers_{i}")(x)
        x = x.mean(1)
        return nn.Dense(self.num_classes, name="head")(x) if self.num_classes else x


def table(model, i):
    return np.arange(model.grid + i, dtype=np.int64) if model.tables else None


def resize_position(array, shape, model, source_shapes):
    assert source_shapes["pos"] == (1, *array.shape)
    return np.resize(array, shape)


def norm(theirs, ours):
    return (
        Rule(f"{theirs}.weight", f"{ours}/scale"),
        Rule(f"{theirs}.bias", f"{ours}/bias"),
        Rule(f"{theirs}.running_mean", f"batch_stats/{ours}/mean"),
        Rule(f"{theirs}.running_var", f"batch_stats/{ours}/var"),
    )


OFFICIAL = Rules(
    (
        Rule("stem.weight", "embed/kernel", conv),
        Rule("stem.bias", "embed/bias"),
        *norm("bn", "bn"),
        Rule("pos", "position", squeeze(0)),
        Rule(
            "blocks.{i}.qk.weight",
            ("layers_{i}/query/kernel", "layers_{i}/key/kernel"),
            chain(linear, split(1)),
        ),
        Rule("blocks.{i}.qk.bias", ("layers_{i}/query/bias", "layers_{i}/key/bias"), split()),
        Rule("blocks.{i}.fc.weight", "layers_{i}/up/kernel", linear),
        Rule("blocks.{i}.fc.bias", "layers_{i}/up/bias"),
        Rule("head.weight", "head/kernel", linear),
        Rule("head.bias", "head/bias"),
    ),
    derived={
        "blocks.{i}.table": table,
        "bn.num_batches_tracked": None,
        "version": lambda model: np.array(2),
    },
    unused=("teacher.*",),
    fresh=("head/*",),
    resize={"position": resize_position},
)
OTHER = Rules(  # counts its blocks from one, twice as fast, and keeps q and k apart
    (
        Rule("stem.weight", "embed/kernel", conv),
        Rule("stem.bias", "embed/bias"),
        *norm("bn", "bn"),
        Rule("pos", "position", squeeze(0)),
        *(
            Rule(f"l.{{2*i+1}}.{letter}.w", f"layers_{{i}}/{ours}/kernel")
            for letter, ours in (("q", "query"), ("k", "key"), ("f", "up"))
        ),
        *(
            Rule(f"l.{{2*i+1}}.{letter}.b", f"layers_{{i}}/{ours}/bias")
            for letter, ours in (("q", "query"), ("k", "key"), ("f", "up"))
        ),
        Rule("out.w", "head/kernel"),
        Rule("out.b", "head/bias"),
    )
)
LAYOUTS = {"official": OFFICIAL, "other": OTHER}


def state(model=None, layout=None, seed=0, dtype=np.float32):
    """Random numbers for every official name."""
    rng = np.random.default_rng(seed)
    return {
        name: np.abs(rng.normal(size=s.shape)).astype(dtype)
        if jnp.issubdtype(s.dtype, jnp.floating)
        else np.zeros(s.shape, s.dtype)
        for name, s in manifest(LAYOUTS, model or Net(), layout).items()
    }


def identical(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes()
        for k in a
    )


# ------------------------------------------------------------------------------ there and back


def test_the_manifest_is_the_official_state_dict():
    got = {name: (s.shape, s.dtype.name) for name, s in manifest(LAYOUTS, Net()).items()}
    assert got == {
        "stem.weight": ((4, 3, 1, 1), "float32"),
        "stem.bias": ((4,), "float32"),
        "bn.weight": ((4,), "float32"),
        "bn.bias": ((4,), "float32"),
        "bn.running_mean": ((4,), "float32"),
        "bn.running_var": ((4,), "float32"),
        "pos": ((1, 16, 4), "float32"),
        **{f"blocks.{i}.qk.weight": ((8, 4), "float32") for i in (0, 1)},
        **{f"blocks.{i}.qk.bias": ((8,), "float32") for i in (0, 1)},
        **{f"blocks.{i}.fc.weight": ((4, 4), "float32") for i in (0, 1)},
        **{f"blocks.{i}.fc.bias": ((4,), "float32") for i in (0, 1)},
        "head.weight": ((3, 4), "float32"),
        "head.bias": ((3,), "float32"),
        "blocks.0.table": ((4,), "int64"),
        "blocks.1.table": ((5,), "int64"),
        "version": ((), "int64"),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_export_gives_back_what_convert_took(layout, scan, dtype):
    model = Net(scan_layers=scan)
    source = state(model, layout, dtype=dtype)
    if layout == "official":
        source |= {
            "blocks.0.table": np.arange(4),
            "blocks.1.table": np.arange(5),
            "version": np.array(2),
        }
    variables = convert(LAYOUTS, source, model)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(variables))
    assert identical(export(LAYOUTS, variables, model, layout), source)


@pytest.mark.parametrize("depth", [2, 3])
def test_a_rule_may_be_for_some_models_alone(depth):
    """Layers that a file counts from the last one back, whatever their number."""

    def counted_down(count):
        rules = [r for r in OTHER.rules if "{" not in r.sources[0].text]
        for i in range(count):
            for theirs, ours in (("q", "query"), ("k", "key"), ("f", "up")):
                for end, leaf in (("w", "kernel"), ("b", "bias")):
                    source = f"l.{count - 1 - i}.{theirs}.{end}"
                    target = f"layers_{i}/{ours}/{leaf}"
                    rules.append(Rule(source, target, when=lambda model: model.depth == count))
        return rules

    layouts = {"down": Rules([r for count in (2, 3) for r in counted_down(count)])}
    model = Net(depth=depth)
    variables = convert(LAYOUTS, state(model), model)
    file = export(layouts, variables, model)
    last = variables["params"][f"layers_{depth - 1}"]["query"]["kernel"]
    np.testing.assert_array_equal(file["l.0.q.w"], last)
    assert identical(flat_leaves(convert(layouts, file, model)), flat_leaves(variables))


def test_leaves_hold_the_tensors_in_our_layout():
    source = state()
    variables = convert(LAYOUTS, source, Net())
    flat = flat_leaves(variables)
    assert np.array_equal(flat["embed/kernel"], source["stem.weight"].transpose(2, 3, 1, 0))
    assert np.array_equal(flat["layers_1/key/kernel"], source["blocks.1.qk.weight"][4:].T)
    assert np.array_equal(flat["position"], source["pos"][0])
    assert np.array_equal(flat["batch_stats/bn/var"], source["bn.running_var"])
    out = Net().apply(variables, jnp.ones((1, 4, 4, 3)))
    assert out.shape == (1, 3) and np.isfinite(out).all()


def test_scanned_and_unrolled_forms_are_one_checkpoint():
    source = state()
    unrolled = convert(LAYOUTS, source, Net())
    scanned = convert(LAYOUTS, source, Net(scan_layers=True))
    want = stack_layers(unrolled["params"])
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), scanned["params"], want))
    images = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    np.testing.assert_allclose(
        Net(scan_layers=True).apply(scanned, images), Net().apply(unrolled, images), rtol=1e-6
    )


def test_the_layout_with_most_matches_is_used():
    source = state(layout="other")
    assert identical(export(LAYOUTS, convert(LAYOUTS, source, Net()), Net(), "other"), source)
    both = convert({"other": OTHER, "official": OFFICIAL}, state(), Net())
    assert identical(
        export(LAYOUTS, both, Net()),
        {k: v for k, v in state().items()}
        | {"blocks.0.table": np.arange(4), "blocks.1.table": np.arange(5), "version": np.array(2)},
    )


def test_derived_tensors_are_not_needed_and_not_believed():
    source = state()
    lean = {k: v for k, v in source.items() if "table" not in k and k != "version"}
    odd = source | {"blocks.0.table": np.zeros((7, 7)), "bn.num_batches_tracked": np.array(5)}
    a, b = convert(LAYOUTS, lean, Net()), convert(LAYOUTS, odd, Net())
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), a, b))
    assert "blocks.0.table" not in export(LAYOUTS, a, Net(tables=False))
    assert "bn.num_batches_tracked" not in export(LAYOUTS, a, Net())


def test_unused_tensors_are_dropped():
    convert(LAYOUTS, state() | {"teacher.head.weight": np.zeros(3)}, Net())


def test_export_is_a_view_where_it_can_be():
    variables = convert(LAYOUTS, state(), Net())
    kernel = np.asarray(variables["params"]["layers_0"]["up"]["kernel"])
    assert np.shares_memory(export(LAYOUTS, variables, Net())["blocks.0.fc.weight"], kernel)


def test_the_callers_arrays_are_not_kept():
    source = state()
    variables = convert(LAYOUTS, source, Net())
    for array in source.values():
        array[...] = 0
    assert identical(
        {"head.bias": export(LAYOUTS, variables, Net())["head.bias"]},
        {"head.bias": state()["head.bias"]},
    )


def test_float64_becomes_float32():
    variables = convert(LAYOUTS, state(dtype=np.float64), Net())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}


def test_files_stream_one_tensor_at_a_time(tmp_path, monkeypatch):
    save_safetensors(tmp_path / "a.safetensors", state())
    alive, most = set(), [0]
    from zoo.checkpoints import tensor as tensor_module

    read = tensor_module.Tensor.read

    def counted(self):
        import weakref

        array = read(self)
        base = array if array.base is None else array.base
        alive.add(id(base))
        weakref.finalize(base, alive.discard, id(base))
        most[0] = max(most[0], len(alive))
        return array

    monkeypatch.setattr(tensor_module.Tensor, "read", counted)
    monkeypatch.setattr(  # on CPU JAX may keep NumPy's memory as its own; copy, as a device does
        jax, "device_put", lambda value, sharding=None: jnp.array(np.array(value), copy=True)
    )
    convert(LAYOUTS, open_checkpoint(tmp_path / "a.safetensors"), Net())
    assert most[0] <= 2


def test_leaves_go_where_the_sharding_says():
    device = jax.devices()[0]
    single = jax.sharding.SingleDeviceSharding(device)
    seen = {}

    def place(path, shape):
        seen[path] = shape
        return single

    variables = convert(LAYOUTS, state(), Net(scan_layers=True), sharding=place)
    assert seen["layers/up/kernel"] == (2, 4, 4) and seen["batch_stats/bn/mean"] == (4,)
    assert {leaf.sharding for leaf in jax.tree.leaves(variables)} == {single}
    convert(LAYOUTS, state(), Net(), sharding=single)


# ------------------------------------------------------------------------------ what does not fit


def mismatch(source, model, **options) -> CheckpointMismatch:
    with pytest.raises(CheckpointMismatch) as error:
        convert(LAYOUTS, source, model, **options)
    assert isinstance(error.value, ValueError)
    return error.value


def test_everything_that_does_not_fit_is_named_at_once():
    source = state()
    source["blocks.0.fc.bias"] = np.zeros(9, np.float32)
    source["blocks.1.fcc.bias"] = source.pop("blocks.1.fc.bias")
    source["extra"] = np.zeros(1)
    error = mismatch(source, Net())
    assert error.missing == ("blocks.1.fc.bias",)
    assert error.unexpected == ("blocks.1.fcc.bias", "extra")
    assert error.misshapen == (("blocks.0.fc.bias", "shape (9,)", "shape (4,)"),)
    text = str(error)
    assert "Net" in text and "'official'" in text
    assert "blocks.1.fcc.bias (closest missing: blocks.1.fc.bias)" in text
    assert "blocks.0.fc.bias has shape (9,), wants shape (4,)" in text
    assert "adapt" not in text


def test_many_tensors_of_a_kind_are_one_item():
    text = str(mismatch(state(), Net(depth=40)))
    assert "blocks.*.fc.bias (38 tensors, 2 to 39)" in text
    assert len(text) < 600


def test_a_deeper_file_is_unexpected():
    error = mismatch(state(Net(depth=3)), Net())
    assert set(error.unexpected) == {
        f"blocks.2.{n}" for n in ("qk.weight", "qk.bias", "fc.weight", "fc.bias")
    }


def test_another_file_altogether_is_called_so():
    text = str(mismatch({"conv1.weight": np.zeros(1), "fc": np.zeros(1)}, Net()))
    assert "This is no checkpoint of Net" in text and "conv1.weight" in text
    assert "official, other" in text and "adapt" not in text
    assert "holds no tensors" in str(mismatch({}, Net()))


def test_a_half_of_a_joined_tensor_is_missing():
    layouts = {
        "joined": Rules(
            (
                *OFFICIAL.rules[:7],
                Rule(("a.{i}", "b.{i}"), "layers_{i}/query/kernel", concat(1)),
                *OTHER.rules[-8:],
            )
        )
    }
    source = {"a.0": np.zeros((4, 2), np.float32)}
    with pytest.raises(CheckpointMismatch) as error:
        convert(layouts, source, Net())
    assert "b.0" in error.value.missing and "a.0" not in error.value.missing


def test_integers_do_not_fill_floats():
    source = state()
    source["head.bias"] = np.zeros(3, np.int32)
    error = mismatch(source, Net())
    assert error.misshapen == (("head.bias", "shape (3,) of int32", "shape (3,) of float32"),)


def test_a_tensor_of_too_many_dimensions_is_misshapen():
    source = state()
    source["head.weight"] = source["head.weight"][None]
    assert mismatch(source, Net()).misshapen == (
        ("head.weight", "shape (1, 3, 4)", "shape (3, 4)"),
    )


def test_export_refuses_variables_of_another_model():
    variables = convert(LAYOUTS, state(), Net())
    with pytest.raises(CheckpointMismatch, match="not those of Net") as error:
        export(LAYOUTS, variables, Net(depth=3, num_classes=2))
    assert "layers_2/up/kernel" in error.value.missing
    assert {m.name for m in error.value.misshapen} == {"head/bias", "head/kernel"}
    with pytest.raises(ValueError, match="no layout 'nonsense'; known are official, other"):
        export(LAYOUTS, variables, Net(), "nonsense")


# ------------------------------------------------------------------------------ adapt


def test_another_head_is_refused_unless_asked_for():
    model = Net(num_classes=7)
    error = mismatch(state(), model)
    assert "adapt=True would start the head afresh" in str(error)
    variables = convert(LAYOUTS, state(), model, adapt=True, rng=jax.random.key(3))
    want = model.init(jax.random.key(3), jnp.zeros((1, 4, 4, 3)))["params"]["head"]
    assert jax.tree.all(
        jax.tree.map(lambda a, b: (a == b).all(), variables["params"]["head"], want)
    )
    assert np.array_equal(variables["params"]["position"], state()["pos"][0])


def test_only_the_fresh_leaves_are_computed(monkeypatch):
    jitted = []
    jit = jax.jit
    monkeypatch.setattr(leaves_module.jax, "jit", lambda f: jitted.append(jit(f)) or jitted[-1])
    model = Net(num_classes=7, depth=3)
    convert(LAYOUTS, state(Net(depth=3)), model, adapt=True)
    text = jitted[0].lower(jax.random.key(0)).compile().as_text()
    assert "16,4" not in text  # no position table, no layers
    assert "4,7" in text


def test_a_missing_head_starts_afresh_and_a_superfluous_one_is_dropped():
    headless = {k: v for k, v in state().items() if "head" not in k}
    assert "adapt=True would start the head afresh" in str(mismatch(headless, Net()))
    assert "head" in convert(LAYOUTS, headless, Net(), adapt=True)["params"]
    assert "adapt=True would drop the head" in str(mismatch(state(), Net(num_classes=0)))
    assert "head" not in convert(LAYOUTS, state(), Net(num_classes=0), adapt=True)["params"]


@pytest.mark.parametrize("scan", [False, True])
def test_tables_are_resized_when_asked_for(scan):
    model = Net(grid=6, num_classes=5, scan_layers=scan)
    error = mismatch(state(), model)
    assert "adapt=True would resize the tables that differ and start the head afresh" in str(error)
    position = convert(LAYOUTS, state(), model, adapt=True)["params"]["position"]
    assert np.array_equal(position, np.resize(state()["pos"][0], (36, 4)))
    assert position.dtype == np.float32


def test_adapt_does_not_forgive_the_rest():
    source = state() | {"extra": np.zeros(1)}
    error = mismatch(source, Net(num_classes=7), adapt=True)
    assert error.unexpected == ("extra",) and not error.misshapen
    assert "in part" in str(mismatch(source, Net(num_classes=7)))


def test_a_resize_of_the_wrong_shape_is_an_error():
    wrong = dataclasses.replace(OFFICIAL, resize={"position": lambda array, *_: array})
    with pytest.raises(ValueError, match=r"position was resized to \(16, 4\), not to \(36, 4\)"):
        convert({"official": wrong}, state(), Net(grid=6), adapt=True)


# ------------------------------------------------------------------------------ parts


@pytest.mark.parametrize(
    ("text", "name", "indices"),
    [
        ("a.{i}.b", "a.12.b", {"i": 12}),
        ("a.{i}.b", "a.012.b", None),
        ("a.{i}.b", "a.x.b", None),
        ("a.{i}.b", "a.1.b.c", None),
        ("a.{i}.b", "aX1.b", None),
        ("{i}.{j}", "3.4", {"i": 3, "j": 4}),
        ("{i}.{i}", "3.3", {"i": 3}),
        ("{i}.{i}", "3.4", None),
        ("a.{i+1}", "a.1", {"i": 0}),
        ("a.{i+1}", "a.0", None),
        ("a.{i-1}", "a.0", {"i": 1}),
        ("a.{2*i+1}", "a.5", {"i": 2}),
        ("a.{2*i+1}", "a.4", None),
        ("a[0].+", "a[0].+", {}),
    ],
)
def test_patterns_match_numbers(text, name, indices):
    pattern = Pattern(text)
    assert pattern.match(name) == indices
    if indices is not None:
        assert pattern.format(indices) == name


def test_wildcards_only_filter():
    assert Pattern("cls.*").match("cls.predictions.bias") == {}
    assert Pattern("l_{i}/*/bias").match("l_3/a/b/bias") == {"i": 3}
    with pytest.raises(ValueError, match="only filters"):
        Pattern("a.*").format({})
    for bad in ("a.{", "a.{}", "a.{i", "a.{0*i}", "a.{i*2}"):
        with pytest.raises(ValueError, match="Pattern"):
            Pattern(bad)


def test_a_rule_needs_the_same_indices_everywhere():
    with pytest.raises(ValueError, match="same indices"):
        Rule("a.{i}", "b_{j}").sources  # noqa: B018
    with pytest.raises(ValueError, match=r"'\*'"):
        Rule("a.*", "b").targets  # noqa: B018


def test_every_rule_of_every_system_is_well_formed():
    layouts = (
        rules for name in registry.list_models() for rules in registry.layouts(name).values()
    )
    for rules in {id(rules): rules for rules in layouts}.values():
        for rule in rules.rules:
            assert rule.sources
            assert rule.targets


@pytest.mark.parametrize(
    ("transform", "sources", "targets"),
    [
        (identity, [(2, 3)], [(2, 3)]),
        (linear, [(2, 3)], [(3, 2)]),
        (conv, [(5, 3, 2)], [(2, 3, 5)]),
        (conv, [(5, 3, 2, 4)], [(2, 4, 3, 5)]),
        (conv, [(5, 3, 2, 4, 6)], [(2, 4, 6, 3, 5)]),
        (squeeze(0), [(1, 3)], [(3,)]),
        (squeeze((0, 2)), [(1, 3, 1)], [(3,)]),
        (unsqueeze(1), [(3,)], [(3, 1)]),
        (transpose(2, 0, 1), [(2, 3, 4)], [(4, 2, 3)]),
        (reshape((2, -1), (2, 3, 4)), [(2, 3, 4)], [(2, 12)]),
        (concat(0), [(2, 3), (2, 3)], [(4, 3)]),
        (concat(1, (1, 3)), [(2, 1), (2, 3)], [(2, 4)]),
        (split(1), [(2, 6)], [(2, 2), (2, 2), (2, 2)]),
        (split(0, (1, 2)), [(3,)], [(1,), (2,)]),
        (stack(), [(2,), (2,), (2,)], [(3, 2)]),
        (stack(1), [(2,), (2,), (2,)], [(2, 3)]),
        (chain(linear, concat(1)), [(2, 3), (2, 3)], [(3, 4)]),
        (chain(linear, split(1), unsqueeze(0)), [(4, 3)], [(1, 3, 2), (1, 3, 2)]),
    ],
)
def test_transforms_are_their_own_way_back(transform, sources, targets):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in sources]
    bound = transform.bound(len(sources), len(targets))
    there = bound.forward(list(arrays))
    assert [x.shape for x in there] == targets
    back = bound.inverse(there)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, back, strict=True))


def test_tied_tensors_must_be_equal():
    x = np.arange(4, dtype=np.float32)
    both = tied.bound(2, 1)
    assert both.forward([x, x.copy()])[0] is x
    assert [y is x for y in both.inverse([x])] == [True, True]
    with pytest.raises(ValueError, match="differ in value"):
        both.forward([x, x + 1])
    layouts = {
        "only": dataclasses.replace(
            OFFICIAL,
            rules=(*OFFICIAL.rules[:-1], Rule(("head.bias", "head.bias2"), "head/bias", tied)),
        )
    }
    source = state() | {"head.bias2": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"head\.bias and head\.bias2: tied tensors differ"):
        convert(layouts, source, Net())
    source["head.bias2"] = source["head.bias"]
    variables = convert(layouts, source, Net())
    assert np.array_equal(export(layouts, variables, Net())["head.bias2"], source["head.bias"])


def test_a_transform_may_depend_on_the_model():
    def halves(model):
        return reshape((model.depth, -1), (-1,))

    rule = Rule("a", "b", halves)
    assert rule.bound(Net(depth=2)).forward([np.zeros(6)])[0].shape == (2, 3)
    double = Transform(lambda xs: [2 * xs[0]], lambda xs: [xs[0] / 2])
    assert chain(double).bound(1, 1).inverse([np.array(3.0)])[0] == 1.5
