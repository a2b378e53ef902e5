"""Several processes that save and restore together: what the first decides, all of them do, and what fails in one, fails in all.

Each wait is bounded by the caller's timeout. Orbax waits without an end at two places: after it has read, which is passed by, since
each process reads as if it were alone and they meet here; and where it begins to save, right after they have met here, so that only
who dies, hangs or fails in between is waited for, and who dies is noticed by JAX's own watch. Alone nothing of it costs anything.
"""

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

__all__ = ["agree", "alone", "failure", "is_first", "meet", "number"]

_ERRORS = {kind.__name__: kind for kind in (Damaged, FileNotFoundError, Locked, OSError, TimeoutError, TypeError, ValueError)}
_COUNT = itertools.count()
_TOLD_BYTES = 1024


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


def failure(name: str, own: Exception | None, timeout: float) -> Exception | None:
    """What went wrong in a part of the work that each process does for itself: its own error, or else that of another process.

    As `agree`, to be called by every process; so all of them raise, or none does, and none goes on to wait for one that has ended.

    Args:
      name: for errors.
      own: what this process has met; None if all went well.
      timeout: how many seconds the others wait for it.

    Returns:
      An error to raise; None if there was none anywhere.

    Raises:
      TimeoutError: not all came in time, and this process has no error of its own.

    >>> failure("a part", None, 1.0), failure("a part", ValueError("odd"), 1.0)
    (None, ValueError('odd'))
    """
    if alone():
        return own
    said = np.zeros(_TOLD_BYTES, np.uint8)
    if own is not None:
        body = np.frombuffer(f"{type(own).__name__}\n{own}".encode()[:_TOLD_BYTES], np.uint8)
        said[: body.size] = body
    try:
        meet(f"{name}/{number()}", timeout)
    except TimeoutError:
        if own is None:
            raise
        return own
    rows = np.asarray(multihost_utils.process_allgather(said)).astype(np.uint8)
    if own is not None:
        return own
    for process, row in enumerate(rows):
        if row.any():
            kind, _, message = row.tobytes().rstrip(b"\0").decode(errors="ignore").partition("\n")
            return _ERRORS.get(kind, RuntimeError)(f"{message} (in process {process})")
    return None
