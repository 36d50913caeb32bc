"""Options of ``pytest benchmarks/ --benchmark-only``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("maskcf_fast", "benchmarks of the ops")
    group.addoption("--device", default="auto", help="auto, cpu or cuda")
    group.addoption("--model", default="ViT-B/16", help="whose sizes to take, such as ViT-L/14")
    group.addoption("--batch", default=16, type=int, help="images per batch")
