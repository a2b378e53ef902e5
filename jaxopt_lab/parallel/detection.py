"""What the environment of a process says about the others of its run. Nothing is started or asked here.

    plain variables   JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES, JAX_PROCESS_ID: of `jaxopt_lab.supervise`, or by hand
    Slurm             in a step of `srun`
    Open MPI          under `mpirun`; from version 5 on only with `mpirun -x JAX_COORDINATOR_ADDRESS=host:port`
    Cloud TPU         where JAX sees TPU chips it asks the machine's metadata itself

JAX_COORDINATOR_PORT changes the port that Slurm's and Open MPI's job numbers come to, and JAX_LOCAL_DEVICE_IDS ("0,1") says which
GPUs are this process's. JAX reads the address and the devices as well, not the other two. JAX_NUM_PROCESSES=1 alone says that there
is one process, whatever else is set.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Plan", "detect"]

_ADDRESS, _PROCESSES, _PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_PORT, _DEVICES = "JAX_COORDINATOR_PORT", "JAX_LOCAL_DEVICE_IDS"
_TPU = "TPU_ML_PLATFORM"


@dataclass(frozen=True)
class Plan:
    """How to find the other processes; see `detect`.

    Attributes:
      how: what told so: "plain variables", "Slurm", "Open MPI", "Cloud TPU".
      coordinator: "host:port", where process 0 listens; None where JAX finds out itself, and then the next two are None too.
      processes, process: how many there are, and which this is, from 0.
      local_device_ids: the GPUs of this process, of those that are visible; None for all of them.

    >>> Plan("plain variables", "10.0.0.1:1234", 2, 0).local_device_ids is None
    True
    """

    how: str
    coordinator: str | None
    processes: int | None
    process: int | None
    local_device_ids: tuple[int, ...] | None = None


def detect(environ: Mapping[str, str]) -> Plan | None:
    """What an environment says about other processes; None where this is the only one.

    Plain variables come first, then Slurm, then Open MPI, then Cloud TPU.

    Raises:
      ValueError: the variables are set by half, are no numbers, or contradict each other; the message names them.

    >>> detect({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    Plan(how='plain variables', coordinator='10.0.0.1:1234', processes=2, process=1, local_device_ids=None)
    >>> detect({}) is None
    True
    """
    for found in (_plain, _slurm, _open_mpi):
        plan = found(environ)
        if plan is not None:
            return None if plan.processes == 1 else plan
    if environ.get(_ADDRESS):
        raise ValueError(
            f"{_ADDRESS}={environ[_ADDRESS]} is set, and nothing says how many processes there are: set {_PROCESSES} and {_PROCESS}"
            " as well, or unset it"
        )
    # JAX sets this when it is imported where libtpu and TPU chips are.
    if _TPU in environ and environ.get("JAX_PLATFORMS", "tpu").split(",")[0] == "tpu":
        return Plan("Cloud TPU", None, None, None)
    return None


def _plain(environ: Mapping[str, str]) -> Plan | None:
    if not environ.get(_PROCESSES) and not environ.get(_PROCESS):
        return None
    if environ.get(_PROCESSES) == "1" and environ.get(_PROCESS, "0") == "0":
        return Plan("plain variables", None, 1, 0)
    needed = (_ADDRESS, _PROCESSES, _PROCESS)
    missing = [name for name in needed if not environ.get(name)]
    if missing:
        present = ", ".join(f"{name}={environ[name]}" for name in needed if environ.get(name))
        raise ValueError(f"{present} is set, and {' and '.join(missing)} is not; set all three, or none for one process")
    return _checked("plain variables", environ, environ[_ADDRESS], _PROCESSES, _PROCESS)


def _slurm(environ: Mapping[str, str]) -> Plan | None:
    """In a step of `srun`: the first node's process 0 coordinates, at a port made of the job's number, as JAX itself has it."""
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= set(environ):
        return None
    # The step's own number: a shell that `salloc` opens is one process, whatever its allocation was asked for.
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    nodes = environ["SLURM_STEP_NODELIST"]
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} names no node; set {_ADDRESS}, {_PROCESSES} and {_PROCESS} by hand")
    address = environ.get(_ADDRESS) or f"{first[1]}{first[2] or ''}:{_port(environ, _number(environ, 'SLURM_JOB_ID'))}"
    own = None
    # Tasks that were bound to GPUs of their own see no others.
    if "SLURM_LOCALID" in environ and not {"SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND"} & set(environ):
        here = _tasks_here(environ.get("SLURM_STEP_TASKS_PER_NODE", ""), int(environ.get("SLURM_NODEID", "0")))
        own = _own_devices(environ, _number(environ, "SLURM_LOCALID"), here)
    return _checked("Slurm", environ, address, tasks, "SLURM_PROCID", own)


def _open_mpi(environ: Mapping[str, str]) -> Plan | None:
    """Under `mpirun`: where the launcher runs, at a port made of the job's number, as JAX itself has it."""
    if "OMPI_COMM_WORLD_SIZE" not in environ or "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    address = environ.get(_ADDRESS)
    if not address and environ["OMPI_COMM_WORLD_SIZE"] != "1":
        # As in 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911 and 1314521088.0;tcp6://[fe80::b9b:ac5d,2620:10d::2]:43370.
        found = re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", environ.get("OMPI_MCA_orte_hnp_uri", ""))
        if found is None:
            raise ValueError(
                "Open MPI does not say where process 0 runs (version 5 does not): "
                f"mpirun -x {_ADDRESS}=host:port, with the host of rank 0 and a free port of it"
            )
        # An address of IP 6 needs its brackets before a port. Job numbers are multiples of 4096.
        address = f"{found[2] or f'[{found[3]}]'}:{_port(environ, int(found[1]) >> 12)}"
    own = None
    if {"OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"} <= set(environ):
        numbers = (_number(environ, f"OMPI_COMM_WORLD_LOCAL_{name}") for name in ("RANK", "SIZE"))
        own = _own_devices(environ, *numbers)
    return _checked("Open MPI", environ, address or "", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", own)


def _checked(
    how: str, environ: Mapping[str, str], address: str, processes: str, process: str, own: tuple[int, ...] | None = None
) -> Plan:
    count, index = _number(environ, processes), _number(environ, process)
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"{process}={index} must be at least 0 and below {processes}={count}")
    if count > 1 and not re.fullmatch(r"(\[[^\]]+\]|[^:\s]+):\d{1,5}", address):
        raise ValueError(f'the coordinator\'s address must be "host:port", as in 10.0.0.1:1234; {_ADDRESS} is {address!r}')
    return Plan(how, address or None, count, index, own)


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except (KeyError, ValueError):
        raise ValueError(f"{name} must be a whole number; it is {environ.get(name)!r}") from None


def _port(environ: Mapping[str, str], job: int) -> int:
    """One of the 4096 highest ports by a job's number, so that jobs on one machine seldom meet."""
    return _number(environ, _PORT) if environ.get(_PORT) else 61440 + job % 4096


def _tasks_here(per_node: str, node: int) -> int | None:
    """Tasks on a node by Slurm's list, as in "2(x3),1"; None if it does not say."""
    counts: list[int] = []
    for part in re.finditer(r"(\d+)(?:\(x(\d+)\))?", per_node):
        counts += [int(part[1])] * int(part[2] or 1)
    return counts[node] if 0 <= node < len(counts) else None


def _own_devices(environ: Mapping[str, str], local: int, here: int | None) -> tuple[int, ...] | None:
    """The GPUs of one of the `here` processes of a machine: an equal share of what is visible; one, where that is not known."""
    if environ.get(_DEVICES) or here == 1:
        return None
    listed = environ.get("CUDA_VISIBLE_DEVICES") or environ.get("ROCR_VISIBLE_DEVICES")
    if not listed or here is None:
        return (local,)
    visible = len(listed.split(","))
    if visible == 1:
        return None
    if visible % here:
        raise ValueError(
            f"{here} processes on this machine cannot share its {visible} visible GPUs ({listed}) evenly; start as many as divide"
            f" them, or set {_DEVICES} for each"
        )
    each = visible // here
    return tuple(range(local * each, (local + 1) * each))
