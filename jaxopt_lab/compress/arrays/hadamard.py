r"""Fast orthonormal rotations that spread outliers over all entries.

A length :math:`n = 2^k m` with odd :math:`m` is transformed by the Kronecker product of the Walsh-Hadamard matrix of size
:math:`2^k` and the Hartley matrix of size :math:`m`, whose entries are :math:`(\cos \theta + \sin \theta) / \sqrt m` with
:math:`\theta = 2 \pi i j / m`. Both are symmetric and orthonormal, so the transform is its own inverse, and no entry of it exceeds
:math:`\sqrt{2 / n}`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array

__all__ = ["random_signs", "rotate", "rotate_back", "transform"]

_LARGEST = 6
"""Binary logarithm of the largest factor that is done as one product: large enough for matrix units, small beside a weight."""


@partial(jax.jit, static_argnames="axis")
def transform(x: Array, axis: int = -1) -> Array:
    r"""The orthonormal Walsh-Hadamard transform along an axis; for lengths :math:`2^k m` see the module. It is its own inverse.

    .. math:: y = (H_{2^k} \otimes C_m) \, x, \qquad
              H_{2^k} = 2^{-k/2} \begin{pmatrix} 1 & 1 \\ 1 & -1 \end{pmatrix}^{\otimes k}

    It takes about :math:`11 k n` multiplications, and a Fourier transform where :math:`m > 1`.

    Args:
      x: floating point, of any rank; computed in at least float32, and rounded once.
      axis: along which.

    >>> transform(jnp.array([2.0, 0.0, 0.0, 0.0])), transform(jnp.array([1.0, 2.0, 3.0, 4.0]))
    (Array([1., 1., 1., 1.], dtype=float32), Array([ 5., -1., -2.,  0.], dtype=float32))

    Source: Fino and Algazi, "Unified matrix treatment of the fast Walsh-Hadamard transform", 1976; odd lengths: Bracewell,
    "Discrete Hartley transform", 1983.
    """
    y = jnp.moveaxis(wide(x), axis, -1)
    shape, n = y.shape, y.shape[-1]
    power = (n & -n).bit_length() - 1
    y = jnp.swapaxes(_hartley(y.reshape(*shape[:-1], 2**power, n >> power)), -1, -2)
    for start in range(0, power, _LARGEST):
        # The first axis is summed and comes back as the last: after all factors they are in order again.
        factor = _walsh(min(_LARGEST, power - start))
        cut = y.reshape(*y.shape[:-1], len(factor), y.shape[-1] // len(factor))
        numbers = (((cut.ndim - 2,), (0,)), ((), ()))
        y = lax.dot_general(cut, jnp.asarray(factor, y.dtype), numbers, precision=lax.Precision.HIGHEST).reshape(y.shape)
    return jnp.moveaxis(jnp.swapaxes(y, -1, -2).reshape(shape), -1, axis).astype(x.dtype)


def random_signs(key: Array, n: int) -> Array:
    """Signs that make a transform a random rotation: -1 or 1 with equal chance, int8 `[n]`.

    >>> set(random_signs(jax.random.key(0), 64).tolist()) == {-1, 1}
    True
    """
    return jax.random.rademacher(key, (n,), jnp.int8)


def rotate(x: Array, signs: Array, axis: int = -1) -> Array:
    r"""A random rotation along an axis: :math:`y = H (\sigma \odot x)`. It keeps lengths and products, and spreads outliers.

    Args:
      x: floating point, of any rank.
      signs: -1 or 1, `[n]`.
      axis: along which.

    >>> rotate(jnp.array([0.0, 2.0, 0.0, 0.0]), jnp.array([1, -1, 1, 1], jnp.int8))
    Array([-1.,  1., -1.,  1.], dtype=float32)

    Source: Tseng et al., "QuIP#: even better LLM quantization with Hadamard incoherence and lattice codebooks", 2024; Ashkboos et
    al., "QuaRot: outlier-free 4-bit inference in rotated LLMs", 2024.
    """
    return transform(x * _along(signs, x, axis), axis)


def rotate_back(x: Array, signs: Array, axis: int = -1) -> Array:
    r"""The inverse of `rotate`: :math:`y = \sigma \odot (H x)`.

    >>> signs = jnp.array([1, -1, 1, 1], jnp.int8)
    >>> rotate_back(rotate(jnp.array([0.0, 2.0, 0.0, 0.0]), signs), signs)
    Array([0., 2., 0., 0.], dtype=float32)
    """
    return transform(x, axis) * _along(signs, x, axis)


def _along(signs: Array, x: Array, axis: int) -> Array:
    sides = [1] * x.ndim
    sides[axis] = -1
    return signs.astype(x.dtype).reshape(sides)


def _walsh(power: int) -> np.ndarray:
    one = np.ones((1, 1))
    for _ in range(power):
        one = np.kron(one, np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2))
    return one


def _hartley(x: Array) -> Array:
    """The Hartley transform along the last axis: the real part of the Fourier transform less the imaginary one."""
    m = x.shape[-1]
    if m == 1:
        return x
    found = jnp.fft.fft(x)
    return (found.real - found.imag) / m**0.5
