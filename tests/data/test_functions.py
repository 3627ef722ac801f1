"""Function classes, curricula, baselines and what is optimal."""

import numpy as np
import pytest

from zoo.data import Data
from zoo.data.functions import Either, Prompts, Ramp, baselines, bayes, boolean, learners
from zoo.data.functions.continuous import (
    DecisionTree,
    Linear,
    Quadratic,
    RandomLabels,
    ReluNetwork,
    Repeated,
    Window,
    decision_tree,
)
from zoo.data.functions.known import Parities, Terms, WindowLeastSquares
from zoo.data.functions.prompts import batch
from zoo.data.functions.uncertain import NoisyLinear
from zoo.data.loader import train_iterator

CLASSES = [
    Linear(),
    Linear(sparsity=2, noise=0.5, renormalise=True),
    Quadratic(),
    ReluNetwork(),
    DecisionTree(),
    Window(3),
    Window(2, "tanh"),
    Window(2, "relu"),
    RandomLabels(Linear(), 0.5),
    Repeated(Linear(), 4),
    NoisyLinear(),
    NoisyLinear(pool=3),
    boolean.Conjunction(),
    boolean.TEACH_CONJUNCTION,
    boolean.TEACH_BICONJUNCTION,
    boolean.Disjunction(literals=4),
    boolean.DNF,
    boolean.CNF,
    boolean.TEACH_DNF,
    boolean.Halfspace(),
    boolean.Halfspace("integer"),
    boolean.Halfspace("threshold"),
    boolean.Parity(),
    boolean.Parity(2),
    boolean.NearestNeighbour(5),
    boolean.Flipped(boolean.Parity(), 0.2),
    Either((Linear(), Quadratic())),
]
BOOLEAN = [c for c in CLASSES if type(c).__module__.endswith("boolean")]


@pytest.mark.parametrize("functions", CLASSES, ids=lambda c: type(c).__name__)
def test_an_index_is_one_prompt_and_no_other(functions):
    source = Prompts(functions, 10, points=12, dims=6, seed=3)
    one, again, other = source[4], source[4], source[5]
    for key in ("xs", "ys", "targets"):
        np.testing.assert_array_equal(one[key], again[key])
        assert one[key].dtype == np.float32 and np.isfinite(one[key]).all()
    assert np.any(one["xs"] != other["xs"])
    assert one["xs"].shape == (12, 6) and one["ys"].shape == one["weights"].shape == (12,)


@pytest.mark.parametrize("functions", BOOLEAN, ids=lambda c: type(c).__name__)
def test_boolean_prompts_are_signs(functions):
    prompts = batch(Prompts(functions, 20, points=30, dims=8), 0, 20)
    assert set(np.unique(prompts["xs"])) == {-1, 1}
    assert set(np.unique(prompts["ys"])) == {-1, 1}


def test_any_number_of_hosts_sees_the_same_prompts_in_order():
    source = Prompts(Linear(), 40, points=3, dims=2)
    data = Data(source, source, batch_size=4)
    alone = next(train_iterator(data, 0))
    shares = [next(train_iterator(data, 0, i, 2)) for i in range(2)]
    both = np.concatenate([share["xs"] for share in shares])
    np.testing.assert_array_equal(both, alone["xs"])
    np.testing.assert_array_equal(alone["xs"], batch(source, 0, 4)["xs"])


def test_a_curriculum_grows_with_the_steps():
    ramp = Ramp(5, 20, interval=2000)
    assert [ramp.at(step) for step in (0, 1999, 2000, 4100, 10**6)] == [5, 5, 6, 7, 20]
    ramps = dict(dims_ramp=Ramp(1, 3, interval=2), points_ramp=Ramp(4, 8, 2, interval=1))
    source = Prompts(Linear(), 40, points=8, dims=3, batch_size=5, **ramps)
    for index, dims, points in ((0, 1, 4), (5, 1, 6), (10, 2, 8), (39, 3, 8)):
        prompt = source[index]
        assert (np.abs(prompt["xs"]).max(0) > 0).sum() == dims
        assert prompt["weights"].sum() == points
    with pytest.raises(ValueError, match="an interval of at least 1 step, not 0"):
        Ramp(1, 2, interval=0)


def variance(functions, dims, count=400, points=20):
    return batch(Prompts(functions, count, points, dims), 0, count)["ys"].var()


@pytest.mark.parametrize(
    "functions, wanted",
    [(Linear(), 4), (Quadratic(), 4), (ReluNetwork(), 4), (Window(3), 4), (DecisionTree(), 1)],
    ids=lambda x: type(x).__name__,
)
def test_labels_have_the_variance_of_the_dimension(functions, wanted):
    if isinstance(functions, Window):  # the first labels see fewer points
        ys = batch(Prompts(functions, 800, 20, 4), 0, 800)["ys"][:, 3:]
        np.testing.assert_allclose(ys.var(), wanted, rtol=0.15)
    else:
        np.testing.assert_allclose(variance(functions, 4, 800), wanted, rtol=0.15)


