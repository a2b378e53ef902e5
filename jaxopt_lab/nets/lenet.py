"""LeNet-5, with its widths as fields."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from jaxopt_lab.core.types import Array
from jaxopt_lab.nets import initializers

__all__ = ["LeNet"]

_KERNEL = 5


class LeNet(nn.Module):
    r"""Two 5x5 convolutions, each pooled 2x2, and three dense layers; 61,706 parameters on `[B, 28, 28, 1]`.

    The sizes are those of LeNet-5; the activation and the pooling are today's (ReLU, maximum) unless they are given. The first
    convolution pads by two, as the original's 28x28 digits in a field of 32x32 did; the second does not pad, unless the map has
    become smaller than its kernel (8x8 digits). For inputs that are 32x32 already, `padding=("VALID", "VALID")`.

    Takes `[B, H, W, C]` (or `[B, H, W]`, one channel) and returns logits `[B, classes]`.

    Attributes:
      channels: the widths of the convolutions.
      features: the widths of the hidden dense layers.
      classes: how many outputs.
      dropout: the probability that a hidden dense unit is dropped.
      padding: of each convolution.
      activation: an elementwise function.
      pool: `nn.max_pool` or `nn.avg_pool`.
      kernel_init: any initialiser; those of `nets.initializers` by name.
      dtype: what is computed in; by default that of the inputs and parameters.
      param_dtype: what the parameters are stored in.

    >>> import jax
    >>> shapes = jax.eval_shape(LeNet().init, jax.random.key(0), jnp.ones((1, 28, 28, 1)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
    61706

    Source: LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", 1998.
    """

    channels: Sequence[int] = (6, 16)
    features: Sequence[int] = (120, 84)
    classes: int = 10
    dropout: float = 0.0
    padding: Sequence[str] = ("SAME", "VALID")
    activation: Callable[[Array], Array] = nn.relu
    pool: Callable[..., Array] = nn.max_pool
    kernel_init: nn.initializers.Initializer = initializers.he_normal
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        options = {"kernel_init": self.kernel_init, "dtype": self.dtype, "param_dtype": self.param_dtype}
        if x.ndim == 3:
            x = x[..., None]
        for width, padding in zip(self.channels, self.padding, strict=True):
            fits = min(x.shape[1:3]) >= _KERNEL
            x = nn.Conv(width, (_KERNEL, _KERNEL), padding=padding if fits else "SAME", **options)(x)
            x = self.pool(self.activation(x), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for width in self.features:
            x = self.activation(nn.Dense(width, **options)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, **options)(x)
