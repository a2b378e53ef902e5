"""U-shaped networks, with every width as a field."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from jaxopt_lab.core.types import Array
from jaxopt_lab.nets import initializers

__all__ = ["UNet"]


class UNet(nn.Module):
    r"""Down through pooled levels of convolutions, up again by transposed ones, joined with what each level saw: a map of logits.

    .. math:: d_k = C_k(\mathrm{pool}(d_{k-1})), \qquad u_k = C'_k([d_k, \; T_k * u_{k+1}])

    where a C is 3x3 convolutions with an activation behind each, the pool the maximum of 2x2, T a transposed convolution of 2x2
    with stride 2, and the brackets join channels; a 1x1 convolution comes last. Maps are padded, so that the output has the sides
    of the input (the paper's lose a margin and are cropped). A convolution has a bias unless a normalisation stands behind it.

    Takes `[B, H, W, C]`, of sides that can be halved once a level but the last, and returns logits `[B, H, W, classes]`.

    Attributes:
      widths: for each level on the way down, the bottom included, the widths of its convolutions.
      ups: for each level on the way up, from below, the width of its transposed convolution and those of its convolutions; by
        default the last width of the level across, and its widths.
      classes: how many outputs a pixel.
      norm: makes normalisations, one behind each 3x3 convolution: `nn.BatchNorm`, `partial(nn.GroupNorm, num_groups=8)`, or any
        other that takes a name and the types; none by default, as in the paper.
      dropout: the probability that an entry of the bottom is dropped.
      activation: an elementwise function.
      kernel_init: any initialiser; those of `nets.initializers` by name.
      dtype: what is computed in; by default that of the inputs and parameters.
      param_dtype: what the parameters are stored in.

    >>> import jax
    >>> shapes = jax.eval_shape(UNet().init, jax.random.key(0), jnp.ones((1, 64, 64, 1)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
    31030658

    Source: Ronneberger, Fischer and Brox, "U-Net: convolutional networks for biomedical image segmentation", 2015.
    """

    widths: Sequence[Sequence[int]] = ((64, 64), (128, 128), (256, 256), (512, 512), (1024, 1024))
    ups: Sequence[Sequence[int]] | None = None
    classes: int = 2
    norm: Callable[..., nn.Module] | None = None
    dropout: float = 0.0
    activation: Callable[[Array], Array] = nn.relu
    kernel_init: nn.initializers.Initializer = initializers.he_normal
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        *across, bottom = self.widths
        ups = [(level[-1], *level) for level in reversed(across)] if self.ups is None else self.ups
        self._check(x, len(across), len(ups))
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = partial(nn.Conv, kernel_init=self.kernel_init, **types)

        def normed(x: Array, name: str) -> Array:
            if self.norm is None:
                return x
            norm = self.norm(name=name, **types)
            return norm(x, use_running_average=not train) if isinstance(norm, nn.BatchNorm) else norm(x)

        def level(x: Array, widths: Sequence[int], name: str) -> Array:
            for k, width in enumerate(widths):
                x = conv(width, (3, 3), padding=1, use_bias=self.norm is None, name=f"{name}_conv_{k}")(x)
                x = self.activation(normed(x, f"{name}_norm_{k}"))
            return x

        seen = []
        for k, widths in enumerate(across):
            seen.append(level(x, widths, f"down_{k}"))
            x = nn.max_pool(seen[-1], (2, 2), strides=(2, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(level(x, bottom, "bottom"))
        for k, (width, *widths) in enumerate(ups):
            x = nn.ConvTranspose(width, (2, 2), strides=(2, 2), kernel_init=self.kernel_init, name=f"up_{k}", **types)(x)
            x = level(jnp.concatenate([seen.pop(), x], axis=-1), widths, f"up_{k}")
        return conv(self.classes, (1, 1), name="head")(x)

    def _check(self, x: Array, halved: int, ups: int) -> None:
        if ups != halved:
            raise ValueError(f"ups must be {halved}, one for each level of widths but the bottom; got {ups}")
        if any(side % 2**halved for side in x.shape[1:3]):
            raise ValueError(f"images of {x.shape[1]} x {x.shape[2]} cannot be halved {halved} times; pad them to {2**halved}n")
