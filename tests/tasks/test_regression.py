import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import program_of

from zoo.data import Arrays, Data
from zoo.evaluators import ConformalIntervals
from zoo.evaluators.intervals import intervals
from zoo.tasks import Regression


class Line(nn.Module):
    """A factor times x, and a feature that is a loss."""

    def example_inputs(self, batch_size=1):
        return {"x": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}

    def __call__(self, x, train=False):
        return self.features(x, train)["logits"]

    @nn.compact
    def features(self, x, train=False):
        factor = self.param("factor", nn.initializers.constant(2.0), (1,))
        return {"logits": x[:, None] * factor, "size": factor**2}


VARIABLES = {"params": {"factor": jnp.array([2.0])}}
BATCH = {
    "x": jnp.array([1.0, 2.0, 9.0]),
    "target": jnp.array([1.0, 7.0, 0.0]),
    "valid": np.array([True, True, False]),
}


@pytest.mark.parametrize("error, wanted", [("absolute", 2.0), ("squared", 5.0)])
def test_the_loss_is_the_mean_error_of_valid_examples_and_penalties(error, wanted):
    task = Regression(error)
    loss, aux = task.loss(Line(), VARIABLES, {}, BATCH, jax.random.key(0), "train")
    assert loss == wanted == aux.metrics["loss"].compute()
    assert aux.metrics["mae"].compute() == 2.0 and aux.metrics["mse"].compute() == 5.0
    more = Regression(error, penalties=(("size", 0.5),))
    assert (
        more.loss(Line(), VARIABLES, {}, BATCH, jax.random.key(0), "train")[0] == wanted + 0.5 * 4
    )
    assert task.predict(Line(), VARIABLES, BATCH)["number"].tolist() == [2.0, 4.0, 18.0]


def test_the_evaluator_measures_r2_and_draws(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(300).astype("f")
    noise = rng.standard_normal(300).astype("f")
    data = Data(*[Arrays(x=x, target=2 * x + noise, group=np.arange(300) % 3)] * 2, batch_size=64)
    found = ConformalIntervals().run(program_of(Line(), Regression()), VARIABLES, data, tmp_path)
    wanted = 1 - (noise**2).sum() / ((2 * x + noise - (2 * x + noise).mean()) ** 2).sum()
    assert found["r2"] == pytest.approx(wanted, rel=1e-4)
    assert 0.87 < found["coverage"] < 0.94 and 1.4 < found["radius"] < 2.2
    assert (tmp_path / "regression.png").stat().st_size > 1000


def test_intervals_follow_the_errors_of_near_groups():
    group = np.resize([1.0, 2.0], 2000)
    errors = np.random.default_rng(1).standard_normal(2000) * group * 3
    found, radii = intervals(errors, np.zeros(2000), group, 0.9)
    assert 0.88 < found["coverage"] < 0.92
    one, two = (np.nanmean(radii[group == g]) for g in (1, 2))
    assert 1.8 < two / one < 2.2


def test_other_outputs_are_refused():
    class Pair(Line):
        def features(self, x, train=False):
            return {"logits": jnp.stack([x, x], 1)}

    with pytest.raises(ValueError, match=r"Pair gives outputs of shape \(3, 2\); regression is of"):
        Regression().metrics(Pair(), VARIABLES, BATCH)
