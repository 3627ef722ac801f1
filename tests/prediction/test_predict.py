"""Answers for inputs of one's own, from runs that were saved without being trained."""

import csv
import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from zoo.checkpoints.runs import Checkpoints
from zoo.cli import main
from zoo.data import Arrays, Data, ImageFolder
from zoo.data.parts import facts
from zoo.data.series import Segments, Table, Windows
from zoo.data.transforms import Normalize, Resize
from zoo.errors import ConfigError
from zoo.prediction import answers, of_run
from zoo.prediction.answers import Options
from zoo.tasks import (
    AnomalyDetection,
    Classification,
    Forecasting,
    ImageRestoration,
    Imputation,
    LanguageModelling,
    Regression,
)
from zoo.training import Model, TrainConfig, config
from zoo.training.program import build_model


class Brightness(nn.Module):
    """Classes by how bright an image is; a bias alone is learnt."""

    size: int = 4
    num_classes: int = 2

    def example_inputs(self, batch_size=1):
        return {"images": jax.ShapeDtypeStruct((batch_size, self.size, self.size, 3), jnp.float32)}

    @nn.compact
    def __call__(self, images, train=False):
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        return jnp.stack([-images.mean((1, 2, 3)), images.mean((1, 2, 3))], 1) * 4 + bias

    def features(self, images, train=False):
        return {"mean": images.mean((1, 2)), "logits": self(images)}


class Twice(nn.Module):
    """Images twice as large."""

    def example_inputs(self, batch_size=1):
        return {"images": jax.ShapeDtypeStruct((batch_size, 8, 8, 3), jnp.float32)}

    @nn.compact
    def __call__(self, images, train=False):
        factor = self.param("factor", nn.initializers.ones, ())
        return images.repeat(2, 1).repeat(2, 2) * factor


class Last(nn.Module):
    """The last value, or the window itself, and a parameter."""

    context_length: int = 6
    horizon: int = 3
    whole: bool = False

    def example_inputs(self, batch_size=1):
        shape = (batch_size, self.context_length, 1)
        return {"series": jax.ShapeDtypeStruct(shape, jnp.float32)}

    @nn.compact
    def __call__(self, series, train=False):
        factor = self.param("factor", nn.initializers.ones, ())
        if self.whole:
            return jnp.broadcast_to(series.mean(1, keepdims=True), series.shape) * factor
        return jnp.repeat(series[:, -1:], self.horizon, 1) * factor


class Sum(nn.Module):
    """A number an example."""

    def example_inputs(self, batch_size=1):
        return {"x": jax.ShapeDtypeStruct((batch_size, 3), jnp.float32)}

    @nn.compact
    def __call__(self, x, train=False):
        return x.sum(1, keepdims=True) + self.param("bias", nn.initializers.zeros, ())

    def features(self, x, train=False):
        return {"logits": self(x)}


def saved(folder, name, task, data, **overrides):
    """A run directory with the first parameters of a network of this file, or of the zoo."""
    reference = name if isinstance(name, str) else f"{__file__}:{name.__name__}"
    made = TrainConfig(model=Model(reference, overrides), task=task, data=data)
    network = build_model(made.model)
    zeros = {k: jnp.zeros(s.shape, s.dtype) for k, s in network.example_inputs().items()}
    variables = jax.jit(network.init)(jax.random.key(0), **zeros)
    checkpoints = Checkpoints(folder)
    extra = {"config": config.to_json(made), "facts": facts(data.train)}
    checkpoints.save(1, {"params": variables["params"]}, extra)
    checkpoints.close()
    return folder


def paint(folder, name, grey, size=(4, 4)):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey,) * 3).save(folder / name)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    home = tmp_path_factory.mktemp("photos")
    paint(home / "data/dark", "a.png", 10)
    paint(home / "data/light", "b.png", 240)
    source = ImageFolder(home / "data")
    steps = (Resize((4, 4)), Normalize((0.5,) * 3, (0.5,) * 3))
    data = Data(source, source, steps, steps, batch_size=4)
    run = saved(home / "run", Brightness, Classification(), data)
    (home / "data").rename(home / "gone")  # the training data need not be there
    paint(home / "new/deep", "light.jpg", 250, (9, 7))
    paint(home / "new", "dark.png", 0, (5, 5))
    paint(home / "new", "._x.png", 0)
    return home, run


