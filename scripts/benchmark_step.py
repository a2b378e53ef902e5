"""What each keyword of `train.make_step` costs: time and memory of a step against the plain one.

    ./scripts/run scripts/benchmark_step.py [--nets lenet mixer] [--cases guard microbatches_4 ...] [--steps 20] [--repeats 15]

Two networks, on images drawn at random, since only their shape costs time: LeNet on 28 x 28 x 1 at batch 64, where `guard=True` is
to cost at most 1.02, and an MLP-Mixer of width 64 and depth 4 on 32 x 32 x 3 at batch 64, whose activations take more room than its
weights. AdamW, and that inside of `loss_scaled` for float16. Steps are compiled once and donate their state. Short runs of the
plain step and of the other alternate, and a ratio is the median of the pairs' ratios. Bytes are what XLA plans for temporary
buffers. One JSON line a case.
"""

import argparse
import json
import os
import platform
import statistics
import time

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab import nets, train

NETS = {
    "lenet": ("lenet_28x28_batch_64", nets.LeNet(), (64, 28, 28, 1)),
    "mixer": ("mixer_32x32_batch_64", nets.Mixer(patch=4, width=64, depth=4, patch_width=32, mlp_width=256), (64, 32, 32, 3)),
}

CASES = {
    "guard": {"guard": True},
    "microbatches_4": {"microbatches": 4},
    "bfloat16": {"precision": jnp.bfloat16},
    "float16": {"precision": jnp.float16},
    "remat": {"remat": True},
    "remat_dots": {"remat": jax.checkpoint_policies.dots_saveable},
    "all": {"guard": True, "microbatches": 4, "precision": jnp.bfloat16, "remat": True},
}


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def random_batch(shape: tuple[int, ...]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    images = rng.standard_normal(shape, dtype=np.float32)
    return {"x": jnp.asarray(images), "y": jnp.asarray(rng.integers(0, 10, shape[0], dtype=np.int32))}


class Compiled:
    """A step as the machine runs it, with a state of its own."""

    def __init__(self, model, batch, keywords):
        tx = optax.adamw(1e-3)
        if keywords.get("precision") == jnp.float16:
            tx = train.loss_scaled(tx)
        step = train.make_step(model, cross_entropy, tx, **keywords)
        self.batch, self.state = batch, train.init(model, tx, jax.random.key(0), batch["x"][:1])
        begin = time.perf_counter()
        self.step = jax.jit(step, donate_argnums=0).lower(self.state, batch).compile()
        self.compile_s = time.perf_counter() - begin
        self.temporary = self.step.memory_analysis().temp_size_in_bytes

    def seconds(self, steps: int) -> float:
        """Of one step, in a run of several."""
        begin = time.perf_counter()
        for _ in range(steps):
            self.state, _ = self.step(self.state, self.batch)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - begin) / steps


def case(title: str, name: str, plain: Compiled, other: Compiled, steps: int, repeats: int) -> dict:
    for step in (plain, other):
        step.seconds(steps)
    pairs = []
    for k in range(repeats):
        # In turns, also as to which goes first: a machine that grows slower or faster favours neither.
        times = {step: step.seconds(steps) for step in ((plain, other) if k % 2 else (other, plain))}
        pairs.append((times[plain], times[other]))
    ratios = [theirs / ours for ours, theirs in pairs]
    return {
        "name": f"{title}_{name}",
        "steps": steps,
        "repeats": repeats,
        "plain_ms": round(1e3 * statistics.median(pair[0] for pair in pairs), 3),
        "step_ms": round(1e3 * statistics.median(pair[1] for pair in pairs), 3),
        "time_over_plain": round(statistics.median(ratios), 4),
        "spread": [round(f(ratios), 3) for f in (min, max)],
        "plain_temporary_bytes": plain.temporary,
        "temporary_bytes": other.temporary,
        "temporary_over_plain": round(other.temporary / plain.temporary, 3),
        "compile_s": round(other.compile_s, 2),
        "platform": jax.devices()[0].platform,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", choices=NETS, nargs="+", default=list(NETS), help="of which (default: all)")
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES), help="which keywords (default: all)")
    parser.add_argument("--steps", type=int, default=20, help="steps a run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="pairs of runs a case (default: %(default)s)")
    options = parser.parse_args()
    for name in ("repeats", "steps"):
        if (count := getattr(options, name)) < 1:
            parser.error(f"--{name} {count}: at least 1")
    for net in options.nets:
        title, module, shape = NETS[net]
        model, batch = nets.from_linen(module), random_batch(shape)
        plain = Compiled(model, batch, {})
        for name in options.cases:
            other = Compiled(model, batch, CASES[name])
            print(json.dumps(case(title, name, plain, other, options.steps, options.repeats)), flush=True)


if __name__ == "__main__":
    main()
