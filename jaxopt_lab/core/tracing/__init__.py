"""Looking into a function: where its parameters meet products, what they meet there, and what that costs.

sites, walk      where each parameter meets a matrix product, a convolution or a lookup, by shapes alone
tapped           the same function, which also hands out what is met there
reducing         the same function, which carries statistics of it from call to call
collect          those statistics over a calibration set, in as many passes as the memory asks for
count            multiplications and parameters by path
"""

from jaxopt_lab.core.tracing.capture import Live, Reducer, Reducing, Tap, collect, reducing, tapped
from jaxopt_lab.core.tracing.chains import Affine, affine
from jaxopt_lab.core.tracing.counts import Count, Counts, count
from jaxopt_lab.core.tracing.substitution import Coefficients, coefficients
from jaxopt_lab.core.tracing.views import Axes, Step
from jaxopt_lab.core.tracing.walks import Scan, Site, Unknown, Walk, sites, walk

__all__ = [
    "Affine",
    "Axes",
    "Coefficients",
    "Count",
    "Counts",
    "Live",
    "Reducer",
    "Reducing",
    "Scan",
    "Site",
    "Step",
    "Tap",
    "Unknown",
    "Walk",
    "affine",
    "coefficients",
    "collect",
    "count",
    "reducing",
    "sites",
    "tapped",
    "walk",
]
