"""What a small classifier, trained on the spot, sees in images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Float


@dataclass(frozen=True)
class ClassifierFeatures:
    """Pooled features of a classifier of the zoo, for a distance as FID measures it.

    It is trained anew, from a seed, each time that it is fitted: seconds for a small one.

    Attributes:
      model: a variant of the zoo whose `features` give "pooled".
      fields: of the module to replace, the number of classes among them.
      examples: with `images [height, width, channels]`, as the model takes them, and `label`.
      steps: of Adam, with 64 examples each.
      learning_rate: falls to zero in a cosine.
      seed: of the start and of the order of examples.
    """

    model: str
    fields: Mapping[str, Any]
    examples: Sequence[dict[str, Any]]
    steps: int = 400
    learning_rate: float = 2e-3
    seed: int = 0

    def fitted(self) -> Callable[[Float[Array, "count height width channels"]], np.ndarray]:
        """From images to features `[count, width]`."""
        import jax
        import jax.numpy as jnp
        import optax

        import zoo

        module = zoo.create(self.model, **self.fields)
        examples = [self.examples[i] for i in range(len(self.examples))]
        images = jnp.stack([x["images"] for x in examples])
        labels = jnp.stack([x["label"] for x in examples])
        optimizer = optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.steps))

        def loss(variables: Any, rows: Array) -> Array:
            logits = module.apply(variables, images[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

        def step(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], None]:
            variables, state = carry
            rows = jax.random.choice(key, len(labels), (64,))
            updates, state = optimizer.update(jax.grad(loss)(variables, rows), state)
            return (optax.apply_updates(variables, updates), state), None

        @jax.jit
        def train(key: Array) -> Any:
            keys = jax.random.split(key, self.steps + 1)
            start = module.init(keys[0], images[:1])
            return jax.lax.scan(step, (start, optimizer.init(start)), keys[1:])[0][0]

        variables = train(jax.random.key(self.seed))

        @jax.jit
        def pooled(images: Array) -> Array:
            return module.apply(variables, images, method="features")["pooled"]

        return lambda images: np.asarray(pooled(images))
