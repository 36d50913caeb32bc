"""``python -m maskcf_fast.evaluate``: accuracy of fine-tuned models on any number of test sets."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    import tyro

    from .core.errors import CONTINUES, report_errors
    from .experiments.evaluate_settings import EvaluateConfig

    def evaluate() -> int:
        from .core.processes import Processes
        from .experiments.evaluate import Evaluation

        config = tyro.cli(EvaluateConfig, args=arguments, prog="python -m maskcf_fast.evaluate")
        processes = Processes.start(config.device)
        try:
            Evaluation(config, processes).run()
        finally:
            processes.stop()
        return 0

    return report_errors(evaluate, CONTINUES)


if __name__ == "__main__":
    sys.exit(main())
