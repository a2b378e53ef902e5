"""Functions with derivatives of their own (`jax.custom_jvp`, `jax.custom_vjp`) inside a lifted model.

They are called on the dense weight, so that they keep their derivative. quax 0.4.6 would take a leaf apart field by field: a
`custom_jvp` rule then sees the tangents of codes and scale as if they made a tangent of the weight, which is silently wrong, and a
`custom_vjp` is refused even where no leaf is involved. Both are mended here, in quax's own trace, because its handlers of `jit`,
`scan` and `cond` make new ones of that class; leaves that are not of this package are treated as quax treats them.
"""

from typing import Any

import jax
from jax.extend.core import set_current_trace
from quax._trace import _QuaxTrace, _QuaxTracer
from quax._values import _dense

from jaxopt_lab.compress.leaf import Leaf

__all__ = []


def _dense_arguments(trace: Any, tracers: Any) -> list:
    values = [trace.to_value(tracer) for tracer in tracers]
    with set_current_trace(trace.parent_trace):
        return [_QuaxTracer(trace, _dense(value.materialise()) if isinstance(value, Leaf) else value) for value in values]


def _call_whole(trace: Any, primitive: Any, fun: Any, fwd: Any, bwd: Any, tracers: Any, **params: Any) -> list:
    """The call as it is, in the trace outside quax's, on dense arguments."""
    values = [trace.to_value(tracer) for tracer in tracers]
    with set_current_trace(trace.parent_trace):
        arrays = tuple(type(value).materialise(value) for value in values)
        avals = tuple(jax.typeof(array) for array in arrays)
        out = primitive.bind_with_trace(trace.parent_trace, arrays, avals, {"subfuns": (fun, fwd, bwd), **params})
    return [_QuaxTracer(trace, _dense(array)) for array in out]


_custom_jvp_call = _QuaxTrace.process_custom_jvp_call
_custom_vjp_call = vars(_QuaxTrace).get("process_custom_vjp_call", _call_whole)


def _process_custom_jvp_call(self, primitive, fun, jvp, tracers, **params):
    return _custom_jvp_call(self, primitive, fun, jvp, _dense_arguments(self, tracers), **params)


def _process_custom_vjp_call(self, primitive, fun, fwd, bwd, tracers, **params):
    return _custom_vjp_call(self, primitive, fun, fwd, bwd, _dense_arguments(self, tracers), **params)


_QuaxTrace.process_custom_jvp_call = _process_custom_jvp_call
_QuaxTrace.process_custom_vjp_call = _process_custom_vjp_call
