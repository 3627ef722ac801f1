"""What the tests of models share: inputs, weights of unit scale, the table in a docstring."""

import re
import types
from pathlib import Path

import fill
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from zoo.checkpoints import rules


def representatives(names, published=True):
    """Parameters of a test: in the default run each system's small and smallest published one.

    The others, alike but for their sizes, run with `-m variants`; so do all but the small ones
    where `published` is False.
    """
    systems: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: zoo.info(name).params or 10**12):
        systems.setdefault(zoo.registry.file_of(name), []).append(name)
    quick = {found for group in systems.values() for found in group[:1] if published}
    quick |= {name for name in names if name.endswith("_test")}
    others = pytest.mark.variants
    return [name if name in quick else pytest.param(name, marks=others) for name in names]


def random_images(model, batch=2, key=0):
    """Normal numbers of the shape that the model takes."""
    return jax.random.normal(jax.random.key(key), model.example_inputs(batch)["images"].shape)


def filled_state_dict(model, layout=None):
    """A published state dict of unit-scale numbers, without tensors that can be recomputed."""
    layouts = zoo.registry.system(model).layouts
    derived = layouts[layout or next(iter(layouts))].derived
    return {
        name: fill.weight(name, spec.shape)
        for name, spec in rules.manifest(layouts, model, layout).items()
        if not rules_match(derived, name)
    }


def rules_match(patterns, name):
    """Whether a name is one of these patterns of `zoo.checkpoints.patterns`."""
    from zoo.checkpoints.patterns import compile_pattern

    return any(compile_pattern(p).match(name) is not None for p in patterns)


def filled(model):
    """Variables with unit-scale numbers: differences show, unlike at initialisation."""
    return zoo.convert(model, filled_state_dict(model))


def apply(model, variables, x, **kwargs):
    """`model.apply`, compiled: op by op takes seconds."""
    return jax.jit(lambda v, x: model.apply(v, x, **kwargs))(variables, x)


def program_of(model, task):
    """What evaluators take of a program: the network and compiled predictions."""
    predict = jax.jit(lambda variables, batch: task.predict(model, variables, batch))
    return types.SimpleNamespace(networks=model, task=task, predict=predict)


def sin_loss(outputs):
    """A scalar whose gradient depends on every output."""
    return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in jax.tree.leaves(outputs))


def gradient(model, variables, x, **kwargs):
    """Of `sin_loss` in the variables."""
    return jax.jit(jax.grad(lambda v: sin_loss(model.apply(v, x, **kwargs))))(variables)


def assert_trees_close(got, wanted, tolerance):
    """Leaves equal to `tolerance` of each leaf's largest number."""
    wanted_leaves = jax.tree.leaves_with_path(wanted)
    for (path, w), g in zip(wanted_leaves, jax.tree.leaves(got), strict=True):
        limit = tolerance * max(np.abs(w).max(), 1e-30)
        message = jax.tree_util.keystr(path)
        np.testing.assert_allclose(g, w, rtol=0, atol=limit, err_msg=message)


def documented_shapes(doc):
    """The variant that a docstring's table is about, and `{feature: shape without the batch}`.

    A row is a name, sizes with up to three blanks between them, and a remark after at least four.
    """
    head = re.search(r"^ {4}features +(\S+)$", doc, re.MULTILINE)
    assert head, "the docstring has no table that starts with 'features <variant>'"
    table = {}
    for row in doc[head.end() :].strip("\n").split("\n\n")[0].rstrip().split("\n"):
        name, sizes = re.match(r" {4}(\w+) +((?:\d+ {1,3})*\d+)(?= {4}|$)", row).groups()
        table[name] = tuple(map(int, sizes.split()))
    return head[1], table


def feature_shapes(model):
    """`{feature: shape without the batch}`, from shapes alone."""

    def run(*inputs):
        return model.init_with_output(jax.random.key(0), *inputs, method="features")[0]

    return {
        k: v.shape[1:] for k, v in jax.eval_shape(run, *model.example_inputs().values()).items()
    }