def test_a_tree_goes_right_where_the_coordinate_is_positive():
    coordinates, values = np.array([0, 1, 0, 0, 0, 0, 0]), np.arange(7.0)
    xs = np.array([[-1.0, -1], [-1, 1], [1, -1], [1, 1]])
    assert decision_tree(xs, coordinates, values, 2).tolist() == [3, 4, 6, 6]


def test_random_labels_say_nothing_and_leave_the_targets():
    prompts = batch(Prompts(RandomLabels(Linear(), 0.5), 400, 20, 3), 0, 400)
    kept = prompts["ys"] == prompts["targets"]
    assert 0.45 < kept.mean() < 0.55
    drawn, clean = prompts["ys"][~kept], prompts["targets"][~kept]
    assert abs(np.corrcoef(drawn, clean)[0, 1]) < 0.05
    np.testing.assert_allclose(drawn.std(), clean.std(), rtol=0.1)


# ------------------------------------------------------------------------------- baselines


def test_least_squares_is_exact_once_there_are_enough_points():
    prompt = Prompts(Window(3), 1, points=20, dims=2)[0]
    xs, ys = prompt["xs"].astype(float), prompt["ys"].astype(float)
    found = WindowLeastSquares(3)(xs, ys)
    np.testing.assert_allclose(found[6:], ys[6:], atol=1e-6 * np.abs(ys).max())
    alone = baselines.least_squares(xs, ys)
    assert ((alone - ys)[8:] ** 2).mean() > 0.1  # one point is not the window


def test_ridge_is_the_mean_of_the_belief():
    source = Prompts(Linear(noise=0.7), 1, points=12, dims=3)
    xs, ys = (source[0][key].astype(float) for key in ("xs", "ys"))
    belief = bayes.known_noise(xs, ys, 0.7)
    np.testing.assert_allclose(baselines.ridge(xs, ys, 0.49), belief.mean, rtol=1e-9)


def test_lasso_meets_its_conditions():
    """Of the minimum: the gradient is the penalty where a weight is, and within it elsewhere."""
    rng = np.random.default_rng(0)
    xs, ys = rng.standard_normal((15, 4)), rng.standard_normal(15)
    weights = np.array([  # a last point (0 .. 1 .. 0) reads a weight
        baselines.lasso(np.concatenate([xs, row[None]]), np.append(ys, 0), 0.1)[-1]
        for row in np.eye(4)
    ])  # fmt: skip
    gradient = xs.T @ (xs @ weights - ys) / 15
    active = np.abs(weights) > 1e-9
    np.testing.assert_allclose(gradient[active], -0.1 * np.sign(weights[active]), atol=1e-5)
    assert (np.abs(gradient[~active]) <= 0.1 + 1e-5).all()


def test_neighbours_average_the_nearest_and_equal_points_win():
    xs, ys = np.array([[0.0], [1.0], [3.0], [0.1], [1.0]]), np.array([1.0, 2.0, 4.0, 7.0, 9.0])
    assert baselines.nearest(xs, ys, 1).tolist() == [0, 1, 2, 1, 2]
    np.testing.assert_allclose(baselines.nearest(xs, ys, 2)[2], 1.5)
    assert baselines.nearest(xs, ys, 3, by_distance=True)[4] == 2
    assert baselines.nearest_cosine(np.abs(xs) + 1, ys)[1:].tolist() == [1, 1, 1, 1]


def test_gradient_descent_begins_as_averaging_and_ends_as_least_squares():
    prompt = Prompts(Linear(), 1, points=9, dims=2)[0]
    xs, ys = prompt["xs"].astype(float), prompt["ys"].astype(float)
    one = baselines.gradient_descent(xs, ys, steps=1, rate=0.5)
    np.testing.assert_allclose(one, 0.5 * baselines.averaging(xs, ys), rtol=1e-9)
    many = baselines.gradient_descent(xs, ys, steps=5000, rate=0.1)
    np.testing.assert_allclose(many[4:], ys[4:], atol=1e-3)


# ----------------------------------------------------------------------------------- Bayes


def test_the_belief_is_calibrated():
    """Standardised errors of fresh prompts have variance 1, and no other belief is better."""
    sigmas = (0.2, 1.0)
    prompts = batch(Prompts(NoisyLinear(sigmas), 400, points=10, dims=2), 0, 400)
    xs, ys = prompts["xs"].astype(float), prompts["ys"].astype(float)
    beliefs = [bayes.unknown_noise(x, y, sigmas)[0] for x, y in zip(xs, ys, strict=True)]
    errors = np.array(
        [(y - b.mean) / np.sqrt(b.variance) for b, y in zip(beliefs, ys, strict=True)]
    )
    np.testing.assert_allclose((errors**2).mean(), 1, atol=4 * (errors**2).std() / 4000**0.5)
    mean = lambda bs: np.mean(  # noqa: E731
        [bayes.negative_log_likelihood(b, y) for b, y in zip(bs, ys, strict=True)]
    )
    others = [
        [bayes.known_noise(x, y, sigma) for x, y in zip(xs, ys, strict=True)] for sigma in sigmas
    ]
    assert mean(beliefs) < min(map(mean, others))


