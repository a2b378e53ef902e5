"""How long `import jaxopt_lab` takes beside what it stands on: one JSON line a case.

    ./scripts/run scripts/benchmark_import.py --processes 15

Every case is a fresh process; the cases take turns, so that a busy moment strikes all alike. Each reports the median of its own
times and the median of its ratios to the first case of the same turn (aims: 1.10 for the package, 1.15 with `prune.sparsify`). The
times are those of the imports alone, taken inside the process.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

BASE = "import jax, flax.linen, optax"
CASES = {
    "base": BASE,
    "package": f"{BASE}; import jaxopt_lab",
    "sparsify": f"{BASE}; import jaxopt_lab; jaxopt_lab.prune.sparsify",
}


def seconds(statement: str) -> float:
    """Seconds that a statement takes in a fresh process."""
    program = f"import time; begin = time.perf_counter(); {statement}; print(time.perf_counter() - begin)"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=15, help="fresh processes a case (default: %(default)s)")
    processes = parser.parse_args().processes
    if processes < 1:
        parser.error(f"--processes {processes}: a median needs at least 1")
    for statement in CASES.values():
        seconds(statement)  # byte code is compiled, and files are in memory
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(processes):
        for name, statement in CASES.items():
            times[name].append(seconds(statement))
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("jax", "flax", "optax")}}
    for name, found in times.items():
        ratio = statistics.median(own / base for own, base in zip(found, times["base"], strict=True))
        row = {"case": name, "seconds": round(statistics.median(found), 4), "ratio": round(ratio, 3), "least": round(min(found), 4)}
        print(json.dumps({**row, "processes": processes, **versions}))


if __name__ == "__main__":
    main()
