"""Every objective that no system of the zoo has goes down on a small problem, in 200 steps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zoo.tasks import objectives

WORDS, LENGTH, BATCH, WIDTH = 12, 8, 32, 16


class Encoder(nn.Module):
    """Embeds numbers or maps vectors, mixes positions once, and gives `outputs` a position."""

    outputs: int
    words: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(WORDS + 4, WIDTH)(x) if self.words else nn.Dense(WIDTH)(x)
        x = x + self.param("positions", nn.initializers.normal(0.1), (x.shape[1], WIDTH))
        x = x + nn.SelfAttention(2)(nn.LayerNorm()(x))
        return nn.Dense(self.outputs)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))


def periodic(rng, count):
    """Texts that repeat their first two words."""
    return np.tile(rng.integers(1, WORDS, (count, 2)), (1, LENGTH // 2))


def causal(key):
    model = nn.Sequential(
        [nn.Embed(WORDS, 2 * WIDTH), nn.Dense(2 * WIDTH), nn.relu, nn.Dense(WORDS)]
    )
    # two words before say what comes next: here the one before is enough, as texts count up
    tokens = (jnp.arange(LENGTH) + jnp.arange(BATCH)[:, None]) % WORDS
    return model, tokens, lambda out, key: objectives.causal(out, tokens)


def replaced(key):
    tokens = jnp.asarray(periodic(np.random.default_rng(0), BATCH))
    wrong = jax.random.bernoulli(key, 0.2, tokens.shape)
    seen = jnp.where(wrong, 0, tokens)  # the generator's words stand out
    return Encoder(1), seen, lambda out, key: objectives.replaced(out[..., 0], wrong)


def to_sequence(pairs, size):
    """Rows of one length, padded with 0."""
    return np.stack([np.pad(x, (0, size - len(x))) for x in pairs])


def span(key):
    rng = np.random.default_rng(0)
    texts = periodic(rng, BATCH)
    pairs = [objectives.span_corruption(t, rng, WORDS + 3, 0.25, 2) for t in texts]
    given = jnp.asarray(to_sequence([a for a, _ in pairs], LENGTH))
    wanted = jnp.asarray(to_sequence([b for _, b in pairs], LENGTH))
    return Encoder(WORDS + 4), given, lambda out, key: objectives.masked(out, wanted, wanted > 0)


def infilling(key):
    rng = np.random.default_rng(0)
    texts = periodic(rng, BATCH)
    given = [objectives.infilling(t, rng, WORDS, 0.25, 2) for t in texts]
    given = jnp.asarray(to_sequence([x[:LENGTH] for x in given], LENGTH))
    wanted = jnp.asarray(texts)
    return Encoder(WORDS), given, lambda out, key: objectives.masked(out, wanted, wanted > 0)


def order(key):
    rng = np.random.default_rng(0)
    pairs = [objectives.swapped(np.arange(1, 5) + i, np.arange(5, 9) + i, rng)
             for i in rng.integers(0, 4, BATCH)]  # fmt: skip
    given = jnp.asarray([np.concatenate([a, b]) for a, b, _ in pairs])
    labels = jnp.asarray([[kept] for *_, kept in pairs])
    return Encoder(1), given, lambda out, key: objectives.replaced(out[:, 0], labels == 1)


def views(key):
    return jax.random.normal(key, (BATCH, LENGTH, 4))


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def simclr(key):
    x = views(key)
    both = jnp.concatenate([x, x + 0.3 * jax.random.normal(jax.random.key(1), x.shape)])

    def loss(out, key):
        first, second = jnp.split(unit(out.mean(1)), 2)
        return objectives.simclr(first, second, 0.5)

    return Encoder(WIDTH, words=False), both, loss


def moco(key):
    x = views(key)
    both = jnp.concatenate([x, x + 0.1 * jax.random.normal(jax.random.key(1), x.shape)])

    def loss(out, key):
        query, keys = jnp.split(unit(out.mean(1)), 2)
        keys = jax.lax.stop_gradient(keys)
        return objectives.moco(query, keys, jnp.roll(keys, 1, 0), 0.2)

    return Encoder(WIDTH, words=False), both, loss


def clip(key):
    x = views(key)
    both = jnp.concatenate([x, -2 * x])  # the other modality says the same in its own words

    def loss(out, key):
        images, texts = jnp.split(unit(out.mean(1)), 2)
        return objectives.clip(images, texts, 5.0)

    return Encoder(WIDTH, words=False), both, loss


def dino(key):
    x, center = views(key), jnp.zeros(6)
    labels = 8 * jax.nn.one_hot(jnp.argmax(x[:, 0], -1), 6)  # a teacher with an opinion
    return (
        Encoder(6, words=False),
        x,
        lambda out, key: objectives.dino(out.mean(1), labels, center, student_temperature=1.0)[0],
    )


def mae(key):
    across = jax.random.normal(key, (BATCH, 1, 4))
    patches = jnp.tile(across, (1, LENGTH, 1)) * jnp.arange(1, LENGTH + 1)[:, None]
    removed, _, _ = objectives.random_mask(jax.random.uniform(key, (BATCH, LENGTH)))
    shown = jnp.where(removed[..., None], 0, patches)
    return Encoder(4, words=False), shown, lambda out, key: objectives.mae(patches, out, removed)


def detection(key):
    x = views(key)
    boxes = jax.nn.sigmoid(x[:, :2])  # two objects
    labels = (x[:, :2, 0] > 0).astype(jnp.int32)

    def loss(out, key):
        each = jax.vmap(objectives.set_prediction)
        return each(out[..., :3], jax.nn.sigmoid(out[..., 3:]), labels, boxes).mean()

    return Encoder(7, words=False), x, loss


def diffusion(key):
    x = jnp.sign(views(key))

    def loss(out, key):
        return objectives.denoising(out, jax.random.normal(jax.random.key(5), x.shape))

    noise = jax.random.normal(jax.random.key(5), x.shape)
    return Encoder(4, words=False), objectives.noised(x, noise, 0.5), loss


def ctc(key):
    labels = jax.random.randint(key, (BATCH, 3), 1, 5)
    sound = jnp.repeat(jax.nn.one_hot(labels, 5), 3, axis=1)[:, :LENGTH]
    return Encoder(5, words=False), sound, lambda out, key: objectives.ctc(out, labels).mean()


def audio(key):
    latents = views(key)
    chosen = jnp.arange(LENGTH) % 3 == 1
    shown = jnp.where(chosen[:, None], 0, latents) + 0.3 * jnp.roll(latents, 1, 1)
    others = jax.random.randint(key, (BATCH, LENGTH, 4), 0, LENGTH)
    chosen = jnp.broadcast_to(chosen, (BATCH, LENGTH))
    return (
        Encoder(4, words=False),
        shown,
        lambda out, key: objectives.contrast_in_time(out, latents, others, chosen, 0.3),
    )


def preferences(key):
    x = views(key)
    better, worse = jnp.maximum(x, 0), jnp.minimum(x, 0)
    both = jnp.concatenate([better, worse])

    def loss(out, key):
        return objectives.reward(*jnp.split(out.mean((1, 2)), 2))

    return Encoder(1, words=False), both, loss


def dpo(key):
    model, both, _ = preferences(key)

    def loss(out, key):
        better, worse = jnp.split(out.mean((1, 2)), 2)
        return objectives.dpo(better, worse, 0 * better, 0 * worse, beta=1.0)

    return model, both, loss


PROBLEMS = (causal, replaced, span, infilling, order, simclr, moco, clip, dino, mae, detection,
            diffusion, ctc, audio, preferences, dpo)  # fmt: skip


def falls(problem):
    """The loss before and after 200 steps."""
    model, x, loss = problem(jax.random.key(0))
    params = model.init(jax.random.key(1), x)
    optimizer = optax.adam(1e-2)

    def step(carry, key):
        params, state = carry
        value, grads = jax.value_and_grad(lambda p: loss(model.apply(p, x), key))(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(2), 200)
    _, values = jax.jit(lambda c: jax.lax.scan(step, c, keys))((params, optimizer.init(params)))
    return float(values[0]), float(values[-1])


@pytest.mark.parametrize(
    "problem",
    [p if p is clip else pytest.param(p, marks=pytest.mark.slow) for p in PROBLEMS],
    ids=lambda problem: problem.__name__,
)
def test_it_falls_by_more_than_thirty_percent(problem):
    first, last = falls(problem)
    assert np.isfinite(first) and last < 0.7 * first


def test_a_matched_set_costs_least_in_any_order():
    boxes = jnp.array([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.1, 0.3], [0.5, 0.5, 0.9, 0.9]])
    logits = 9.0 * jax.nn.one_hot(jnp.array([1, 0, 2]), 3)
    labels, targets = jnp.array([0, 1]), boxes[jnp.array([1, 0])]
    right = objectives.set_prediction(logits, boxes, labels, targets)
    assert right < 0.01
    turned = objectives.set_prediction(logits[::-1], boxes[::-1], labels, targets)
    np.testing.assert_allclose(turned, right, rtol=1e-4)
    assert objectives.set_prediction(logits, boxes + 0.1, labels, targets) > 0.5


def test_spans_and_sentinels_make_up_the_text():
    rng = np.random.default_rng(0)
    for length in (2, 20, 100):
        text = rng.integers(0, 50, length)
        given, target = objectives.span_corruption(text, rng, sentinel=99)
        whole, named = [], {}
        for token in target:
            if token > 60:
                spot = named[token] = []
            else:
                spot.append(token)
        for token in given:
            whole += named[token] if token > 60 else [token]
        np.testing.assert_array_equal(whole, text)
        assert abs(sum(map(len, named.values())) - max(0.15 * length, 1)) <= 1
