"""Accuracy in and out of distribution: the published test sets, what is measured on them, and reports."""

from ..core.optional import need

need("PIL", "tqdm", "yaml")

from .benchmark import Benchmark, Reader
from .layouts import LAYOUTS, Spec, read_benchmark
from .measure import Measurement, measure
from .metrics import Baseline, wilson
from .report import Report, Row
from .results import Results
from .suite import Suite, choose_specs

__all__ = [
    "LAYOUTS",
    "Baseline",
    "Benchmark",
    "Measurement",
    "Reader",
    "Report",
    "Results",
    "Row",
    "Spec",
    "Suite",
    "choose_specs",
    "measure",
    "read_benchmark",
    "wilson",
]
