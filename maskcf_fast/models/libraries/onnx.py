"""Writing a classifier as an ONNX graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...core.files import explained
from ...core.optional import need
from ...ops.patchify import patchify
from ..head import ImageClassifier

OPSET = 20  # the first with GELU as one operator


class _Graph(nn.Module):
    """The classifier in operators that ONNX has: the reference patchify instead of the compiled one."""

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        backbone = self.model.backbone
        config = backbone.config
        rows = patchify(pixels, config.patch_size, mean=config.mean, std=config.std, impl="reference")
        return self.model.head(backbone.encode(backbone.embed_rows(rows))[0])


def write(model: ImageClassifier, classes: Sequence[str], folder: Path) -> tuple[str, bool]:
    """Write ``model.onnx``, with the head: pixels in, logits out.

    The input ``pixels`` is float32 ``[N, 3, S, S]`` in [0, 1], not normalised; ``logits`` is ``[N, classes]``. The
    names of the classes are in the metadata. The weights lie within the file up to ONNX's limit of 2 GB.

    Args:
        model: The classifier, on the CPU.
        classes: Names of its outputs.
        folder: An empty folder.

    Returns:
        How to load it, and that the head is inside.

    Raises:
        ImportError: onnx or onnxscript is not installed.
    """
    need("onnx", "onnxscript")
    side = model.backbone.config.image_size
    # Two images, since an export with one would take the batch for a constant.
    program = torch.onnx.export(
        _Graph(model).eval(),
        (torch.zeros(2, 3, side, side),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["pixels"],
        output_names=["logits"],
        dynamic_shapes={"pixels": {0: torch.export.Dim("images")}},
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props["classes"] = json.dumps(list(classes))
    path = folder / "model.onnx"
    with explained(path, sum(p.numel() * p.element_size() for p in model.parameters())):
        program.save(path)
    return 'onnxruntime.InferenceSession("{out}/model.onnx")', True
