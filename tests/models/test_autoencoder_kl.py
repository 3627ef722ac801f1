import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    assert_trees_close,
    documented_shapes,
    feature_shapes,
    filled,
    filled_state_dict,
)

import zoo
from zoo.checkpoints.rules import manifest
from zoo.models.imaging import autoencoder_kl


@pytest.fixture(scope="module")
def small():
    model = zoo.create("autoencoder_kl_test")
    return model, filled(model)


def images(height=8, width=12, batch=2):
    return jax.random.uniform(jax.random.key(0), (batch, height, width, 3), minval=-1)


def run(model, variables, *inputs, method="features"):
    return jax.jit(lambda v, *x: model.apply(v, *x, method=method))(variables, *inputs)


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(autoencoder_kl.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_maps_are_halved_with_zeros_at_the_right_and_below():
    x = jax.random.normal(jax.random.key(0), (1, 6, 4, 1))
    filters = np.zeros((2, 3, 3, 1, 1), np.float32)
    filters[0, 0, 0], filters[1, 2, 2] = 1, 1

    def with_filter(kernel):
        def conv(channels, size, strides, padding, name):
            return lambda x: jax.lax.conv_general_dilated(
                x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        return autoencoder_kl.halve(x, conv)

    np.testing.assert_array_equal(with_filter(filters[0]), x[:, ::2, ::2])
    last = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 2::2, 2::2]
    np.testing.assert_array_equal(with_filter(filters[1]), last)


def test_latents_are_scaled_on_the_way_out_and_back_on_the_way_in(small):
    model, variables = small

    @jax.jit
    def there_and_back(variables, x):
        models = (model.clone(scale=s, shift=t) for s, t in ((1.0, 0.0), (0.25, -2.0)))
        parts = []
        for m in models:
            whole = m.apply(variables, x, method="features")
            latents = m.apply(variables, x, method="encode")
            parts.append((whole, latents, m.apply(variables, latents, method="decode")))
        return parts

    (plain, *_), (moved, *_) = both = there_and_back(variables, images())
    assert_trees_close(moved["latents"], 0.25 * (np.asarray(plain["latents"]) + 2), 1e-6)
    assert_trees_close(moved["image"], plain["image"], 1e-5)
    for whole, latents, image in both:
        assert_trees_close(latents, whole["latents"], 1e-6)
        assert_trees_close(image, whole["image"], 1e-5)


def test_latents_are_drawn_with_the_deviation_that_the_encoder_says(small):
    model, variables = small
    key = jax.random.key(3)
    mean, log_variance = jnp.split(run(model, variables, images())["moments"], 2, -1)
    drawn = run(model, variables, images(), key, method="encode")
    deviation = (drawn / model.scale - mean) / jax.random.normal(key, mean.shape)
    assert_trees_close(deviation, jnp.exp(0.5 * log_variance), 1e-4)
    assert np.std(deviation) > 0.01


def test_files_of_before_and_after_the_renaming_give_the_same_variables():
    model = zoo.create("autoencoder_kl_test")
    state = filled_state_dict(model)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name):
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        return name

    before = {renamed(name): value for name, value in state.items()}
    assert set(before) == set(zoo.export(model, zoo.convert(model, state), "hub"))
    assert len(set(before) - set(state)) == 16
    jax.tree.map(np.testing.assert_array_equal, zoo.convert(model, before),
                 zoo.convert(model, state))  # fmt: skip


def official_name(name, stages):
    """The official code's name of a tensor that diffusers calls `name`."""
    half, _, rest = name.partition(".")
    words = {"resnets": "block", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}
    part = rest.split(".")
    if part[0] in ("down_blocks", "up_blocks"):
        way, stage = part[0].removesuffix("_blocks"), int(part[1])
        number = stage if way == "down" else stages - 1 - stage
        inside = [f"{way}sample"] + part[4:] if "samplers" in part[2] else part[2:]
        part = [way, str(number), *inside]
    elif part[:2] == ["mid_block", "resnets"]:
        part = ["mid", f"block_{int(part[2]) + 1}", *part[3:]]
    elif part[0] == "mid_block":
        words |= {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
        part = ["mid", "attn_1", *(p for p in part[3:] if p != "0")]
    return ".".join([half, *(words.get(p, p) for p in part)])


@pytest.mark.parametrize("channels", [(8, 16), (8, 8, 16)])
def test_files_in_the_official_names_give_the_same_image_and_are_written_back(channels):
    model = zoo.create("autoencoder_kl_test", channels=channels)
    state = filled_state_dict(model)
    official = {}
    for name, value in state.items():
        kernel = value.ndim == 2
        official[official_name(name, len(channels))] = value[..., None, None] if kernel else value
    assert official["decoder.mid.attn_1.proj_out.weight"].shape == (16, 16, 1, 1)
    assert f"decoder.up.{len(channels) - 1}.upsample.conv.weight" in official
    beside = {
        "model.diffusion_model.out.2.weight": np.zeros((4, 8, 3, 3), np.float32),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": np.zeros(8, np.float32),
        "first_stage_model.loss.logvar": np.zeros((), np.float32),
    }
    whole = {f"first_stage_model.{name}": value for name, value in official.items()} | beside
    variables = zoo.convert(model, state)
    for file in (official, whole):
        jax.tree.map(np.testing.assert_array_equal, zoo.convert(model, file), variables)
    written = zoo.export(model, variables, "official")
    assert set(written) == set(official)
    for name, value in official.items():
        np.testing.assert_array_equal(written[name], value)
    if len(channels) == 2:  # the widths tell any other stage apart
        image = run(model, zoo.convert(model, official), images())["image"]
        np.testing.assert_array_equal(image, run(model, variables, images())["image"])


def test_the_stages_of_the_official_decoder_count_down():
    """Shapes of the published file: the narrowest stage, the image's own size, is number 0."""
    shapes = manifest(autoencoder_kl.LAYOUTS, zoo.create("sd_vae_ft_mse"), "official")
    for name, shape in {
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    }.items():
        assert shapes[name].shape == shape
    assert "decoder.up.0.upsample.conv.weight" not in shapes and len(shapes) == 248


def test_hub_ids_lead_to_their_variant():
    for name, scale in (("sd-vae-ft-mse", 0.18215), ("sdxl-vae", 0.13025)):
        assert zoo.create(f"stabilityai/{name}").scale == scale


def test_what_does_not_fit_is_said_in_a_sentence(small):
    model, variables = small
    for given, method, message in (
        (images(9, 8), "features", "9x8 is no whole number of latents of 2x2 pixels"),
        (images()[..., :1], "features", r"images of shape \(batch, height, width, 3\)"),
        (np.zeros((1, 8, 8, 3), np.uint8), "features", "floats from -1 to 1, not uint8"),
        (images(), "decode", r"latents of shape \(batch, rows, columns, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.apply(variables, given, method=method)
    with pytest.raises(ValueError, match="norm_groups=3 does not divide"):
        jax.eval_shape(model.clone(norm_groups=3).init, jax.random.key(0), images())
