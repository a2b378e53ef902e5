"""Floor 6: the processes of one run on this machine, started together, and all again when one of them dies.

    python -m jaxopt_lab.supervise --processes 2 -- python train.py --resume

Processes that compute together cannot go on when one is gone, and JAX cannot take a new one in: so all of them are ended and
started again, and each finds the newest checkpoint. What runs is told who it is by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID, which `jaxopt_lab.parallel.hosts.initialize` reads. With one process it is told that it is alone, and is started
again likewise.

JAX's own watch sees who is gone or stopped altogether. One whose program hangs is noticed where another has ended well
(`--straggle`), and with `--stalled S` where it gives no sign of life for S seconds: `train.fit` gives one as it goes, and a loop of
one's own does so by `jaxopt_lab.parallel.alive()`. S must be longer than the longest pause that is in order: an evaluation, a
checkpoint, a compilation on the way. What comes before the first sign, and after `fit`, may take any time. Processes that compute
together wait for the one that hangs and fall silent within a step of it, so the silence of each is told, and whoever was silent
first need not be the one.

On several machines it takes their scheduler to end and start all processes, since a supervisor on each knows nothing of the others.
Under Slurm, with a process for each GPU:

    #!/bin/bash
    #SBATCH --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --time=24:00:00
    #SBATCH --requeue --open-mode=append --signal=TERM@300
    srun --kill-on-bad-exit=1 python train.py --resume
    code=$?
    if [ $code -ne 0 ] && [ $code -ne 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
    exit $code

There `initialize` reads Slurm's own variables. The run saves 300 s before its time is over and ends with code 75; that, a crash of
any process and a node that fails put the job into the queue again. (Where one process ends, Slurm ends the rest after its KillWait,
30 s by default.) On one machine under Slurm, systemd or in a container this command does; have the signal sent to it alone
(`KillMode=mixed` for systemd), for it is passed on.

Nothing is left behind. Each process leads a group of its own, which is killed as a whole once the process has ended. If this
command itself is killed, by SIGKILL too, Linux kills the processes (PR_SET_PDEATHSIG); what those have started on their own, such
as workers that load data, must see for itself that its parent is gone. (Of `--stalled` a directory of empty files then stays among
the temporary ones.) Standard library only, for Linux.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import NamedTuple

__all__ = ["environment", "main", "supervise"]

# As `timeout` has it, 124 is for who took too long.
_SAVED, _USAGE, _HUNG, _NOT_RUN, _NOT_FOUND = os.EX_TEMPFAIL, 2, 124, 126, 127
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_TICK_S = 0.05
# Whose peer has crashed can save nothing any more together with it.
_BEREFT_S = 10.0
_LONGEST_DELAY_S = 60.0
# Nobody trains and saves in less, so often.
_PREEMPTED_S, _QUICK = 5.0, 20
_LAST_S = 60.0

# Becomes the program, bound to live no longer than this command. Not a function between fork and exec, which threads would make
# unsafe. Python ignores SIGPIPE, and a program would inherit that.
_BOUND = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        sys.exit(1)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.execvp(command[0], command)
"""

_CODES = """\
exit codes:
  0       every process ended with 0
  2       wrong arguments: of this command, or a process ended with 2, which no restart would mend
  75      saved after a signal (EX_TEMPFAIL): SIGTERM, SIGINT or SIGHUP came, was passed on as SIGTERM, and every process ended
          with 75, or with 0; start the same command again to go on
  124     given up after --restarts: a process hung
  126     the command may not be run, 127: it was not found
  128+s   signal s came, and the processes did not all save within --grace; or given up, and signal s had ended a process
  other   given up after --restarts: the code of the first process that failed

A process that ends with 75 unasked was preempted and has saved: the others may save likewise within --grace, all are started again,
and it does not count as a restart, but for twenty in a row within 5 seconds each. Any other code but 0 and 2, and any signal,
counts, and leaves the others 10 seconds. So does a process that hangs: one that still runs --straggle seconds after the first has
ended with 0, or, with --stalled, one whose last sign of life is that long ago. A second signal kills the processes at once.
Restarts wait for --delay seconds, and twice as long each time in a row, up to 60.
"""


