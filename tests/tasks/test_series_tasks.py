import flax.linen as nn
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import program_of

import zoo
from zoo.data import Arrays, Data, eval_batches
from zoo.evaluators import AnomalyScores, ForecastPlots
from zoo.evaluators.anomalies import point_adjust, scores, threshold
from zoo.tasks import AnomalyDetection, Forecasting, Imputation
from zoo.tasks.metrics import merge


class Repeat(nn.Module):
    """The last value, a parameter times."""

    horizon: int = 3

    def example_inputs(self, batch_size=1):
        return {"series": jax.ShapeDtypeStruct((batch_size, 6, 2), jnp.float32)}

    @nn.compact
    def __call__(self, series, train=False):
        factor = self.param("factor", nn.initializers.ones, ())
        return factor * jnp.repeat(series[:, -1:], self.horizon, axis=1)


def windows(count=11, horizon=3, **more):
    rng = np.random.default_rng(0)
    series = rng.standard_normal((count, 6, 2)).astype("f")
    return Arrays(
        series=series, target=rng.standard_normal((count, horizon, 2)).astype("f"), **more
    )


def evaluated(task, model, source, size):
    variables = task.init(model, jax.random.key(0))
    data = Data(source, source, eval_batch_size=size)
    parts = [task.metrics(model, variables, batch) for batch in eval_batches(data)]
    return {k: float(m.compute()) for k, m in merge(parts).items()}


@pytest.mark.parametrize("size", [1, 4, 11])
def test_errors_are_means_over_all_windows_whatever_the_batch(size):
    source = windows()
    error = source.arrays["series"][:, -1:] - source.arrays["target"]
    got = evaluated(Forecasting(), Repeat(), source, size)
    assert got["mse"] == got["loss"] == pytest.approx((error**2).mean(), rel=1e-5)
    assert got["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)


def test_only_the_last_variate_counts_if_it_is_the_target():
    source = windows()
    error = (source.arrays["series"][:, -1:] - source.arrays["target"])[..., -1]
    got = evaluated(Forecasting(target="last"), Repeat(), source, 4)
    assert got["mse"] == pytest.approx((error**2).mean(), rel=1e-5)


def test_another_horizon_is_refused():
    with pytest.raises(ValueError, match=r"Repeat gives 3 steps of 2 variates, and the data has 5"):
        evaluated(Forecasting(), Repeat(), windows(horizon=5), 4)


@pytest.mark.parametrize("size", [2, 11])
def test_only_hidden_values_count_in_imputation_each_the_same(size):
    mask = np.random.default_rng(1).random((11, 6, 2)) > 0.3
    source = windows(horizon=6, mask=mask)
    error = source.arrays["series"][:, -1:] - source.arrays["target"]
    got = evaluated(Imputation(), Repeat(6), source, size)
    assert got["mse"] == pytest.approx((error**2)[~mask].mean(), rel=1e-5)
    assert got["mae"] == pytest.approx(np.abs(error)[~mask].mean(), rel=1e-5)
    alone = Imputation().metrics(Repeat(6), {"params": {"factor": 1.0}}, source.arrays)["mse"]
    assert float(alone.compute()) == pytest.approx(got["mse"], rel=1e-5)  # all windows are valid


def test_imputation_keeps_what_was_seen():
    mask = np.random.default_rng(1).random((11, 6, 2)) > 0.3
    batch = next(eval_batches(Data(*[windows(horizon=6, mask=mask)] * 2)))
    filled = Imputation().predict(Repeat(6), {"params": {"factor": jnp.float32(2)}}, batch)[
        "series"
    ]
    np.testing.assert_array_equal(filled[:11][mask], batch["series"][:11][mask])
    assert np.abs(filled[:11][~mask] - batch["series"][:11][~mask]).min() > 0


def test_anomaly_scores_are_the_official_ones():
    case = golden.Case.read(golden.FOLDER / "ts_tasks" / "point_adjust.npz")
    train, test = case.input("train_energy"), case.input("test_energy")
    labels = case.input("labels").astype(bool)
    limit = threshold(train, test, case.config.entries["anomaly_ratio"])
    raw = test > limit
    adjusted = point_adjust(raw, labels)
    assert limit == pytest.approx(float(case.references["threshold"]), rel=1e-6)
    np.testing.assert_array_equal(raw, case.references["pred_raw"])
    np.testing.assert_array_equal(adjusted, case.references["pred_adjusted"])
    np.testing.assert_allclose(list(scores(adjusted, labels).values()), case.references["metrics"])
    np.testing.assert_allclose(
        list(scores(raw, labels).values())[1:], case.references["metrics_raw"]
    )


def test_adjustment_flatters_random_predictions():
    rng = np.random.default_rng(0)
    labels = np.zeros(5000, bool)
    labels[1000:1200] = labels[3000:3300] = True
    raw = rng.random(5000) < 0.02
    assert scores(raw, labels)["f1"] < 0.1
    assert scores(point_adjust(raw, labels), labels)["f1"] > 0.8


def test_adjustment_fills_spans_that_were_touched_and_no_others():
    labels = np.array([0, 1, 1, 1, 0, 1, 1, 0, 1], bool)
    raw = np.array([1, 0, 1, 0, 0, 0, 0, 0, 0], bool)
    wanted = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0], bool)
    np.testing.assert_array_equal(point_adjust(raw, labels), wanted)
    assert scores(np.zeros(9, bool), labels)["f1"] == 0.0


def test_a_report_scores_and_draws_anomalies(tmp_path):
    model = zoo.create("dlinear_test", context_length=12, horizon=12, variates=2)
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((40, 12, 2)).astype("f")
    labels = np.zeros((40, 12), bool)
    labels[7, 3:6] = True
    odd = np.where(labels[..., None], 30.0, normal).astype("f")
    data = Data(
        Arrays(series=normal), Arrays(series=odd, anomalies=labels), batch_size=16
    )  # fmt: skip
    zeros = {name: {"shared": {"kernel": jnp.zeros((12, 12)), "bias": jnp.zeros(12)}}
             for name in ("season", "trend")}  # fmt: skip
    scores = AnomalyScores(anomaly_ratio=100 * 3 / 960)
    program = program_of(model, AnomalyDetection())
    found = scores.run(program, {"params": zeros}, data, tmp_path)
    assert found["raw_f1"] == found["adjusted_f1"] == 1.0
    assert (tmp_path / "anomalies.png").stat().st_size > 1000
    unlabelled = scores.run(
        program, {"params": zeros}, Data(Arrays(series=normal), Arrays(series=odd)), tmp_path
    )
    assert set(unlabelled) == {"threshold", "share_above"}
    assert 0 < unlabelled["share_above"] < 0.01


def test_a_report_draws_forecasts(tmp_path):
    variables = {"params": {"factor": jnp.float32(1)}}
    data = Data(*[windows()] * 2)
    assert ForecastPlots().run(program_of(Repeat(), Forecasting()), variables, data, tmp_path) == {}
    assert (tmp_path / "forecasts.png").stat().st_size > 1000
