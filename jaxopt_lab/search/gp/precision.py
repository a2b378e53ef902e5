"""Where the arithmetic of a Gaussian process is done: in float64, on the CPU, whatever the session's own settings."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import threadpoolctl

__all__ = ["exactly"]


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """A context in which jax computes in float64 on the CPU; the session's settings are back after it.

    The Cholesky factor of points that nearly coincide, which a search draws at its end, does not exist in float32. The problems are
    small: they are done on the CPU before an accelerator has started, and leave the accelerator to the trials. What is compiled
    within is cached apart from what the session compiles; the context is of its thread. Meanwhile LAPACK takes one thread: on cores
    that are busy with trials its threads wait for one another, and a triangular solve of 32 rows took 4 ms in place of 0.03.

    >>> import jax.numpy as jnp
    >>> with exactly():
    ...     jnp.zeros(()).dtype
    dtype('float64')
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(True))
        # A session may have started with no CPU backend (JAX_PLATFORMS=cuda): then it is done where the session computes.
        with contextlib.suppress(RuntimeError):
            stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        stack.enter_context(_pools().limit(limits=1, user_api="blas"))
        yield


@functools.cache
def _pools() -> threadpoolctl.ThreadpoolController:
    """The libraries that have threads of their own; to look for them takes longer than to set them."""
    import scipy.linalg.lapack  # noqa: F401  jaxlib's LAPACK is scipy's: it must be there to be found

    return threadpoolctl.ThreadpoolController()
