"""Files as people have them: wrapped, with several sets of weights, with more than the weights."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_writer as tw

from zoo.checkpoints.files import CheckpointError, UnsafeCheckpoint, open_checkpoint
from zoo.checkpoints.mismatch import CheckpointMismatch
from zoo.checkpoints.naming import _unstacked
from zoo.checkpoints.rules import (
    Rules,
    _InMemory,
    conv_rules,
    convert,
    convert_with_report,
    dense_rules,
)


class Net(nn.Module):
    """A convolution, `depth` dense layers and a head."""

    width: int = 6
    depth: int = 2
    num_classes: int = 3
    in_channels: int = 3
    param_dtype: jnp.dtype = jnp.float32

    def example_inputs(self, batch_size=1):
        return {"images": jax.ShapeDtypeStruct((batch_size, 4, 4, self.in_channels), jnp.float32)}

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(self.width, (2, 2), (2, 2), name="embed")(images).mean((1, 2))
        for i in range(self.depth):
            x = nn.Dense(self.width, name=f"layers_{i}")(x)
        return nn.Dense(self.num_classes, name="head")(x)


LAYOUTS = {
    "official": Rules(
        (
            *conv_rules("embed", "embed"),
            *dense_rules("blocks.{i}.fc", "layers_{i}"),
            *dense_rules("head", "head"),
        ),
        fresh=("head/*",),
    )
}


def state(seed=0, **fields) -> dict[str, np.ndarray]:
    random, net = np.random.default_rng(seed), Net(**fields)
    names = {"embed": (net.width, net.in_channels, 2, 2), "head": (net.num_classes, net.width)}
    names |= {f"blocks.{i}.fc": (net.width, net.width) for i in range(net.depth)}
    arrays = {f"{n}.weight": random.normal(size=shape) for n, shape in names.items()}
    arrays |= {f"{n}.bias": random.normal(size=shape[:1]) for n, shape in names.items()}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def equal(one, other) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


PLAIN = convert(LAYOUTS, state(), Net())


@pytest.mark.parametrize(
    "prefix", ["model.", "net.backbone.", "0.auto_model.", "_orig_mod.module.", "params/", "a.b.c."]
)
def test_any_prefix_is_stripped_and_said(prefix):
    wrapped = {prefix + name: array for name, array in state().items()}
    beside = {"other.weight": np.ones(3, np.float32)}
    variables, report = convert_with_report(LAYOUTS, wrapped | beside, Net())
    assert equal(variables, PLAIN)
    assert prefix.replace("_orig_mod.", "") in str(report) and "other.weight" in report.aside


def test_a_head_may_stand_beside_the_wrapped_trunk():
    wrapped = {n if n.startswith("head") else f"backbone.{n}": a for n, a in state().items()}
    assert equal(convert(LAYOUTS, wrapped, Net()), PLAIN)


def test_compiled_parts_have_their_names_back():
    wrapped = {n.replace(".fc.", "._orig_mod.fc."): a for n, a in state().items()}
    assert equal(convert(LAYOUTS, wrapped, Net()), PLAIN)


def test_names_of_teacher_and_student_are_two_sets():
    both = {f"student.backbone.{n}": a for n, a in state(1).items()}
    both |= {f"teacher.backbone.{n}": a for n, a in state().items()}
    variables, report = convert_with_report(LAYOUTS, both, Net())
    assert equal(variables, PLAIN) and "student" in str(report)
    student = convert(LAYOUTS, both, Net(), weights="student")
    assert equal(student, convert(LAYOUTS, state(1), Net()))
    with pytest.raises(ValueError, match="no weights 'averaged'"):
        convert(LAYOUTS, both, Net(), weights="averaged")


@pytest.fixture
def saved(tmp_path):
    def save(entries: dict[str, dict[str, np.ndarray]], more: bytes = b""):
        data, parts = {}, {}
        for entry, arrays in entries.items():
            inner = {}
            for name, array in arrays.items():
                key = str(len(data))
                data[key] = array.tobytes()
                inner[name] = tw.tensor(key, array)
            parts[entry] = tw.mapping(inner)
        if more:
            parts["more"] = more
        return tw.zip_file(tmp_path / "a.pth", tw.pickled(tw.mapping(parts)), data)

    return save


def test_averaged_weights_are_taken_and_raw_ones_on_request(saved):
    x, y = np.zeros(2, np.float32), np.ones(2, np.float32)
    path = saved({"state_dict": {"w": x}, "state_dict_ema": {"w": y}, "optimizer": {"m": x}})
    opened = open_checkpoint(path)
    assert opened["w"].read().tolist() == [1, 1] and "raw" in opened.notes[0]
    assert open_checkpoint(path, "raw")["w"].read().tolist() == [0, 0]
    assert open_checkpoint(path, "state_dict")["w"].read().tolist() == [0, 0]
    with pytest.raises(ValueError, match="teacher"):
        open_checkpoint(path, "teacher")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("packaging.version", "Version"), ("mmengine.logging.history_buffer", "HistoryBuffer"),
        ("omegaconf.dictconfig", "DictConfig"), ("functools", "partial"), ("__main__", "Args"),
        ("torch.torch_version", "TorchVersion"), ("datetime", "datetime"),
        ("torch.optim.lr_scheduler", "LambdaLR"),
    ],
)  # fmt: skip
def test_objects_beside_the_weights_are_passed_over(saved, module, name):
    more = tw.call(tw.symbol(module, name), tw.text("x")) + b"}b"
    path = saved({"model": {"w": np.ones(2, np.float32)}}, more)
    assert open_checkpoint(path)["w"].read().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("module", "name"),
    [("subprocess", "Popen"), ("some.library", "run"), ("numpy.f2py", "run_main"), ("dill", "X")],
)
def test_functions_and_the_systems_own_classes_are_refused(saved, module, name):
    more = tw.call(tw.symbol(module, name), tw.text("x"))
    with pytest.raises(UnsafeCheckpoint, match=name):
        open_checkpoint(saved({"model": {"w": np.ones(2, np.float32)}}, more))


def test_leftovers_are_left_aside_and_others_need_a_word():
    more = {"total_ops": np.zeros(1), "mask_token": np.zeros(1), "decoder_blocks.0.w": np.zeros(1)}
    variables, report = convert_with_report(LAYOUTS, state() | more, Net())
    assert equal(variables, PLAIN) and set(report.aside) == set(more)
    odd = state() | {"blocks.0.gate": np.zeros(1)}
    with pytest.raises(CheckpointMismatch, match=r"ignore=\('blocks.0.gate',\)"):
        convert(LAYOUTS, odd, Net())
    assert equal(convert(LAYOUTS, odd, Net(), ignore=("*gate",)), PLAIN)


def test_names_can_be_changed_by_pattern():
    other = {n.replace("blocks.", "stage.").replace("fc", "lin"): a for n, a in state().items()}
    rename = {"stage.*.lin.*": "blocks.*.fc.*"}
    assert equal(convert(LAYOUTS, other, Net(), rename=rename), PLAIN)
    with pytest.raises(ValueError, match="as many"):
        convert(LAYOUTS, other, Net(), rename={"stage.*": "blocks"})
    with pytest.raises(ValueError, match="is no dict of"):
        convert(LAYOUTS, other, Net(), rename=[("stage.*", "blocks.*")])


def test_the_error_gives_the_settings_that_fit_first():
    other = state(num_classes=7, depth=3, width=5)
    with pytest.raises(CheckpointMismatch) as error:
        convert(LAYOUTS, other, Net())
    text = str(error.value)
    assert "The file fits with" in text
    assert error.value.settings == {"num_classes": 7, "depth": 3, "width": 5}
    assert all(part in text for part in ("num_classes=7", "depth=3", "width=5"))
    convert(LAYOUTS, other, Net(**error.value.settings))


def test_adapting_reports_what_is_fresh_resized_and_dropped():
    variables, report = convert_with_report(
        LAYOUTS, state(), Net(num_classes=7, in_channels=1), adapt=True
    )
    assert report.fresh == ("head/bias", "head/kernel") or set(report.fresh) == {
        "head/bias", "head/kernel",
    }  # fmt: skip
    assert report.resized == {"embed/kernel": ((2, 2, 3, 6), (2, 2, 1, 6))}
    assert all(word in str(report) for word in ("Fresh", "Resized", "embed/kernel"))
    kernel = PLAIN["params"]["embed"]["kernel"]
    assert np.allclose(variables["params"]["embed"]["kernel"], kernel.sum(2, keepdims=True))


def test_the_model_decides_on_the_type_if_it_is_not_the_usual_one():
    leaves = jax.tree.leaves(convert(LAYOUTS, state(), Net(param_dtype=jnp.bfloat16)))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


def test_an_adapter_is_called_one():
    adapter = {f"base_model.model.blocks.{i}.fc.lora_A.weight": np.zeros((2, 6)) for i in range(2)}
    with pytest.raises(ValueError, match=r"adapter.*with_adapter"):
        convert(LAYOUTS, adapter, Net())


def test_a_model_that_peft_wrapped_is_read_once_its_adapter_is_merged():
    wrapped = {f"base_model.model.{name}": x for name, x in state().items()}
    assert equal(convert(LAYOUTS, wrapped, Net()), PLAIN)
    unmerged = dict(wrapped)
    base = unmerged.pop("base_model.model.blocks.0.fc.weight")
    unmerged["base_model.model.blocks.0.fc.base_layer.weight"] = base
    unmerged["base_model.model.blocks.0.fc.lora_A.default.weight"] = np.zeros((2, 6))
    with pytest.raises(ValueError, match=r"not merged .*merge_and_unload\(\)"):
        convert(LAYOUTS, unmerged, Net())


def test_of_two_models_beside_each_other_one_must_be_named():
    pair = {f"query_encoder.{name}": x for name, x in state().items()}
    pair |= {f"key_encoder.{name}": x for name, x in state(1).items()}
    with pytest.raises(
        ValueError, match=r"'key_encoder\.' and 'query_encoder\.'; weights='key_enc"
    ):
        convert(LAYOUTS, pair, Net())
    assert equal(convert(LAYOUTS, pair, Net(), weights="query_encoder"), PLAIN)
    with pytest.raises(ValueError, match="holds no weights 'image'"):
        convert(LAYOUTS, pair, Net(), weights="image")


def test_flax_files_are_read_one_array_at_a_time(tmp_path, monkeypatch):
    tree = {"params": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, "step": 3}
    tree["params"]["b"] = jnp.ones(2, jnp.bfloat16)
    path = tmp_path / "a.msgpack"
    for size in (1 << 30, 8):  # whole, and in chunks
        monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", size)
        path.write_bytes(flax.serialization.to_bytes(tree))
        opened = open_checkpoint(path)
        assert set(opened) == {"params/w", "params/b"}
        assert np.array_equal(opened["params/w"].read(), tree["params"]["w"])
    raw = path.read_bytes()
    for cut in range(len(raw)):
        path.write_bytes(raw[:cut])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    path.write_bytes(b"\x81\xa1a\xc7\x01\x05\x00")
    with pytest.raises(UnsafeCheckpoint, match="extension of type 5"):
        open_checkpoint(path)


def test_flax_names_and_layouts_are_those_of_torch_turned_round():
    flax_names = {}
    for name, array in state().items():
        stem, leaf = name.rsplit(".", 1)
        kernel = leaf == "weight"
        turned = np.moveaxis(array, (0, 1), (-1, -2)) if kernel else array
        flax_names["params/" + stem.replace(".", "/") + ("/kernel" if kernel else "/bias")] = turned
    assert equal(convert(LAYOUTS, flax_names, Net()), PLAIN)


def test_scanned_blocks_of_big_vision_are_taken_apart():
    whole = {f"Transformer/encoderblock_{i}/fc/kernel": np.full((2, 2), i) for i in range(3)}
    stacked = {"Transformer/encoderblock/fc/kernel": np.stack(list(whole.values()))}
    taken = _unstacked({n: _InMemory(a) for n, a in stacked.items()})
    assert {t.name for t in taken.values()} == set(whole)
    assert all(np.array_equal(t.read(), whole[t.name]) for t in taken.values())


def test_a_trunk_that_was_saved_by_itself_gets_its_prefix():
    rules = Rules(
        (
            *conv_rules("trunk.embed", "embed"),
            *dense_rules("trunk.blocks.{i}.fc", "layers_{i}"),
            *dense_rules("head", "head"),
        ),
        fresh=("head/*",),
    )
    trunk = {n: a for n, a in state().items() if not n.startswith("head")}
    variables, report = convert_with_report({"whole": rules}, trunk, Net(), adapt=True)
    assert equal(variables["params"]["embed"], PLAIN["params"]["embed"])
    assert "'trunk.', which was added" in str(report) and len(report.fresh) == 2
