import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import documented_shapes, feature_shapes

import zoo
from zoo.data.compositions import Compositions
from zoo.evaluators import placements
from zoo.models.imaging import topnet
from zoo.models.imaging.topnet import best_boxes, near, sparse_contrastive_loss
from zoo.tasks import ObjectPlacement


def test_shapes_are_those_of_the_docstring():
    name, table = documented_shapes(topnet.__doc__)
    assert feature_shapes(zoo.create(name)) == table


def heat_map(key=0, batch=2):
    return 3 * jax.random.uniform(jax.random.key(key), (batch, 4, 12, 12)) - 1


BOX = jnp.array([[1, 3, 4], [3, 0, 11]])


def test_the_neighbourhood_gets_no_gradient():
    x = heat_map()
    gradient = jax.grad(lambda x: sparse_contrastive_loss(x, BOX).sum())(x)
    close = np.array(near(x.shape[1:], BOX))
    close[np.arange(2), *np.asarray(BOX).T] = False
    assert not np.asarray(gradient)[close].any()
    assert close.sum() > 2 and np.abs(gradient).max() > 0


def test_the_loss_is_zero_where_it_asks_for_nothing_more():
    x = jnp.full((1, 4, 12, 12), 1.5).at[0, 1, 3, 4].set(0.0)
    assert sparse_contrastive_loss(x, BOX[:1])[0] == 0
    assert sparse_contrastive_loss(x.at[0, 3, 9, 9].set(2.5), BOX[:1])[0] > 0
    assert sparse_contrastive_loss(x.at[0, 3, 9, 9].set(0.5), BOX[:1])[0] > 0
    assert sparse_contrastive_loss(x.at[0, 1, 4, 4].set(-9.0), BOX[:1])[0] == 0


def test_boxes_are_minima_away_from_each_other():
    x = heat_map()
    boxes = np.asarray(best_boxes(x, 3))
    for i in range(2):
        first = np.unravel_index(np.asarray(x[i]).argmin(), x.shape[1:])
        assert tuple(boxes[i, 0]) == first
        apart = np.abs(boxes[i, :, None] - boxes[i, None])
        close = (apart <= np.array([1, 2, 2])).all(-1)
        assert (close == np.eye(3, dtype=bool)).all()


def test_a_given_scale_or_place_is_the_extremum_of_its_slice():
    x = heat_map()
    by_scale = np.asarray(best_boxes(x, scale=jnp.array([2, 0])))[:, 0]
    by_place = np.asarray(best_boxes(x, place=jnp.array([[5, 6], [0, 11]])))[:, 0]
    for i, (scale, place) in enumerate(((2, (5, 6)), (0, (0, 11)))):
        assert tuple(by_scale[i, 1:]) == np.unravel_index(
            np.asarray(x[i, scale]).argmin(), (12, 12)
        )
        assert by_scale[i, 0] == scale and tuple(by_place[i, 1:]) == place
        assert by_place[i, 0] == np.asarray(x[i, :, place[0], place[1]]).argmin()


def test_without_positions_a_moved_background_moves_the_heat_map():
    """By a patch, around the borders: attention has no other order, the decoder only borders."""
    model = zoo.create("topnet_test", image_size=(24, 24), positions=False, decoder=())
    shape = (1, 24, 24, 3)
    background, thing = jax.random.normal(jax.random.key(0), (2, *shape))
    variables = jax.jit(model.init)(jax.random.key(1), background, thing)
    run = jax.jit(lambda b: model.apply(variables, b, thing))
    moved = run(jnp.roll(background, (4, -8), (1, 2)))
    np.testing.assert_allclose(moved, jnp.roll(run(background), (1, -2), (2, 3)), atol=1e-5)


def test_the_object_is_seen_at_every_place():
    model = zoo.create("topnet_test")
    first, second, background = jax.random.normal(jax.random.key(0), (3, 1, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(1), background, first)
    run = jax.jit(lambda o: model.apply(variables, background, o))
    assert (np.abs(run(first) - run(second)) > 0).mean() > 0.5


@pytest.mark.parametrize("count", [1, 4])
def test_scales_grow_by_a_constant_factor(count):
    sides = topnet.box_scales(count)
    np.testing.assert_allclose(np.diff(np.log(sides), 2), 0, atol=1e-12)
    assert sides[0] == pytest.approx(0.1) and sides[-1] <= 0.9 + 1e-9


def test_a_box_is_right_at_the_known_scale_near_the_known_place():
    task = ObjectPlacement(boxes=2)
    box = jnp.array([[1, 3, 4]])
    x = jnp.full((1, 3, 12, 12), 1.5).at[0, 1, 4, 5].set(-1.0).at[0, 2, 9, 9].set(-2.0)
    metrics = task.measure(None, x, {"box": box}, False)
    assert metrics["top1"].compute() == 0 and metrics["top2"].compute() == 1
    np.testing.assert_allclose(
        metrics["loss"].compute(), sparse_contrastive_loss(x, box).mean(), rtol=1e-6
    )
    assert set(task.measure(None, x, {"box": box}, True)) == {"loss"}


def test_boxes_outside_the_heat_map_are_refused():
    model = zoo.create("topnet_test")
    batch = {name: np.zeros(x.shape, "f") for name, x in model.example_inputs().items()}
    heat_map = jax.ShapeDtypeStruct((1, 3, 4, 4), jnp.float32)
    ObjectPlacement().check(model, {**batch, "box": np.array([[9, 9, 9]])}, {})
    for box in ([[0, 1, 3]], [[3, 0, 0]], [[0, -1, 0]], [[0, 1]]):
        given = {**batch, "box": np.array(box)}
        if box == [[0, 1, 3]]:
            ObjectPlacement().check(model, given, {"heat_map": heat_map})
            continue
        with pytest.raises(ValueError, match="scale, row and column of a cell of the heat map"):
            ObjectPlacement().check(model, given, {"heat_map": heat_map})


def test_a_composition_has_a_square_of_the_objects_colour_in_its_box():
    data = Compositions(20, cells=32)
    for example in (data[i] for i in range(20)):
        scale, row, column = example["box"]
        colour = example["object_image"].reshape(-1, 3).max(0)
        np.testing.assert_allclose(example["background"][row, column], colour, atol=1e-6)
        found = (np.abs(example["background"] - colour) < 1e-6).all(-1)
        assert found.sum() == data.sides()[scale] ** 2
        placed = placements.place(
            example["background"], example["object_image"], example["box"], data.sides()[scale],
            (32, 32),
        )  # fmt: skip
        changed = (placed != example["background"]).any(-1)
        assert (changed & ~found).sum() <= 2 * data.sides()[scale]  # within half a cell
