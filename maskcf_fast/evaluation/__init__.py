"""Accuracy in and out of distribution: the published test sets, what is measured on them, and reports."""

from .benchmark import Benchmark, Reader
from .layouts import LAYOUTS, Spec, read_benchmark
from .measure import Measurement, measure
from .metrics import Baseline, wilson
from .report import Report, Row
from .runs import Run, read_run

__all__ = [
    "LAYOUTS",
    "Baseline",
    "Benchmark",
    "Measurement",
    "Reader",
    "Report",
    "Row",
    "Run",
    "Spec",
    "measure",
    "read_benchmark",
    "read_run",
    "wilson",
]
