"""The counterfactual step in open_clip's own training loop: python examples/open_clip_loop.py"""

import copy
from types import SimpleNamespace

import torch
from open_clip_train.params import parse_args
from open_clip_train.train import train_one_epoch
from torch import nn

import maskcf_fast as mf


class Model(nn.Module):
    """What open_clip's loop calls: images and, in the place of texts, labels; returns what the loss below takes."""

    def __init__(self, method: mf.CounterfactualDistiller) -> None:
        super().__init__()
        self.method = method
        self.logit_scale = nn.Parameter(torch.zeros(()), requires_grad=False)  # the loop logs and clamps one

    def forward(self, images, labels):
        return {"step": self.method(images, labels), "logit_scale": self.logit_scale}


def loss(step, logit_scale, output_dict):
    return {"counterfactual": step.loss}


class Loader:
    """open_clip's loaders know how much they hold."""

    num_samples, num_batches, batch_size = 24, 2, 12

    def __init__(self) -> None:
        self.images, self.labels = torch.rand(24, 3, 32, 32), torch.arange(24) % 3  # pixels in [0, 1]

    def __iter__(self):
        return zip(self.images.split(12), self.labels.split(12), strict=True)


torch.manual_seed(0)
config = mf.VisionTransformerConfig(image_size=32, patch_size=8, width=64, depth=3, heads=4, output_dim=32)
backbone = mf.VisionTransformer(config)
student = mf.ImageClassifier(backbone, mf.CosineClassifier(32, num_classes=3))
method = mf.CounterfactualDistiller(student, copy.deepcopy(backbone), "object-single", weight=1.0)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
loader = Loader()
data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
arguments = parse_args(["--model", "ViT-B-32", "--precision", "fp32", "--batch-size", "12", "--skip-scheduler"])
vars(arguments).update(device="cpu", rank=0, local_rank=0, world_size=1, distributed=False, distill=False, wandb=False)
for epoch in range(8):
    train_one_epoch(Model(method), data, loss, epoch, optimizer, None, None, None, arguments)
    print(f"epoch {epoch}: loss {method(loader.images, loader.labels).loss.item():.4f}")