def environment(
    process: int, processes: int, port: int, devices_each: int | None = None, alive: str | None = None
) -> dict[str, str]:
    """The variables that tell a process who it is, to be set over the environment.

    Args:
      process: its index, from 0.
      processes: how many there are.
      port: a free one of this machine, where process 0 will listen to this machine alone.
      devices_each: how many GPUs each process gets, in order; None leaves all of them to all.
      alive: the file that this process touches as a sign of life, see `parallel.alive`; None where nobody looks.

    >>> environment(1, 2, 1234, devices_each=4)
    {'JAX_COORDINATOR_ADDRESS': '127.0.0.1:1234', 'JAX_COORDINATOR_BIND_ADDRESS': '127.0.0.1:1234', 'JAX_NUM_PROCESSES': '2',
     'JAX_PROCESS_ID': '1', 'JAX_LOCAL_DEVICE_IDS': '4,5,6,7'}
    """
    address = f"127.0.0.1:{port}"
    who = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(process),
    }
    if devices_each is not None:
        who["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(process * devices_each, (process + 1) * devices_each)))
    if alive is not None:
        who["JAXOPT_LAB_ALIVE"] = alive
    return who


def supervise(
    command: Sequence[str],
    *,
    processes: int,
    restarts: int = 3,
    grace: float = 60.0,
    window: float = 600.0,
    delay: float = 1.0,
    straggle: float = 600.0,
    stalled: float | None = None,
    devices_each: int | None = None,
) -> int:
    """Runs a command in several processes until all have ended well, from the main thread; see the module.

    Args:
      command: the program and its arguments, run by no shell. A wrapper should `exec` it: when that ends, its group is killed.
      processes: how many, at least 1.
      restarts: how many times in a row all are started again after a failure.
      grace: for how many seconds processes may save after a signal, before SIGKILL.
      window: all that ran for so many seconds before they failed made progress: the count of restarts begins anew.
      delay: seconds before the first restart in a row; twice as long before each one that follows.
      straggle: for how many seconds the others may run on once the first process has ended with 0; `math.inf` for ever.
      stalled: after how many seconds without a sign of life a process hangs, counted from its first sign; None never looks. A few
        seconds at least: `fit` gives up to ten a second, but no more than one a step.
      devices_each: as in `environment`.

    Returns:
      The exit code; `--help` lists them.

    >>> supervise(["true"], processes=2)
    0
    """
    if shutil.which(command[0]) is None:
        there = os.path.exists(command[0])
        _say(f"{command[0]}: {'it may not be run' if there else 'not found'}")
        return _NOT_RUN if there else _NOT_FOUND
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    # What is ignored stays so, as under nohup.
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, hear)
    try:
        started = partial(_Gang, list(command), processes, devices_each, straggle, stalled)
        return _rounds(started, heard, restarts, grace, window, delay)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rounds(started: "Callable[[], _Gang]", heard: list[int], restarts: int, grace: float, window: float, delay: float) -> int:
    """Starts all, waits, and starts all again, until there is a code to end with."""
    failures = quick = 0
    while True:
        begun = time.monotonic()
        codes, hung = _round(started(), heard, grace)
        # While one hung nothing went on: that time is no progress.
        ran = time.monotonic() - begun - max((each.seconds for each in hung.values()), default=0.0)
        if heard:
            return max(codes.values()) if set(codes.values()) <= {0, _SAVED} else 128 + heard[0]
        bad = {process: code for process, code in codes.items() if code}
        if not bad:
            return 0
        told = ", ".join(
            hung[process].told if process in hung else f"process {process} {_told(code)}" for process, code in bad.items()
        )
        if _USAGE in bad.values():
            _say(f"{told}: wrong arguments; not started again")
            return _USAGE
        preempted = _preempted(codes)
        failures = (0 if ran >= window else failures) + (not preempted)
        # Who says so at once, again and again, was not preempted.
        quick = quick + 1 if preempted and ran < _PREEMPTED_S else 0
        if quick > _QUICK:
            _say(f"{told} after {ran:.0f} s, {quick} times in a row; given up")
            return _SAVED
        if failures > restarts:
            _say(f"{told} after {ran:.0f} s; given up after {restarts} restarts with less than {window:g} s between failures")
            code = next(code for code in bad.values() if code != _SAVED)
            return 128 - code if code < 0 else code
        pause = min(delay * 2 ** max(failures - 1, 0), _LONGEST_DELAY_S)
        count = "" if preempted else f", restart {failures} of {restarts}"
        _say(f"{told} after {ran:.0f} s; all start again in {pause:g} s{count}")
        _until(lambda: bool(heard), pause)
        if heard:
            return 128 + heard[0]


