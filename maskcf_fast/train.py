"""``maskcf train``: fine-tune a model on images on disk, or run the embedded demo."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .core.command import command
from .core.errors import UserError
from .core.optional import need

if TYPE_CHECKING:
    from .training.settings import TrainConfig


@command("interrupted: --resume DIR continues from the last checkpoint")
def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    if not arguments:
        from .demo import main as demo

        print(
            "No data given: running the embedded demo. To fine-tune on your own images:\n"
            "  python -m maskcf_fast.train --data.train DIR --data.id DIR --data.ood DIR… "
            "--model.weights FILE.safetensors\n"
            "  (--help lists all settings)\n"
        )
        return demo([])
    need("PIL", "tqdm", "tyro", "yaml")
    from .training.settings import parse

    return train(parse(arguments))


def train(config: TrainConfig) -> int:
    """One run."""
    from .core.processes import Processes
    from .training.trainer import Trainer

    if config.data.train is None:
        raise UserError("--data.train DIR is missing (with no arguments at all, the embedded demo runs)")
    processes = Processes.start(config.device)
    with processes.reporting():
        trainer = Trainer(config, processes)
        accuracy = trainer.run()
    if processes.main:
        for name, value in accuracy.items():
            print(f"{name}: {value:.2f} %")
        print(f"model, metrics and checkpoints: {trainer.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
