"""Several processes that save and restore together: what the first decides, all of them do. Alone nothing of it costs anything."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from jaxopt_lab.checkpoint.digests import Damaged
from jaxopt_lab.checkpoint.lock import Locked

__all__ = ["agree", "alone", "is_first", "meet", "number"]

_ERRORS = {kind.__name__: kind for kind in (Damaged, FileNotFoundError, Locked, OSError, TimeoutError, TypeError, ValueError)}
_COUNT = itertools.count()


def is_first() -> bool:
    """Whether this process is the one that locks, digests, deletes and decides.

    >>> is_first()
    True
    """
    return jax.process_index() == 0


def alone() -> bool:
    """Whether there is one process.

    >>> alone()
    True
    """
    return jax.process_count() == 1


def number() -> int:
    """A number that was not given before, the same in every process: all must ask in the same order.

    >>> number() < number()
    True
    """
    return next(_COUNT)


def meet(name: str, timeout: float) -> None:
    """Returns once every process is here; may be called from threads, under names of their own.

    Raises:
      TimeoutError: not all came in time.

    >>> meet("anywhere", 1.0)
    """
    if alone():
        return
    try:
        multihost.get_barrier_sync_fn()(key=f"jaxopt_lab/{name}", timeout_ms=max(1, round(1000 * timeout)))
    except jax.errors.JaxRuntimeError as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise TimeoutError(
            f"process {jax.process_index()} waited {timeout:g} s for the others at {name!r}: every process must save and "
            f"restore in the same order ({first})"
        ) from error


def agree(name: str, decide: Callable[[], Any], timeout: float) -> Any:
    """What `decide` gives in the first process, in all of them; an error that it raises there is raised everywhere.

    Must be called by every process, in the same order, where each may run programs on the devices.

    Args:
      name: for errors.
      decide: called in the first process alone; gives JSON.
      timeout: how many seconds the others wait for it.

    Raises:
      TimeoutError: not all came in time.

    >>> agree("a number", lambda: 3, 1.0)
    3
    """
    if alone():
        return decide()
    said: dict[str, Any] = {}
    raised: BaseException | None = None
    if is_first():
        try:
            said = {"value": decide()}
        except Exception as error:
            raised = error
            said = {"error": type(error).__name__, "message": str(error)}
    meet(f"{name}/{number()}", timeout)
    body = np.frombuffer(json.dumps(said).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(body.size)))
    told = np.zeros(size, np.uint8)
    told[: body.size if is_first() else 0] = body if is_first() else 0
    said = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(told)).astype(np.uint8).tobytes())
    if raised is not None:
        raise raised
    if "error" in said:
        raise _ERRORS.get(said["error"], RuntimeError)(said["message"])
    return said["value"]
