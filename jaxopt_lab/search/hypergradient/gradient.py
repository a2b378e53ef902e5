"""Value and gradient of a validation loss with respect to hyper-parameters, through a training."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxopt_lab.core.tracing.programs import Rules, flow
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.search.grouping import strong
from jaxopt_lab.search.hypergradient.diagnosis import diagnosis
from jaxopt_lab.search.hypergradient.mended import mended
from jaxopt_lab.search.hypergradient.methods import Method, reverse
from jaxopt_lab.search.hypergradient.unroll import Problem, outer_of, paths_of, stacked, step_of

__all__ = ["Hypergradient", "hypergradient"]


class Hypergradient(NamedTuple):
    """What `hypergradient` returns.

    Attributes:
      value: the outer loss, a scalar.
      gradient: a tree like the hyper-parameters.
      state: the state after the last step; a next call may go on from it.
      finite: whether value and gradient are, a bool scalar; under `jit` nothing else can say so.
      checks: what an approximate method says of itself (`implicit`: `slope` and `residual`).
    """

    value: Array
    gradient: PyTree
    state: PyTree
    finite: Array
    checks: dict[str, Array]


def hypergradient(
    inner_step: Callable[[PyTree, Any, PyTree], Any],
    outer_loss: Callable[..., Any],
    hyper: PyTree,
    state: PyTree | Callable[[PyTree], PyTree],
    batches: Any,
    *,
    steps: int,
    method: Method | None = None,
    mend: bool = True,
) -> Hypergradient:
    r"""Trains for `steps` steps, and differentiates what comes of it with respect to the hyper-parameters.

    .. math:: F(\lambda) = \mathcal{L}_{\text{outer}}(w_T, \lambda), \qquad w_{t + 1} = \Phi(w_t, \text{batch}_t, \lambda), \qquad
        w_0 = w_0(\lambda)

    A hyper-parameter is any float that the step takes from `hyper`: rates, momenta, decays (a tree of them, one a layer), weights
    of losses or of examples, temperatures, strengths of augmentation. The chain is built inside of the step from
    what is traced, `optax.adamw(hyper["rate"])`; a rate of its own for each step is a schedule that reads an array,
    `optax.sgd(lambda count: hyper["rates"][count])`. A threshold, as of pruning, has no gradient by itself: `gate` gives it one.

    The parts of a `Trial` fit as they are: `hypergradient(trial.step, trial.evaluate, config, trial.init(key, config), ...)`, with
    `state=lambda config: trial.init(key, config)` where the start depends on the configuration, too.

    **NaN.** Where a weight has never had a gradient, Adam's derivative is NaN, though its update is not. By default the step is
    `mended`: the values stay, and such a weight counts as one that does not move. (`eps_root=1e-8`, the usual mend, is not needed.
    It floors Adam's denominator at 1e-4: the MLP of `reverse` ended a quarter of the way that it went from where it ends without.)
    If a value or a gradient is not finite all the same, a call outside of `jit` raises, and says where it begins; inside, `finite`
    is False.

    Outside of `jit` the program is compiled once for as long as `inner_step`, `outer_loss`, a function `state` and `method` are the
    same objects (the last 64 are kept); inside of `jit`, `vmap` or `grad` it is part of the caller's.

    Args:
      inner_step: `(state, batch, hyper) -> state`, or `-> (state, metrics)`; the state keeps its shapes and types.
      outer_loss: `state -> scalar` or `(state, hyper) -> scalar`, with a gradient: a loss, not an accuracy.
      hyper: a tree of floats and arrays of floats.
      state: where to start, or a function of the hyper-parameters that gives it.
      batches: `batches(step) -> batch`, all of one size, which are stacked; or a tree of arrays `[steps, ...]`, one batch a step.
        Indices, `{"index": jnp.arange(steps)}`, are enough where the step gathers its own examples.
      steps: T, how many.
      method: `reverse`, `forward`, `truncated` or `implicit`; `reverse()` if None.
      mend: whether to mend the step's derivative.

    Returns:
      A `Hypergradient`: value, gradient, state, finite, checks.

    Raises:
      TypeError: a hyper-parameter is no float; the message names its path.
      ValueError: the outer loss is no scalar, the step changes the types of its state, batches do not fit the steps.
      FloatingPointError: outside of `jit`, a value or a gradient that is not finite; the message names the hyper-parameter, the
        step, and the part of the state where it begins.

    Warns:
      UserWarning: the result does not depend on a hyper-parameter, or only through what has no derivative; its gradient is zero.

    >>> import optax
    >>> def step(w, batch, hyper):
    ...     grad = jax.grad(lambda w: (w - batch) ** 2)(w)
    ...     updates, _ = optax.sgd(hyper["rate"]).update(grad, optax.sgd(0.1).init(w))
    ...     return optax.apply_updates(w, updates)
    >>> found = hypergradient(step, lambda w: (w - 1.0) ** 2, {"rate": 0.1}, 0.0, jnp.ones(3), steps=3)
    >>> f"{found.value:.4f}, {found.gradient['rate']:.4f}"  # (1 - 2 r)^6 and -12 (1 - 2 r)^5
    '0.2621, -3.9322'

    Source: Bengio, "Gradient-based optimization of hyperparameters", 2000; Maclaurin et al., 2015; Franceschi et al., 2017.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    _check_hyper(hyper)
    init = state if callable(state) else None
    inputs = (hyper, None if init else state, stacked(batches, steps))
    setting = _Setting(inner_step, outer_loss, init, steps, reverse() if method is None else method, mend)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(inputs)):
        return setting(*inputs)
    try:
        program = _compiled(setting)
    except TypeError:
        # Something in it cannot be hashed.
        program = jax.jit(setting)
    found = program(*inputs)
    if not isinstance(found.finite, Tracer) and not found.finite:
        raise FloatingPointError(diagnosis(setting.problem(*inputs), hyper, found.value, found.gradient))
    return found