class _Hung(NamedTuple):
    """A process that hangs: for how many seconds, and what is to be said of it."""

    seconds: float
    told: str


def _round(gang: "_Gang", heard: list[int], grace: float) -> tuple[dict[int, int], dict[int, _Hung]]:
    """Waits until all have ended, or one has failed or hangs, or a signal came; ends the others.

    Returns:
      The codes that count, 124 of those that hung, and these.
    """
    hung: dict[int, _Hung] = {}

    def enough() -> bool:
        if heard or any(gang.codes.values()):
            return True
        hung.update(gang.hung())
        return bool(hung)

    try:
        gang.wait(enough)
        codes = gang.codes
        if heard:
            name = signal.Signals(heard[0]).name
            _say(f"{name}: up to {grace:g} s to save for what runs ({gang.running()} of {gang.size}); a second signal kills it")
            gang.end(grace, lambda: len(heard) > 1)
        elif gang.running():
            # How those end that are ended for it says nothing.
            codes = {**codes, **dict.fromkeys(hung, _HUNG)}
            gang.end(grace if _preempted(codes) else min(grace, _BEREFT_S), lambda: len(heard) > 1)
        return (gang.codes, {}) if heard else (codes, hung)
    finally:
        gang.kill()


def _preempted(codes: dict[int, int]) -> bool:
    return set(codes.values()) - {0} == {_SAVED}


class _Gang:
    """Processes that live and end together.

    Attributes:
      size: how many were started.
      codes: those that have ended, in that order, and how: as `subprocess` has it, -s for signal s.
    """

    def __init__(
        self, command: list[str], processes: int, devices_each: int | None, straggle: float, stalled: float | None
    ) -> None:
        self._alive: dict[int, subprocess.Popen] = {}
        self.size = processes
        self.codes: dict[int, int] = {}
        self._straggle, self._stalled = straggle, stalled
        # When the first one ended, and of those that have given signs of life the last one's time, and when it was seen.
        self._first_over: float | None = None
        self._seen: dict[int, tuple[int, float]] = {}
        self._signs = None if stalled is None else tempfile.TemporaryDirectory(prefix="supervise-", ignore_cleanup_errors=True)
        port = _free_port()
        try:
            for process in range(processes):
                self._alive[process] = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), *command],
                    env={**os.environ, **environment(process, processes, port, devices_each, self._sign(process))},
                    # One input cannot be read by several; and a group that is not the terminal's would be stopped by reading.
                    stdin=subprocess.DEVNULL,
                    process_group=0,
                )
        except OSError:
            self.kill()
            raise

    def running(self) -> int:
        return len(self._alive)

    def wait(self, enough: Callable[[], bool], seconds: float | None = None) -> None:
        """Waits until all have ended, or it is enough, or the time is over."""
        _until(lambda: self._collect() or enough(), seconds)

    def end(self, grace: float, enough: Callable[[], bool]) -> None:
        """SIGTERM to all that run, and to those still there after `grace` seconds SIGKILL."""
        self._signal(signal.SIGTERM)
        self.wait(enough, grace)
        self.kill()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self.wait(lambda: False, _LAST_S)
        for popen in self._alive.values():
            _say(f"process {popen.pid} does not end even by SIGKILL: the system holds it, as where a disk does not answer")
        self._alive.clear()
        if self._signs is not None:
            self._signs.cleanup()

    def hung(self) -> dict[int, _Hung]:
        """Those that take too long: all that run long after one has ended, or whoever gave no sign of life for too long."""
        now = time.monotonic()
        if self._first_over is not None and now - self._first_over > self._straggle:
            first, seconds = next(iter(self.codes)), now - self._first_over
            return {
                process: _Hung(seconds, f"process {process} still ran {seconds:.0f} s after process {first} had ended with 0")
                for process in self._alive
            }
        if self._stalled is None:
            return {}
        since = {process: now - seen for process in self._alive if (seen := self._look(process, now)) is not None}
        late = [process for process in sorted(since, key=since.__getitem__, reverse=True) if since[process] > self._stalled]
        if not late:
            return {}
        # In a collective all hang soon; who was the first to be silent is of interest, and who never spoke.
        others = [f"process {process} for {since[process]:.0f} s" for process in since if process not in late]
        others += [f"process {process} gave none yet" for process in self._alive if process not in since]
        aside = f" ({', '.join(others)})" if others else ""
        return {
            process: _Hung(since[process], f"process {process} gave no sign of life for {since[process]:.0f} s{aside * (k == 0)}")
            for k, process in enumerate(late)
        }

    def _sign(self, process: int) -> str | None:
        return None if self._signs is None else os.path.join(self._signs.name, str(process))

    def _look(self, process: int, now: float) -> float | None:
        """When the last sign of life of a process was seen; None if there was none, or it has said that no more will come."""
        try:
            # Another time than before is a sign, whatever the clock of the file system says.
            sign = os.stat(self._sign(process) or "").st_mtime_ns
        except OSError:
            self._seen.pop(process, None)
            return None
        if process not in self._seen or self._seen[process][0] != sign:
            self._seen[process] = (sign, now)
        return self._seen[process][1]

    def _collect(self) -> bool:
        """Takes note of processes that have ended, and clears what they left in their groups; whether all have ended."""
        for process, popen in tuple(self._alive.items()):
            # Not yet reaped, the process keeps its number, and so the group's number cannot be anyone else's.
            if os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                _signal_group(popen.pid, signal.SIGKILL)
                self.codes[process] = popen.wait()
                del self._alive[process]
                self._first_over = self._first_over or time.monotonic()
        return not self._alive

    def _signal(self, number: int) -> None:
        for popen in self._alive.values():
            _signal_group(popen.pid, number)


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _until(done: Callable[[], bool], seconds: float | None) -> None:
    end = None if seconds is None else time.monotonic() + seconds
    while not done() and (end is None or time.monotonic() < end):
        time.sleep(_TICK_S)


