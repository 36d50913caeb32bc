"""What a run's newest checkpoint holds, to look at and to spoil."""

from pathlib import Path

from maskcf_fast.training.checkpoint import ALONE, load_checkpoint, save_checkpoint


def values(run: Path) -> dict:
    """The plain values."""
    return load_checkpoint(run).values


def tensors(run: Path, prefix: str = "") -> dict:
    """The tensors whose names begin so, without the prefix."""
    checkpoint = load_checkpoint(run)
    return {name.removeprefix(prefix): checkpoint.read(name) for name in checkpoint.index if name.startswith(prefix)}


def rewrite(run: Path, change_values=lambda v: v, change_tensors=lambda t: t) -> None:
    """Write the newest checkpoint again with other contents, whose digests are right."""
    held = values(run), tensors(run)
    save_checkpoint(run, held[0]["step"], change_values(held[0]), change_tensors(held[1]), ALONE, keep=9)
