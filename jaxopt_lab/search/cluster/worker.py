"""What runs in the actors of a cluster: it takes trials out of the object store, and trains what it is given."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxopt_lab.core.types import PyTree
from jaxopt_lab.search.cluster.plan import Row
from jaxopt_lab.search.elsewhere import relabelled
from jaxopt_lab.search.population import population
from jaxopt_lab.search.trial import Result

__all__ = ["KEPT", "Box", "Worker", "import_ray"]

KEPT = 4
"""How many trials and streams of batches an actor keeps."""


class Box(NamedTuple):
    """Something that lies in the cluster's object store, to be taken out once by each actor.

    Attributes:
      mark: equal marks, equal contents.
      refs: its one reference, in a list, so that Ray passes it on as it is.
    """

    mark: int
    refs: list[Any]


def import_ray() -> Any:
    """Ray, which is an optional dependency.

    Raises:
      ModuleNotFoundError: it is not installed; the message says what to do.

    >>> try:
    ...     print(import_ray().__name__)
    ... except ModuleNotFoundError as error:
    ...     print(error.name)
    ray
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ModuleNotFoundError(
            'search.ray needs Ray, which is not installed: pip install "jaxopt_lab[ray]", or ray itself', name="ray"
        ) from error
    return ray


class Worker:
    """What runs in an actor: it takes trials out of their boxes once, and keeps what it compiled of them."""

    def __init__(self):
        self._kept: dict[int, Any] = {}
        self._shared: tuple[int, PyTree] | None = None

    def where(self) -> tuple[str, int]:
        """Its node and its process, once JAX has found its devices."""
        jax.devices()
        return import_ray().get_runtime_context().get_node_id(), os.getpid()

    def train(
        self,
        settings: Mapping[str, Any],
        trial: Box,
        batches: Box,
        shared: Box | None,
        run: Mapping[str, Any],
        rows: Sequence[Row],
        desk: Any = None,
    ) -> Result:
        """Trains some configurations, and asks at the desk, if there is one; what it returns lies in the host's memory."""
        for name, value in settings.items():
            jax.config.update(name, value)
        devices = jax.local_devices()

        def asked(step: int, scores: Mapping[int, float]) -> list[int]:
            return import_ray().get(desk.ask.remote(step, dict(scores)))

        found = population(
            self._out_of(trial),
            [row.config for row in rows],
            numbers=[row.number for row in rows],
            batches=self._out_of(batches),
            shared=self._shared_of(shared),
            prune=relabelled(asked if desk is not None else None, [row.label for row in rows]),
            # On a CPU its devices are one, whatever their number.
            devices=devices if devices[0].platform != "cpu" else None,
            **run,
        )
        return found._replace(states=[jax.device_get(state) for state in found.states], configs=())

    def _shared_of(self, box: Box | None) -> PyTree:
        """What all configurations share: the newest alone, for it may be large."""
        if box is None or self._shared is None or self._shared[0] != box.mark:
            # First let go of the last, or both would be there.
            self._shared = None
            self._shared = None if box is None else (box.mark, import_ray().get(box.refs[0]))
        return None if self._shared is None else self._shared[1]

    def _out_of(self, box: Box) -> Any:
        """The very same object each time, for compiled programs are known by the functions that they are of."""
        thing = self._kept.pop(box.mark) if box.mark in self._kept else import_ray().get(box.refs[0])
        self._kept[box.mark] = thing
        for mark in list(self._kept)[:-KEPT]:
            del self._kept[mark]
        return thing