def test_images_in_folders_get_labels_with_probabilities(photos, tmp_path, capsys):
    home, run = photos
    rows = list(answers(of_run(run), [home / "new"]))
    assert [(row["input"].rsplit("/")[-1], row["label"]) for row in rows] == [
        ("dark.png", "dark"), ("light.jpg", "light"),
    ]  # fmt: skip
    assert rows[0]["probability"] > 0.99 and rows[0]["label2"] == "light"
    assert main(["predict", str(run), str(home / "new"), "--out", str(tmp_path / "a.csv")]) == 0
    with open(tmp_path / "a.csv", newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["dark", "light"]
    one = str(home / "new/dark.png")
    assert main(["predict", str(run), one, "--json", "--feature", "mean"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    np.testing.assert_allclose(said["embedding"], [-1, -1, -1], atol=1e-6)


def test_rows_come_before_all_inputs_are_read(photos):
    home, run = photos
    asked = []

    def inputs():
        for i in range(9):
            asked.append(i)
            yield home / "new/dark.png"

    rows = answers(dataclasses.replace(of_run(run), batch_size=2), inputs())
    assert next(rows)["label"] == "dark"
    assert len(asked) == 2


def test_what_cannot_be_answered_is_one_sentence(photos, tmp_path, capsys):
    _, run = photos
    for args, said in (
        ([str(run), str(tmp_path / "none.png")], "There is no file or folder"),
        ([str(tmp_path), "x.png"], "There is no checkpoint of a run in"),
        (["swin_test", "x.png"], "give its weights and an input"),
        ([str(run)], "If it has moved, give --data.train.path"),
        ([str(run), str(tmp_path), "--feature", "no"], "There is no feature 'no'; there are"),
    ):
        assert main(["predict", *args]) == 2
        out = capsys.readouterr().err.strip()
        assert said in out and "\n" not in out, out


def test_an_older_file_stays_until_there_is_an_answer(photos, tmp_path, capsys):
    _, run = photos
    older = tmp_path / "older.csv"
    older.write_text("precious")
    assert main(["predict", str(run), str(tmp_path / "none.png"), "--out", str(older)]) == 2
    assert older.read_text() == "precious"
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\nthree\n")
    assert main(["predict", str(run), "x.png", "--classes", str(names)]) == 2
    assert "has 3 names, and the model 2 classes" in capsys.readouterr().err
    np.savez(tmp_path / "nan.npz", images=np.full((1, 4, 4, 3), np.nan, "f"))
    assert main(["predict", str(run), str(tmp_path / "nan.npz")]) == 2
    assert "The probabilities are no numbers (NaN)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "load.csv"
    rows = [f"2021-01-{1 + i // 24:02d} {i % 24:02d}:00,{100 + i}" for i in range(60)]
    path.write_text("\n".join(["date,load", *rows]))
    return Table(path)


def test_a_forecast_goes_past_the_last_row_in_the_units_of_the_file(table, tmp_path):
    windows = [Windows(table, s, 6, 3, time_features=None) for s in ("train", "val")]
    run = saved(tmp_path / "run", Last, Forecasting(), Data(*windows))
    longer = tmp_path / "new.csv"
    longer.write_text(table.path.read_text() + "\n2021-01-03 12:00,500\n")
    rows = list(answers(of_run(run), [longer], Options(folder=tmp_path / "out")))
    assert [row["date"] for row in rows] == [f"2021-01-03 {h}:00:00" for h in (13, 14, 15)]
    np.testing.assert_allclose([row["load"] for row in rows], 500, rtol=1e-5)
    assert (tmp_path / "out/new.forecast.png").read_bytes().startswith(b"\x89PNG")
    longer.write_text("date,price\n2021-01-01,1\n")
    with pytest.raises(ConfigError, match="no column 'load'; its columns are date, price"):
        list(answers(of_run(run), [longer]))


def test_held_out_forecasts_stand_beside_the_truth(table, tmp_path, capsys):
    windows = [Windows(table, s, 6, 3, time_features=None) for s in ("train", "val")]
    run = saved(tmp_path / "run", Last, Forecasting(), Data(*windows))
    assert main(["predict", str(run), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3 * len(windows[1])
    assert rows[0]["true load"] == 142 and rows[0]["load"] == pytest.approx(141)


def test_rows_of_an_unlabelled_series_get_scores(table, tmp_path):
    data = Data(Segments(table, "train", 6), Segments(table, "test", 6))
    run = saved(tmp_path / "run", Last, AnomalyDetection(), data, whole=True, horizon=6)
    text = table.path.read_text().replace(",130", ",9000")
    (tmp_path / "new.csv").write_text(text)
    rows = list(answers(of_run(run), [tmp_path / "new.csv"]))
    assert len(rows) == 60
    assert max(rows, key=lambda row: row["score"])["date"] == "2021-01-02 06:00:00"


def test_missing_values_are_filled_in(table, tmp_path):
    data = Data(*[Windows(table, "train", 6, 0, time_features=None)] * 2)
    run = saved(tmp_path / "run", Last, Imputation(), data, whole=True, horizon=6)
    (tmp_path / "new.csv").write_text(table.path.read_text().replace(",103", ","))
    rows = list(answers(of_run(run), [tmp_path / "new.csv"]))
    assert [row["load"] for row in rows[:3]] == [100, 101, 102]
    mean, _ = table.scale
    assert rows[3]["load"] == pytest.approx((100 + 101 + 102 + 104 + 105 + mean[0]) / 6, rel=1e-4)


def test_images_are_restored_into_files(tmp_path):
    small = np.zeros((4, 8, 8, 3), "f")
    data = Data(*[Arrays(image=small, target=small.repeat(2, 1).repeat(2, 2))] * 2)
    run = saved(tmp_path / "run", Twice, ImageRestoration(), data)
    paint(tmp_path / "small", "a.png", 77, (100, 30))
    (row,) = answers(of_run(run), [tmp_path / "small"], Options(folder=tmp_path / "large"))
    image = np.asarray(Image.open(row["written"]))
    assert image.shape == (60, 200, 3) and (image == 77).all()
    with pytest.raises(ConfigError, match="give --out FOLDER"):
        list(answers(of_run(run), [tmp_path / "small"]))


def test_texts_are_continued_and_arrays_answered(tmp_path, capsys):
    tokens = Arrays(tokens=np.zeros((4, 16), "i4"))
    run = saved(tmp_path / "text", "gpt2_test", LanguageModelling(), Data(tokens, tokens))
    (row,) = answers(of_run(run), ["1 2 3"], Options(steps=4))
    assert len(row["continuation"]) == 4
    list(answers(of_run(run), ["1 2 3 " * 20], Options(steps=4)))  # 60 tokens of 64 positions
    assert capsys.readouterr().err == ""
    list(answers(of_run(run), ["1 2 3 " * 30], Options(steps=4)))
    assert "has 90 tokens; the last 60 are read" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="has no tokens to continue"):
        list(answers(of_run(run), [" "], Options(steps=4)))
    with pytest.raises(ConfigError, match="give --tokenizer FILE"):
        list(answers(of_run(run), ["Once upon a time"]))
    rows = Arrays(x=np.zeros((4, 3), "f"), target=np.zeros(4, "f"))
    run = saved(tmp_path / "sum", Sum, Regression(), Data(rows, rows))
    np.savez(tmp_path / "x.npz", x=np.arange(6, dtype="f").reshape(2, 3))
    assert [r["number"] for r in answers(of_run(run), [tmp_path / "x.npz"])] == [3.0, 12.0]
