"""``maskcf info``: what is installed and which implementation of each op runs here, or what a model takes to train."""

from __future__ import annotations

import argparse
import sys

from . import __version__
from .core.command import command
from .core.errors import UserError
from .ops.info import describe

GPU = 80e9  # bytes of one
USABLE = 0.9  # of them: the rest is CUDA's own, and what fragments leave
GPUS = 8
MOST_BATCH = 1_000_000


@command()
def main(arguments: list[str]) -> None:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="maskcf info",
        description="Say what is installed, and which implementation of each op runs here. With --model, say what one "
        "step of training takes: parameters, FLOPs, and memory by what it holds. Nothing is downloaded but a model's "
        "settings, and nothing of its size is made.",
    )
    parser.add_argument("--model", help="a preset such as ViT-L/14, or LIBRARY:MODEL as for --model.name of training")
    parser.add_argument("--batch", type=int, default=64, help="images per step and GPU (64)")
    parser.add_argument("--image-size", type=int, help="side of the images in pixels; by default the model's own")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="(bf16)")
    parser.add_argument("--strategy", default="object-single", help="(object-single)")
    parser.add_argument(
        "--recompute", nargs="?", const=True, default=False, choices=("gelu",),
        help="keep each block's input only, or (gelu) all but the results of GELU",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    print(describe(__version__) if given.model is None else describe_training(given))


def describe_training(given: argparse.Namespace) -> str:
    """What a step of training a model takes, as lines of text."""
    from .models.sources import load_architecture
    from .training.cost import step_cost

    if not 2 <= given.batch <= MOST_BATCH:
        raise UserError(
            f"--batch must be at least 2, to refill one from another, and {MOST_BATCH:,} at most, got {given.batch}"
        )
    config = load_architecture(given.model, given.image_size)
    cost = step_cost(config, given.batch, precision=given.precision, strategy=given.strategy, recompute=given.recompute)
    lines = [
        f"{given.model}: {config.image_size} px, {config.num_patches} patches, {given.strategy}, {given.precision}, "
        f"{given.batch} images per GPU{', recomputed' if given.recompute else ''}",
        f"{'parameters':<26}{cost.parameters / 1e6:>12,.1f} M",
        f"{'FLOPs per step':<26}{cost.flops / 1e12:>12,.2f} T",
        *(f"{name:<26}{size / 1e9:>12,.2f} GB" for name, size in cost.memory.items()),
        f"{'together':<26}{cost.total / 1e9:>12,.2f} GB  {_fits(cost.total)} on one GPU of {GPU / 1e9:.0f} GB",
        f"{f'each of {GPUS}, divided':<26}{cost.divided(GPUS) / 1e9:>12,.2f} GB  "
        f"{_fits(cost.divided(GPUS))} on {GPUS} (--parallel fsdp)",
        "memory: what PyTorch's allocator hands out at the highest point (torch.cuda.max_memory_allocated); nvidia-smi",
        f"shows more, by CUDA's own and what fragments leave, for which {1 - USABLE:.0%} of a GPU is kept free here",
    ]
    return "\n".join(lines)


def _fits(size: int) -> str:
    return "fits" if size <= USABLE * GPU else "does not fit"


if __name__ == "__main__":
    sys.exit(main())
