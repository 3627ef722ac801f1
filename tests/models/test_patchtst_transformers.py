import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import documented_shapes, feature_shapes, filled

import zoo
from zoo.checkpoints import files
from zoo.models.timeseries import patchtst_transformers
from zoo.prediction import answers, of_model
from zoo.prediction.answers import Options

NAME = "transformers_patchtst_test"
CONFIG = dict(
    model_type="patchtst", architectures=["PatchTSTForPrediction"], num_input_channels=3,
    context_length=26, prediction_length=12, patch_length=8, patch_stride=4, num_hidden_layers=1,
    d_model=32, num_attention_heads=4, ffn_dim=64, pooling_type=None, loss="mse",
)  # fmt: skip


def folder(path, **config):
    """A folder of transformers, and the model that it is."""
    config = {**CONFIG, **config}
    fields = dict(variate_attention=False, learned_positions=False, depth=1)
    heads = {"PatchTSTForPretraining": "patches", "PatchTSTForClassification": "classes"}
    fields["head"] = heads.get(config["architectures"][0], "forecast")
    fields["num_classes"] = config.get("num_targets", 0)
    fields["pooling"] = config["pooling_type"] or "none"
    model = zoo.create(NAME, **fields)
    files.save_safetensors(path / "model.safetensors", zoo.export(model, filled(model)))
    (path / "config.json").write_text(json.dumps(config))
    return model


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(patchtst_transformers.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def test_patches_end_with_the_series():
    found = patchtst_transformers.patches_to_the_end(jnp.arange(26.0)[None, None], 8, 4)[0, 0]
    assert found.shape == (5, 8)
    np.testing.assert_array_equal(found[0], np.arange(2, 10))
    np.testing.assert_array_equal(found[-1], np.arange(18, 26))


def test_hidden_patches_are_not_seen():
    model = zoo.create(NAME, head="patches", depth=1, scaling="none")
    variables = filled(model)
    run = jax.jit(model.apply)
    x = jax.random.normal(jax.random.key(0), (1, 26, 3))
    hidden = np.zeros((1, 3, 5), bool)
    hidden[:, :, -2:] = True  # steps 14 to 25; steps 14 to 17 are in a patch that is seen, too
    got = run(variables, x, hidden)
    np.testing.assert_array_equal(got, run(variables, x.at[:, 18:].set(9), hidden))
    assert np.abs(got - run(variables, x, ~hidden)).max() > 1e-3
    with pytest.raises(ValueError, match=r"takes hidden of shape \(1, 3, 5\)"):
        model.apply(variables, x, hidden[:, :, :2])


def test_a_folder_is_the_model_that_its_config_says(tmp_path):
    model = folder(tmp_path)
    loaded, _ = zoo.load(tmp_path)
    assert loaded == model
    table = tmp_path / "mine.csv"
    rows = [f"2024-01-{day:02},{day % 7},{day % 5},{day}" for day in range(1, 31)]
    table.write_text("\n".join(["date,a,b,c", *rows]))
    said = list(answers(of_model(None, tmp_path), [table]))
    assert len(said) == 12 and said[0]["date"] == "2024-01-31 00:00:00"
    assert all(np.isfinite(row["c"]) for row in said)
    table.write_text("\n".join(["day;a;b;c", *(row.replace(",", ";") for row in rows)]))
    again = list(answers(of_model(None, tmp_path), [table], Options(table={"date": "day"})))
    assert [row["c"] for row in again] == [row["c"] for row in said]
    with pytest.raises(ValueError, match="A table has no field 'dates'; its fields are columns"):
        next(answers(of_model(None, tmp_path), [table], Options(table={"dates": "day"})))


def test_a_pretrained_folder_gets_a_forecasting_head(tmp_path):
    folder(tmp_path, architectures=["PatchTSTForPretraining"])
    _, variables, report = zoo.load(tmp_path, head="forecast", adapt=True, return_report=True)
    assert set(report.fresh) == {"head/kernel", "head/bias"}
    assert variables["params"]["head"]["kernel"].shape == (5 * 32, 12)


@pytest.mark.parametrize(
    "config, sentence",
    [
        (dict(loss="nll"), "loss='nll': this PatchTSTForPrediction gives a distribution"),
        (dict(share_projection=False), "says share_projection=False"),
        (dict(model_type="informer"), "draws a forecast from a distribution"),
        (dict(model_type="autoformer"), "Autoformer is that of github.com/thuml"),
    ],
)
def test_what_gives_distributions_is_refused(tmp_path, config, sentence):
    folder(tmp_path, **config)
    with pytest.raises(ValueError, match=sentence):
        zoo.load(tmp_path)
