"""The trace in which a lifted function runs: quax's, and its own way with functions that hold others.

Functions with derivatives of their own (`jax.custom_jvp`, `jax.custom_vjp`) are called on the dense weight, so that they keep their
derivative. quax 0.4.6 takes a leaf apart field by field: a `custom_jvp` rule then sees the tangents of codes and scale as if they
made a tangent of the weight, which is silently wrong; a `custom_vjp` is refused even where no leaf is involved. quax's handlers of
`jit`, `scan`, `while` and `cond` run their bodies in quax's own trace, so these four run theirs in this one.

Nothing in quax is changed: `quax.quaxify` elsewhere in the program is untouched. The names that are private to quax are imported
here and nowhere else; they are why its version has an upper bound.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend import linear_util as lu
from jax.extend.core import TraceTag, jaxpr_as_fun, set_current_trace, take_current_trace

from jaxopt_lab.core import tree

try:
    from quax._compat import jit_p, unpack_scan_args
    from quax._dispatch import _wrap_if_array
    from quax._trace import _QuaxTrace, _QuaxTracer, _unwrap_tracer, _wrap_tracer
    from quax._values import _DenseArrayValue
except ImportError as error:
    from importlib.metadata import version

    raise ImportError(f"install quax>=0.4.6,<0.5: what compress builds on is not in quax {version('quax')} ({error})") from None

__all__ = ["quaxified"]


def quaxified(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`quax.quaxify(fn)`, in the trace of this module; leaves that the function returns come out as leaves.

    Args:
      fn: any function of trees of arrays and leaves.

    >>> from jaxopt_lab.compress.leaves.quantized import quantize
    >>> turned = quaxified(lambda kernel: kernel.T)(quantize({"kernel": jax.numpy.ones((3, 2))})["kernel"])
    >>> type(turned).__name__, turned.shape
    ('Quantized', (2, 3))
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        with take_current_trace() as parent:
            trace = _Trace(parent, TraceTag())
            wrap = partial(_wrap_tracer, trace)
            # A node of the tree may ask what is being traced when it is rebuilt, as the variables of Flax NNX do.
            with set_current_trace(trace):
                within, args, kwargs = jax.tree.map(wrap, (fn, args, kwargs), is_leaf=tree.is_compressed)
                out = within(*args, **kwargs)
            with set_current_trace(parent):
                return jax.tree.map(partial(_unwrap_tracer, trace), out)

    return call


class _Trace(_QuaxTrace):
    __slots__ = ()

    def process_primitive(self, primitive: Any, tracers: Sequence[Any], params: dict[str, Any]) -> Any:
        if (handler := _HANDLERS.get(primitive)) is not None:
            values = [self._plain(tracer) for tracer in tracers]
            if any(map(tree.is_compressed, values)):
                with set_current_trace(self.parent_trace):
                    return [self._tracer(value) for value in handler(*values, **params)]
        return super().process_primitive(primitive, tracers, params)

    def process_custom_jvp_call(self, primitive: Any, fun: Any, jvp: Any, tracers: Sequence[Any], **params: Any) -> list:
        return self._call_dense(primitive, (self._inside(fun), self._inside(jvp)), tracers, params)

    def process_custom_vjp_call(self, primitive: Any, fun: Any, fwd: Any, bwd: Any, tracers: Sequence[Any], **params: Any) -> list:
        return self._call_dense(primitive, (self._inside(fun), self._inside(fwd), bwd), tracers, params)

    def _call_dense(self, primitive: Any, subfuns: tuple, tracers: Sequence[Any], params: dict[str, Any]) -> list:
        """The call as it is, in the trace outside this one, on dense arguments."""
        with set_current_trace(self.parent_trace):
            arrays = tuple(_dense(self._plain(tracer)) for tracer in tracers)
            avals = tuple(jax.typeof(array) for array in arrays)
            out = primitive.bind_with_trace(self.parent_trace, arrays, avals, {"subfuns": subfuns, **params})
            return [self._tracer(array) for array in out]

    def _inside(self, fun: Any) -> Any:
        """`fun` on dense arrays, in a trace like this one: it may close over what is traced here."""

        def run(*args: Any) -> list:
            with take_current_trace() as parent:
                trace = _Trace(parent, self.tag)
                with set_current_trace(trace):
                    out = fun.call_wrapped(*args)
                with set_current_trace(parent):
                    return [x if type(x) is SymbolicZero else _dense(trace._plain(x)) for x in out]

        return lu.wrap_init(run, debug_info=fun.debug_info)

    def _plain(self, tracer: Any) -> Any:
        """What a tracer stands for: a leaf, or an array."""
        value = self.to_value(tracer)
        return value.array if type(value) is _DenseArrayValue else value

    def _tracer(self, value: Any) -> _QuaxTracer:
        return _QuaxTracer(self, _wrap_if_array(value))


def _dense(value: Any) -> Any:
    return value.materialise() if tree.is_compressed(value) else value


def _stepwise(value: Any, length: int) -> Any:
    """What a scan takes apart: a leaf whose fields have a part for each step, or an array."""
    leaf = value.stepwise(length) if tree.is_compressed(value) else value
    return value.materialise() if leaf is NotImplemented else leaf


def _jit(*args: Any, jaxpr: Any, **_: Any) -> Sequence[Any]:
    return quaxified(jaxpr_as_fun(jaxpr))(*args)


def _scan(*args: Any, jaxpr: Any, length: int, reverse: bool, unroll: int, **params: Any) -> Sequence[Any]:
    consts, carry, xs = unpack_scan_args(args, params)
    fn = quaxified(jaxpr_as_fun(jaxpr))
    xs = [_stepwise(value, length) for value in xs]

    def body(carry: Any, xs: Any) -> tuple:
        out = fn(*consts, *carry, *xs)
        # A carry must keep its structure from step to step; what the body computes is no leaf.
        return [_dense(value) for value in out[: len(carry)]], out[len(carry) :]

    carry, ys = lax.scan(body, [_dense(value) for value in carry], xs, length, reverse, unroll)
    return [*carry, *ys]


def _while(*args: Any, cond_nconsts: int, cond_jaxpr: Any, body_nconsts: int, body_jaxpr: Any) -> Sequence[Any]:
    cond_consts, body_consts = args[:cond_nconsts], args[cond_nconsts : cond_nconsts + body_nconsts]
    init = [_dense(value) for value in args[cond_nconsts + body_nconsts :]]
    cond, body = quaxified(jaxpr_as_fun(cond_jaxpr)), quaxified(jaxpr_as_fun(body_jaxpr))
    return lax.while_loop(
        lambda carry: cond(*cond_consts, *carry)[0],
        lambda carry: [_dense(value) for value in body(*body_consts, *carry)],
        init,
    )


def _cond(index: Any, *args: Any, branches: Sequence[Any], branches_platforms: Any = None, **params: Any) -> Sequence[Any]:
    if branches_platforms is not None:  # the platform chooses, for which there is no public function on trees
        params |= {"branches": branches, "branches_platforms": branches_platforms}
        return lax.cond_p.bind(index, *map(_dense, args), **params)

    # Dense at the end, since one branch may return a leaf where another computes.
    def dense(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: [_dense(value) for value in fn(*args)]

    return lax.switch(index, [dense(quaxified(jaxpr_as_fun(branch))) for branch in branches], *args)


_HANDLERS = {jit_p: _jit, lax.scan_p: _scan, lax.while_p: _while, lax.cond_p: _cond}
