"""What classifiers of images share: sizes, example inputs, logits and a head."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.layers.model import Model


def check_pixels(
    model: nn.Module, pixels: Array, kind: str = "images", normalised: bool = True
) -> None:
    """Raises ValueError for whole numbers: pixels that nobody has scaled, and normalised."""
    dtype = getattr(pixels, "dtype", type(pixels).__name__)
    if hasattr(pixels, "dtype") and jnp.issubdtype(dtype, jnp.floating):
        return
    if not normalised:
        raise ValueError(
            f"This {type(model).__name__} takes {kind} of floats from 0 to 1, not {dtype}; divide "
            "by 255."
        )
    raise ValueError(
        f"This {type(model).__name__} takes {kind} of floats as its authors normalise them, "
        f"not {dtype}; divide by 255, subtract the mean and divide by the deviation "
        "(zoo.data.transforms.published_transforms does it)."
    )


class ImageClassifier(Model):
    """A model whose `features` map images to named arrays, `logits` among them.

    Attributes:
      image_size: height and width in pixels.
      in_channels: of the images.
      num_classes: 0 leaves out the head (logits are then the pooled features).
      remat: recompute blocks in the backward pass instead of keeping their activations; True, or
        what is kept nevertheless, by `zoo.layers.stack.REMAT`.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    image_size: tuple[int, int] = (224, 224)
    in_channels: int = 3
    num_classes: int = 1000
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def types(self) -> dict[str, jnp.dtype]:
        """Both number types, as arguments of a layer."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def example_inputs(self, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        shape = (batch_size, *self.image_size, self.in_channels)
        return {"images": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def __call__(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits."""
        return self.features(images, train)["logits"]

    def features(
        self, images: Float[Array, "batch height width in_channels"], train: bool = False
    ) -> dict[str, Array]:
        """Every named intermediate."""
        raise NotImplementedError

    def classify(
        self, x: Float[Array, "batch channels"], kernel_init: Callable
    ) -> Float[Array, "batch classes"]:
        """Logits of the pooled features, by `head`; called in `features`."""
        if not self.num_classes:
            return x
        return nn.Dense(self.num_classes, kernel_init=kernel_init, name="head", **self.types)(x)

    def check_images(self, images: Array) -> None:
        """Raises ValueError for what looks like images in another form than the model reads.

        Whole numbers are pixels that nobody normalised; channels first is PyTorch's order.
        """
        check_pixels(self, images)
        shape = images.shape
        if len(shape) == 4 and shape[3] != self.in_channels and shape[1] == self.in_channels:
            raise ValueError(
                f"This {type(self).__name__} takes images of shape (batch, height, width, "
                f"{self.in_channels}), and {shape} looks like channels first, as PyTorch has them; "
                "give images.transpose(0, 2, 3, 1)."
            )

    def check_channels(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless this is a batch of images with the right number of channels."""
        if len(shape) != 4 or shape[3] != self.in_channels or 0 in shape:
            raise ValueError(
                f"This {type(self).__name__} takes images of shape (batch, height, width, "
                f"{self.in_channels}), not {shape}."
            )

    def check_size(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless images of this shape are of the one size of this model."""
        pads = hasattr(self, "pad")
        if shape[1:] != (*self.image_size, self.in_channels):
            raise ValueError(
                f"This {type(self).__name__} takes images of shape (batch, {self.image_size[0]}, "
                f"{self.image_size[1]}, {self.in_channels}), not {shape}; resize them, or create "
                f"the model with another image_size{' or with pad=True' if pads else ''}."
            )
