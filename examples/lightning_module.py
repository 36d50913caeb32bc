"""The counterfactual step in a LightningModule: python examples/lightning_module.py (pip install lightning)"""

import copy

import lightning
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import maskcf_fast as mf


class Counterfactual(lightning.LightningModule):
    """Fine-tunes a classifier against a frozen copy of its backbone."""

    def __init__(self, student: mf.ImageClassifier, strategy: str = "object-single", weight: float = 1.0) -> None:
        super().__init__()
        self.method = mf.CounterfactualDistiller(student, copy.deepcopy(student.backbone), strategy, weight)

    def training_step(self, batch, index):
        step = self.method(*batch)
        self.log_dict({"loss": step.loss, "task": step.task, "distill": step.distill})
        return step.loss

    def validation_step(self, batch, index):
        images, labels = batch
        self.log("validation", F.cross_entropy(self.method.student(images), labels))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.method.student.parameters(), lr=1e-3)


def main() -> None:
    torch.manual_seed(0)
    backbone = mf.VisionTransformer(
        mf.VisionTransformerConfig(image_size=32, patch_size=8, width=64, depth=3, heads=4, output_dim=32)
    )
    module = Counterfactual(mf.ImageClassifier(backbone, mf.CosineClassifier(32, num_classes=3)))
    data = TensorDataset(torch.rand(24, 3, 32, 32), torch.arange(24) % 3)  # pixels in [0, 1]
    batches = DataLoader(data, batch_size=12)
    trainer = lightning.Trainer(
        max_epochs=8,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    for when in ("before", "after"):
        (result,) = trainer.validate(module, batches, verbose=False)
        print(f"{when}: loss {result['validation']:.4f}")
        if when == "before":
            trainer.fit(module, batches)


if __name__ == "__main__":
    main()
