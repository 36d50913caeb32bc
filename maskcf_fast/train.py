"""``python -m maskcf_fast.train``: fine-tune a model on images on disk, or run the embedded demo."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence

from .training.config import TrainConfig, parse

CONTINUES = "interrupted: the same command continues with what is missing"  # of commands that keep what is finished


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    survive_encoding()
    if not arguments:
        from .demo import main as demo

        print(
            "No data given: running the embedded demo. To fine-tune on your own images:\n"
            "  python -m maskcf_fast.train --data.train DIR --data.id DIR --data.ood DIR… "
            "--model.weights FILE.safetensors\n"
            "  (--help lists all settings)\n"
        )
        return demo([])
    return report_errors(
        lambda: train(parse(arguments)), "interrupted: --resume DIR continues from the last checkpoint"
    )


def train(config: TrainConfig) -> int:
    """One run."""
    from .training.distributed import Processes
    from .training.trainer import Trainer

    if config.data.train is None:
        raise ValueError("--data.train DIR is missing (with no arguments at all, the embedded demo runs)")
    processes = Processes.start(config.device)
    try:
        trainer = Trainer(config, processes)
        accuracy = trainer.run()
    finally:
        processes.stop()
    if processes.main:
        for name, value in accuracy.items():
            print(f"{name}: {value:.2f} %")
        print(f"model, metrics and checkpoints: {trainer.folder}")
    return 0


def report_errors(command: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run a command; an error that a user can mend becomes one message and exit code 1, without a traceback."""
    from .data import LoadingError
    from .training.trainer import TrainingDiverged

    survive_encoding()
    try:
        return command()
    except (ValueError, OSError, ImportError, LoadingError, TrainingDiverged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def survive_encoding() -> None:
    """Print a ? for what the terminal's encoding lacks, such as α, rather than stop."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