class _Setting(NamedTuple):
    """All of a call but its arrays."""

    inner_step: Callable[..., Any]
    outer_loss: Callable[..., Any]
    init: Callable[[PyTree], PyTree] | None
    steps: int
    method: Method
    mend: bool

    def problem(self, hyper: PyTree, state: PyTree, batches: PyTree) -> Problem:
        """The training of these arrays."""

        def init(hyper: PyTree) -> PyTree:
            return jax.tree.map(strong, state if self.init is None else self.init(hyper))

        step = step_of(self.inner_step, jax.eval_shape(init, hyper))
        return Problem(mended(step) if self.mend else step, outer_of(self.outer_loss), init, batches, self.steps)

    def __call__(self, hyper: PyTree, state: PyTree, batches: PyTree) -> Hypergradient:
        hyper = jax.tree.map(jnp.asarray, hyper)
        problem = self.problem(hyper, state, batches)
        found = self.method(problem, hyper)
        _warn_of_idle(self.method.follows(problem), hyper)
        finite = jnp.isfinite(found.value)
        for leaf in jax.tree.leaves(found.gradient):
            finite &= jnp.isfinite(leaf).all()
        return Hypergradient(found.value, found.gradient, jax.lax.stop_gradient(found.state), finite, found.checks)


@functools.lru_cache(maxsize=64)
def _compiled(setting: _Setting) -> Callable[..., Hypergradient]:
    def program(*inputs: PyTree) -> Hypergradient:
        return setting(*inputs)

    return jax.jit(program)


def _check_hyper(hyper: PyTree) -> None:
    if not jax.tree.leaves(hyper):
        raise TypeError(f"hyper has no leaf to differentiate by; got {hyper!r}")
    for path, leaf in zip(paths_of(hyper), jax.tree.leaves(hyper), strict=True):
        dtype = getattr(leaf, "dtype", np.dtype(type(leaf)) if isinstance(leaf, (bool, int, float)) else None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"hyper-parameter {path or 'hyper'} is {type(leaf).__name__ if dtype is None else dtype}, which has no gradient; "
                "give a float, or let inner_step close over it"
            )


def _warn_of_idle(function: Callable[[PyTree], Any], hyper: PyTree) -> None:
    """Says which hyper-parameters no derivative of a function depends on."""

    def change(tangent):
        return jax.jvp(function, (hyper,), (tangent,))[1]

    program = jax.make_jaxpr(change)(jax.tree.map(jnp.zeros_like, hyper))
    paths = paths_of(hyper)
    reached = frozenset().union(*flow(program, [frozenset([path]) for path in paths], _DEPENDS))
    if idle := [path or "hyper" for path in paths if path not in reached]:
        warnings.warn(
            f"the outer loss does not depend on {', '.join(idle)}, or only through what has no derivative (rounding, a comparison, "
            "stop_gradient, a value taken from elsewhere than hyper); the gradient is zero",
            UserWarning,
            stacklevel=4,
        )


def _either(a: frozenset, b: frozenset, name: str) -> frozenset:
    del name
    return a | b


def _as_it_is(label: frozenset, *_: Any) -> frozenset:
    return label


_DEPENDS = Rules(
    lambda eqn, labels, place, settled: [frozenset().union(*labels)] * len(eqn.outvars),
    _either,
    _either,
    _as_it_is,
    _as_it_is,
    _as_it_is,
    frozenset(),
)
