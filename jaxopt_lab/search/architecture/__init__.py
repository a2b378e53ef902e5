"""Search over networks: any space, any builder of models, several objectives, and depth and width by themselves.

front         what no other candidate beats
candidates    what became of a configuration, and the history of a search
strategies    what comes next: at random, over a grid, by ageing evolution; a pure function of the history and a key
objectives    what is measured: multiplications, bytes, milliseconds, any function; cheap ones first, with bounds that reject
training      the score after training, all candidates of a round as one population
record        an Optuna study as the record, from which a killed search goes on
search        `architectures`, which ties these together
sizes         depth by cross-validation, width by a grid or at random

What varies comes in as an object, and a new one edits nothing here. A zero-cost score is an `Objective` of cost `CALLS`, which
draws weights by `net.model.init` and looks at gradients. A supernet is an objective as well: its `measure` gets all networks of a
round, and evaluates each on its part of the shared weights. A differentiable search descends on the choices of one network, as
`hypergradient` does, and is a strategy when it proposes what it ends on.
"""

from jaxopt_lab.search.architecture.candidates import Candidate, History
from jaxopt_lab.search.architecture.front import front
from jaxopt_lab.search.architecture.objectives import (
    CALLS,
    SHAPES,
    TRAINING,
    Net,
    Objective,
    activation_bytes,
    macs,
    milliseconds,
    parameter_bytes,
    scored,
)
from jaxopt_lab.search.architecture.search import Architectures, architectures
from jaxopt_lab.search.architecture.sizes import Depths, Widths, depth_by_cross_validation, width_by_grid, width_by_random
from jaxopt_lab.search.architecture.strategies import Strategy, grid_search, mutated, random_search, regularized_evolution
from jaxopt_lab.search.architecture.training import trained

__all__ = [
    "CALLS",
    "SHAPES",
    "TRAINING",
    "Architectures",
    "Candidate",
    "Depths",
    "History",
    "Net",
    "Objective",
    "Strategy",
    "Widths",
    "activation_bytes",
    "architectures",
    "depth_by_cross_validation",
    "front",
    "grid_search",
    "macs",
    "milliseconds",
    "mutated",
    "parameter_bytes",
    "random_search",
    "regularized_evolution",
    "scored",
    "trained",
    "width_by_grid",
    "width_by_random",
]
