"""A sign of life, for whoever watches over this process."""

import os
from contextlib import suppress

__all__ = ["alive"]


def alive(*, last: bool = False) -> None:
    """A sign of life for `python -m jaxopt_lab.supervise --stalled S`, which starts all again where none comes for S seconds.

    `train.fit` gives one as it goes; a loop of one's own, or an evaluation that takes long, calls this after each piece of work. It
    costs some microseconds: the file that JAXOPT_LAB_ALIVE names is touched. Without that variable nothing happens.

    Args:
      last: no more will come for now, however long what follows takes: the file is removed.

    >>> alive()
    """
    path = os.environ.get("JAXOPT_LAB_ALIVE")
    if not path:
        return
    # A sign that cannot be given, of a supervisor that has ended, say, is nothing that a training should end by.
    with suppress(OSError):
        if last:
            os.unlink(path)
        else:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            os.utime(path)
