"""Floor 4: what a stage of a compression costs and keeps, measured and shown side by side: a table and a picture. And the pictures
of a search: of a study of Optuna's, or of a population's `Result`.
"""

from jaxopt_lab.report.measure import Stage, accuracy_interval, directory_bytes, in_turns, latency, measure
from jaxopt_lab.report.picture import picture
from jaxopt_lab.report.search.contour import contour
from jaxopt_lab.report.search.curves import curves
from jaxopt_lab.report.search.front import front
from jaxopt_lab.report.search.history import history
from jaxopt_lab.report.search.importance import importances
from jaxopt_lab.report.search.parallel import parallel_coordinates
from jaxopt_lab.report.search.slices import slices
from jaxopt_lab.report.table import from_json, markdown, table, to_json

__all__ = [
    "Stage",
    "accuracy_interval",
    "contour",
    "curves",
    "directory_bytes",
    "from_json",
    "front",
    "history",
    "importances",
    "in_turns",
    "latency",
    "markdown",
    "measure",
    "parallel_coordinates",
    "picture",
    "slices",
    "table",
    "to_json",
]
