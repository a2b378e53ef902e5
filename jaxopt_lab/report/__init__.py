"""Floor 4: what a stage of a compression costs and keeps, measured and shown side by side: a table and a picture."""

from jaxopt_lab.report.measure import Stage, accuracy_interval, directory_bytes, in_turns, latency, measure
from jaxopt_lab.report.picture import picture
from jaxopt_lab.report.table import from_json, markdown, table, to_json

__all__ = [
    "Stage",
    "accuracy_interval",
    "directory_bytes",
    "from_json",
    "in_turns",
    "latency",
    "markdown",
    "measure",
    "picture",
    "table",
    "to_json",
]
