"""A sweep on a Ray cluster of two nodes on this machine, of which a worker and a node are killed: one JSON line a phase.

    JAXOPT_LAB_EXTRAS=ray ./scripts/run scripts/ray_cluster_demo.py [--trials 96] [--together 4] [--steps 300]

An MLP on scikit-learn's digits. After a quarter of the trials the process of one actor gets SIGKILL; after half of them one of the
two nodes, with all that runs on it, does; after three quarters another node joins. In the end each trial must be complete, told
exactly once by the storage's own journal, and of the value that one population in this process comes to. All servers listen to
127.0.0.1 alone, and end with the demonstration. About a minute and a half on two cores.
"""

import argparse
import collections
import json
import logging
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Before Ray and JAX are imported: Ray on the loopback interface, reporting to nobody; workers come after, and inherit it.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna

from jaxopt_lab import data, nets, search, train
from jaxopt_lab.search.cluster.engine import ray

SPACE = {"rate": search.log_uniform(1e-4, 0.1), "decay": search.log_uniform(1e-6, 0.1)}
STORE = 100_000_000


def problem() -> tuple[search.Trial, Any]:
    """A trial on the digits, and its batches."""
    digits, model = data.digits(), nets.from_linen(nets.MLP(features=(32,)))

    def chain(config):
        return optax.adamw(config["rate"], weight_decay=config["decay"])

    def cross_entropy(logits, batch):
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    def init(key, config):
        return train.init(model, chain(config), key, digits.train["x"][:1])

    def step(state, batch, config):
        return train.make_step(model, cross_entropy, chain(config))(state, batch)

    def evaluate(state):
        return jnp.mean(cross_entropy(model.predict(train.variables(state), digits.test["x"]), digits.test))

    return search.Trial(init, step, evaluate), data.batches(digits.train, 64, seed=0)


def common() -> dict[str, Any]:
    """What all nodes have in common."""
    return {"node_ip_address": "127.0.0.1", "object_store_memory": STORE}


def times_told(storage: Path) -> list[int]:
    """How often each trial was told complete, by the journal."""
    lines = [json.loads(line) for line in storage.read_text().splitlines()]
    told = collections.Counter(line["trial_id"] for line in lines if line.get("values") is not None and "state" in line)
    return [told[trial] for trial in sorted(told)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=96)
    parser.add_argument("--together", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    from ray.cluster_utils import Cluster

    optuna.logging.set_verbosity(logging.ERROR)
    begin, lines = time.perf_counter(), sys.stdout
    # Ray has much to say of what dies, and says it on the standard output.
    sys.stdout = sys.stderr

    def tell(phase: str, **more: Any) -> None:
        line = {"phase": phase, "seconds": round(time.perf_counter() - begin, 1), **more}
        print(json.dumps(line), file=lines, flush=True)

    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory:
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=1, include_dashboard=False, temp_dir=directory, **common())
            second = cluster.add_node(num_cpus=1, **common())
            tell("two nodes are up", address=cluster.address, nodes=[cluster.head_node.node_id[:8], second.node_id[:8]])
            done = swept(cluster, second, Path(directory) / "sweep.log", options, tell)
        finally:
            import ray as cluster_of

            cluster_of.shutdown()
            cluster.shutdown()
    tell("ended", good=done)
    return int(not done)


def swept(cluster: Any, second: Any, storage: Path, options: argparse.Namespace, tell: Any) -> bool:
    """Runs the sweep through all that happens to it, and checks what came of it."""
    trial, batches = problem()
    study = search.open_study(SPACE, "digits", storage=storage, sampler=optuna.samplers.RandomSampler(seed=0))
    run = {"key": jax.random.key(0), "batches": batches, "steps": options.steps}
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    with ray(engine=search.vmapped(), address=cluster.address, init=quiet) as engine, ThreadPoolExecutor(1) as aside:
        # Nodes are added from the main thread, so the sweep goes on in another.
        many = {"trials": options.trials, "together": options.together}
        sweeping = aside.submit(search.sweep, study, SPACE, trial, engine=engine, **many, **run)
        trouble(cluster, second, engine, lambda part: reached(study, part * options.trials, engine, sweeping), tell)
        sweeping.result()
        tell("the sweep is over", trials=collections.Counter(t.state.name for t in study.trials), deaths=engine.deaths)
    told = times_told(storage)
    configs = [search.suggest(optuna.trial.FixedTrial(each.params), SPACE) for each in study.trials]
    # By programs of the same width, which round alike.
    here = search.population(trial, configs, engine=search.vmapped(options.together), keep=0, **run).scores
    apart = float(np.max(np.abs(here - [each.value for each in study.trials])))
    tell("compared with one machine", largest_difference=apart, times_told=sorted(set(told)), best=study.best_value)
    return told == [1] * options.trials and apart < 1e-5


def reached(study: optuna.Study, count: float, engine: Any, sweeping: Any) -> None:
    """Waits until so many trials are finished while others are trained."""
    while sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)) < count or not engine.workers:
        if sweeping.done():
            sweeping.result()
            raise RuntimeError("the sweep was over before it could be disturbed: give it more trials or steps")
        time.sleep(0.02)


def trouble(cluster: Any, second: Any, engine: Any, wait: Any, tell: Any) -> None:
    """Kills and adds while the sweep goes on."""
    wait(0.25)
    node, process = engine.workers[0]
    os.kill(process, signal.SIGKILL)
    tell("a worker was killed", process=process, node=node[:8])
    wait(0.5)
    cluster.remove_node(second, allow_graceful=False)
    tell("a node was killed", node=second.node_id[:8])
    wait(0.75)
    joined = cluster.add_node(num_cpus=1, **common())
    tell("a node joined", node=joined.node_id[:8])


if __name__ == "__main__":
    sys.exit(main())