def _free_port() -> int:
    """A port that is free now; should another program take it before process 0 does, all fail, and the next start has another."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def _told(code: int) -> str:
    if code >= 0:
        return "has saved and ended (code 75)" if code == _SAVED else f"ended with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _say(line: str) -> None:
    print(f"supervise: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code.

    Args:
      argv: the arguments after the program's name; None takes the program's own.

    Raises:
      SystemExit: after the help (code 0), or after a line about an argument that does not fit (code 2).

    >>> main(["--processes", "1", "--", "true"])
    0
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxopt_lab.supervise",
        description="Starts the processes of one run on this machine; when one fails, ends the others and starts all again.",
        usage="%(prog)s --processes N [--restarts R] [--grace S] [--window S] [--delay S] [--straggle S] "
        "[--stalled S] [--devices-each K] -- command ...",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole, some = _at_least(int, 0), _at_least(float, 0)
    add = parser.add_argument
    add("--processes", type=_at_least(int, 1), required=True, metavar="N", help="how many to start")
    add("--restarts", type=whole, default=3, metavar="R", help="restarts in a row after failures (%(default)s)")
    add("--grace", type=some, default=60.0, metavar="S", help="seconds to save in after a signal, before SIGKILL (%(default)g)")
    add("--window", type=some, default=600.0, metavar="S", help="a run so long counts restarts anew when it fails (%(default)g)")
    add("--delay", type=some, default=1.0, metavar="S", help="seconds before a first restart (%(default)g)")
    add("--straggle", type=some, default=600.0, metavar="S", help="seconds for the others once one has ended with 0 (%(default)g)")
    add("--stalled", type=_at_least(float, 2), metavar="S", help="seconds without a sign of life after which a process hangs (off)")
    add(
        "--devices-each",
        type=_at_least(int, 1),
        metavar="K",
        help="GPUs for each process: the first K, the next K, ... (all for all)",
    )
    add("command", nargs="+", help="what to run, after --; it should go on from its own checkpoints")
    given = vars(parser.parse_args(argv))
    return supervise(given.pop("command"), **given)


def _at_least(kind: Callable[[str], float], least: int) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return value

    parse.__name__ = f"{kind.__name__} of at least {least}"
    return parse


if __name__ == "__main__":
    sys.exit(main())
