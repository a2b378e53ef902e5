"""A multilayer perceptron."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from jaxopt_lab.core.types import Array
from jaxopt_lab.nets import initializers

__all__ = ["MLP"]


class MLP(nn.Module):
    r"""Dense layers with an activation and dropout between them: :math:`h_{l+1} = \mathrm{drop}(\sigma(h_l W_l + b_l))`.

    Takes `[B, ...]` (flattened to `[B, n]`) and returns logits `[B, classes]`. In training dropout draws from the `dropout`
    collection.

    Attributes:
      features: the widths of the hidden layers; as many layers as there are entries.
      classes: how many outputs.
      dropout: the probability that a hidden unit is dropped, in `[0, 1]`.
      activation: an elementwise function.
      kernel_init: any initialiser; those of `nets.initializers` by name.
      dtype: what is computed in; by default that of the inputs and parameters.
      param_dtype: what the parameters are stored in.

    >>> import jax
    >>> shapes = jax.eval_shape(MLP(features=(32,)).init, jax.random.key(0), jnp.ones((1, 8, 8)))
    >>> jax.tree.map(jnp.shape, shapes["params"]["Dense_0"])
    {'bias': (32,), 'kernel': (64, 32)}
    """

    features: Sequence[int] = (128,)
    classes: int = 10
    dropout: float = 0.0
    activation: Callable[[Array], Array] = nn.relu
    kernel_init: nn.initializers.Initializer = initializers.he_normal
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        def dense(width):
            return nn.Dense(width, kernel_init=self.kernel_init, dtype=self.dtype, param_dtype=self.param_dtype)

        x = x.reshape(x.shape[0], -1)
        for width in self.features:
            x = self.activation(dense(width)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return dense(self.classes)(x)
