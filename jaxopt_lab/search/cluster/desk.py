"""Questions on their way from the actors of a cluster to the driver: Ray calls actors, and no driver."""

import asyncio

__all__ = ["Desk"]


class Desk:
    """Where actors put their questions, and the driver finds them and leaves the answers; itself an actor.

    >>> async def asked_and_answered():
    ...     desk = Desk()
    ...     asking = asyncio.ensure_future(desk.ask(3, {7: 0.5, 8: 2.0}))
    ...     for number, step, scores in await desk.next():
    ...         await desk.answer(number, [label for label, score in scores.items() if score > 1])
    ...     return await asking
    >>> asyncio.run(asked_and_answered())
    [8]
    """

    def __init__(self):
        self._questions: asyncio.Queue[tuple[int, int, dict[int, float]]] = asyncio.Queue()
        self._answers: dict[int, asyncio.Future[list[int]]] = {}
        self._asked = 0

    async def ask(self, step: int, scores: dict[int, float]) -> list[int]:
        """An actor's question, whom of these to train no further after a step; it waits for the answer."""
        self._asked += 1
        number, answer = self._asked, asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        self._questions.put_nowait((number, step, scores))
        return await answer

    async def next(self) -> list[tuple[int, int, dict[int, float]]]:
        """The questions that wait, with their numbers, once there is one."""
        found = [await self._questions.get()]
        while not self._questions.empty():
            found.append(self._questions.get_nowait())
        return found

    async def answer(self, number: int, labels: list[int]) -> None:
        """The driver's answer; whoever asked may be dead."""
        self._answers.pop(number).set_result(labels)