def learn_one_series_from_another(model, steps=200):
    """Train a forecaster of 12 steps from 24 on noise, and on that noise 12 steps later.

    The future of the second series is in the past of the first alone; that of the first is nowhere.

    Returns:
      Mean squared errors of both on held-out windows; that of the second without the first.
    """
    noise = np.random.default_rng(0).standard_normal(1000).astype("f")
    both = np.stack([noise[12:], noise[:-12]], 1)
    windows = np.moveaxis(np.lib.stride_tricks.sliding_window_view(both, 36, axis=0), 1, 2)
    x, y = jnp.asarray(windows[:, :24]), jnp.asarray(windows[:, 24:])
    optimizer = optax.adam(3e-3)

    def errors(variables, x, y):
        return ((model.apply(variables, x) - y) ** 2).mean((0, 1))

    @jax.jit
    def run(variables):
        def step(carry, index):
            variables, state = carry
            rows = jax.random.choice(jax.random.key(index), 800, (32,))
            grads = jax.grad(lambda v: errors(v, x[rows], y[rows]).mean())(variables)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(variables, updates), state), None

        start = (variables, optimizer.init(variables))
        (variables, _), _ = jax.lax.scan(step, start, jnp.arange(steps))
        x_test, y_test = x[830:], y[830:]
        alone = errors(variables, x_test.at[:, :, 0].set(0), y_test)[1]
        return errors(variables, x_test, y_test), alone

    return run(jax.jit(model.init)(jax.random.key(0), x[:1]))


def learn(loss, variables, draw, *, steps, rate=3e-3, trains=lambda path: True):
    """Variables after so many steps of Adam in one cycle, on batches `draw(key)`; and the losses.

    `loss(variables, batch)` is a number, or a number and collections that the step changes.
    `trains(path)` says of a leaf of `params` whether it is trained.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))

    @jax.jit
    def run(variables):
        def step(carry, key):
            params, others, state = carry
            batch = draw(key)

            def measured(params):
                out = loss({"params": params, **others}, batch)
                return out if isinstance(out, tuple) else (out, {})

            (value, changed), grads = jax.value_and_grad(measured, has_aux=True)(params)
            grads = jax.tree.map_with_path(
                lambda path, g: g if trains(jax.tree_util.keystr(path, simple=True, separator="/"))
                else jnp.zeros_like(g),
                grads,
            )  # fmt: skip
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), {**others, **changed}, state), value

        others = {name: tree for name, tree in variables.items() if name != "params"}
        start = (variables["params"], others, optimizer.init(variables["params"]))
        keys = jax.random.split(jax.random.key(1), steps)
        (params, others, _), losses = jax.lax.scan(step, start, keys)
        return {"params": params, **others}, losses

    return run(variables)


def token_loss(logits, tokens, first=1):
    """Mean loss of the tokens from place `first` on, each from the logits at the one before it."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits[:, first - 1 : -1], tokens[:, first:]
    ).mean()


class Characters:
    """Windows of a text that every Python has: the reference in `pydoc_data`, by its characters.

    Attributes:
      count: different characters.
      entropy: of a character by itself, in nats.
      held_out: windows of the last tenth, 16,384 characters.
    """

    def __init__(self, length):
        from pydoc_data.topics import topics

        text = np.array(list("\n".join(topics.values())))
        letters, row, times = np.unique(text, return_inverse=True, return_counts=True)
        share = times / len(row)
        self.count, self.entropy = len(letters), float(-(share * np.log(share)).sum())
        row = jnp.asarray(row.reshape(-1), jnp.int32)
        self.train, rest = row[: len(row) * 9 // 10], row[len(row) * 9 // 10 :]
        self.length = length
        self.held_out = rest[: 2**14 // length * length].reshape(-1, length)

    def draw(self, key, batch=16):
        """Windows of the text that is learnt."""
        start = jax.random.randint(key, (batch, 1), 0, len(self.train) - self.length)
        return self.train[start + jnp.arange(self.length)]

    def held_out_loss(self, model, *, steps, rate=4e-3, batch=16):
        """In nats a character, after training on the text."""
        variables = jax.jit(model.init)(jax.random.key(0), self.held_out[:1])
        variables, _ = learn(
            lambda v, x: token_loss(model.apply(v, x), x),
            variables, lambda key: self.draw(key, batch), steps=steps, rate=rate,
        )  # fmt: skip
        return float(
            jax.jit(lambda v, x: token_loss(model.apply(v, x), x))(variables, self.held_out)
        )


def held_out_accuracy(config, run):
    """What a config file of `configs/` reaches on its held-out images, trained in `run`."""
    from zoo.training import train
    from zoo.training.command_line import parse

    path = Path(__file__).parents[1] / "configs" / config
    return train(parse([str(path)])[1].config, run).metrics["accuracy"]
