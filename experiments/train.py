"""One training, the same on a laptop, on all devices of a machine and on many machines; killed anywhere, it goes on.

    python experiments/train.py                                                     digits, some seconds
    python experiments/train.py --resume                                            goes on where it was
    python experiments/train.py --dataset mnist --data-dir DIRECTORY --network resnet
    python -m jaxopt_lab.supervise --processes 8 --devices-each 1 -- python experiments/train.py --resume
    srun --kill-on-bad-exit=1 python experiments/train.py --resume                  under Slurm

Every process runs this very file. The rows of a batch are dealt over all devices, and so are the parameters and moments with
`--fsdp`. A run directory holds its settings, records and checkpoints; SIGTERM and SIGINT save at the next step and end it with code
75. A step that is not finite is passed over; ten in a row, and the run goes back to its last checkpoint at half the rate.

Measured on digits, seeds 0 to 2, in 4 s each on two cores: 97.2, 96.7 and 97.2 % of 360 held-out images.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxopt_lab import cli


@dataclass(frozen=True)
class Config:
    """Trains a classifier on any number of devices and processes, in a directory from which it can be resumed."""

    dataset: Literal["digits", "mnist1d", "mnist"] = "digits"
    """The data set; mnist is read from files."""
    data_dir: Path | None = None
    """Where the four files of MNIST lie; JAXOPT_LAB_DATA if not given."""
    network: Literal["mlp", "lenet", "resnet"] = "mlp"
    """lenet and resnet take images: digits or mnist."""
    out: Path = Path("runs/train")
    """The run's directory; one that all processes share."""
    resume: bool = False
    """Goes on with the run in the directory, if there is one."""
    epochs: int = 20
    batch_size: int = 64
    """Of all devices together."""
    learning_rate: float = 2e-3
    """The peak of a cosine schedule of AdamW."""
    fsdp: bool = False
    """Deals parameters and moments out over the devices."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What is computed in; the parameters stay in float32."""
    microbatches: int = 1
    """In how many parts a batch is worked through, for want of memory."""
    save_every: int = 100
    """Steps between checkpoints."""
    seed: int = 0


def study(config: Config) -> None:
    """Trains, and evaluates at the end of each epoch."""
    from jaxopt_lab import parallel

    # Before anything touches a device.
    hosts = parallel.initialize()

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxopt_lab import data, losses, nets, train

    found = data.load(config.dataset, cli.data_directory(config.data_dir))
    batches = data.batches(found.train, config.batch_size, seed=config.seed)
    steps = config.epochs * batches.steps_per_epoch
    network = {"mlp": nets.MLP(features=(128, 64)), "lenet": nets.LeNet(), "resnet": nets.ResNet(depth=8)}[config.network]
    model = nets.from_linen(network)
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, max(steps // 20, 1), steps)
    step = train.make_step(
        model,
        losses.per_example(losses.cross_entropy),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate), train.rate_scale()),
        precision=None if config.precision == "float32" else jnp.bfloat16,
        microbatches=config.microbatches,
        guard=True,
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    together = parallel.shard(step, mesh, parallel.fsdp("data") if config.fsdp else parallel.replicated)
    result = train.fit(
        together,
        train.init(model, step.tx, jax.random.key(config.seed), found.train["x"][:1]),
        parallel.local(batches),
        steps=steps,
        evaluate=lambda state: train.evaluate(model, state, found.test),
        evaluate_every=batches.steps_per_epoch,
        run=train.Run(config.out, save_every=config.save_every, config=config, resume=config.resume),
        rewind=train.Rewind(factor=0.5),
    )
    if hosts.process == 0:
        accuracy = [record["accuracy"] for record in result.history if "accuracy" in record][-1]
        print(f"step {int(result.state.step):,}: accuracy {100 * accuracy:.2f} %; the run is in {config.out}")


if __name__ == "__main__":
    sys.exit(cli.main(study, Config))