def test_a_pool_of_one_function_is_known_at_once():
    functions = NoisyLinear((0.5,), pool=1)
    weights, sigma = functions.task(0, 3)
    prompt = Prompts(functions, 1, points=5, dims=3)[0]
    belief = bayes.pool(prompt["xs"], prompt["ys"], weights[None], np.array([sigma]))
    np.testing.assert_allclose(belief.mean, prompt["targets"], rtol=1e-5)
    np.testing.assert_allclose(belief.variance, 0.25, rtol=1e-5)


def test_a_pool_concentrates_on_the_function_of_the_prompt():
    functions = NoisyLinear((0.1,), pool=20)
    tasks = [functions.task(i, 2) for i in range(20)]
    weights, sigmas = np.stack([w for w, _ in tasks]), np.array([s for _, s in tasks])
    prompt = Prompts(functions, 1, points=12, dims=2)[0]
    belief = bayes.pool(prompt["xs"], prompt["ys"], weights, sigmas)
    np.testing.assert_allclose(belief.mean[-1], prompt["targets"][-1], atol=0.01)
    np.testing.assert_allclose(belief.variance[-1], 0.01, rtol=0.05)


def test_without_a_prior_little_is_known_of_short_prompts():
    prompt = Prompts(Linear(noise=1.0), 1, points=200, dims=2)[0]
    belief = bayes.without_prior(prompt["xs"].astype(float), prompt["ys"].astype(float))
    assert np.isnan(belief.mean[:3]).all() and np.isfinite(belief.mean[3:]).all()
    np.testing.assert_allclose(belief.variance[-1], 1, rtol=0.3)


# --------------------------------------------------------------------------------- Boolean


def test_empty_terms_are_constant():
    xs, nothing = boolean._uniform(np.random.default_rng(0), 5, 3), np.zeros(3)
    assert (boolean.conjunction(xs, nothing) == 1).all()
    assert (boolean.disjunction(xs, nothing) == -1).all()


def test_nearest_labels_follow_the_closest_point():
    xs = np.array([[1.0, 1, 1], [-1, -1, -1], [1, 1, 1], [1, 1, -1], [-1, -1, 1]])
    labels = boolean.nearest_label(xs, np.array([1.0, -1, -1]))
    assert labels.tolist() == [1, -1, 1, 1, -1]  # the third is the first again


@pytest.mark.parametrize(
    "functions, knowing",
    [
        (boolean.TEACH_CONJUNCTION, Terms(0.3, 0.0)),
        (boolean.TEACH_BICONJUNCTION, Terms()),
    ],
    ids=["monotone", "signed"],
)
def test_after_its_teaching_sequence_one_function_is_left(functions, knowing):
    plain = boolean.Conjunction(functions.positive, functions.negative, functions.forced)
    right = {}
    for name, source in (("taught", functions), ("plain", plain)):
        prompts = batch(Prompts(source, 30, points=20, dims=6, seed=2), 0, 30)
        said = np.stack([knowing(x, y) for x, y in zip(prompts["xs"], prompts["ys"], strict=True)])
        right[name] = (said == prompts["ys"]).mean(0)
    assert right["taught"][8:].min() == 1
    assert right["plain"][8:12].mean() < 1


def test_bayes_is_no_worse_than_elimination_or_neighbours():
    prompts = batch(Prompts(boolean.Conjunction(), 60, points=16, dims=6), 0, 60)
    accuracy = lambda learner: np.mean(  # noqa: E731
        [learner(x, y) == y for x, y in zip(prompts["xs"], prompts["ys"], strict=True)]
    )
    best = accuracy(Terms())
    assert best > accuracy(learners.eliminate)
    assert best > accuracy(lambda x, y: np.sign(baselines.nearest(x, y, 1)))


def test_elimination_is_never_wrong_where_it_says_yes():
    prompts = batch(Prompts(boolean.Conjunction(), 40, points=30, dims=6), 0, 40)
    for x, y in zip(prompts["xs"], prompts["ys"], strict=True):
        said = learners.eliminate(x, y)
        assert (y[said == 1] == 1).all()
    prompts = batch(Prompts(boolean.Disjunction(), 40, points=30, dims=6), 0, 40)
    for x, y in zip(prompts["xs"], prompts["ys"], strict=True):
        said = learners.eliminate(x, y, disjunctive=True)
        assert (y[said == -1] == -1).all()


def test_parities_are_solved_by_as_many_points_as_inputs():
    prompts = batch(Prompts(boolean.Parity(), 30, points=40, dims=6), 0, 30)
    for x, y in zip(prompts["xs"], prompts["ys"], strict=True):
        solved, voted = Parities()(x, y), None
        assert ((solved == y) | (solved == 0)).all() and (solved[20:] != 0).all()
        every = np.concatenate([learners.subsets(6, size) for size in range(7)])
        voted = learners.vote(learners.enumerate_class(boolean.parity, every, x), y)
        np.testing.assert_array_equal(solved, voted)


def test_there_are_too_many_terms_of_many_inputs():
    with pytest.raises(ValueError, match=r"3\^28 terms of 28 inputs; enumerate 12 at most"):
        learners.terms(28)
