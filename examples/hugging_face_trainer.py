"""The counterfactual step in a Hugging Face Trainer: python examples/hugging_face_trainer.py"""

import copy
import tempfile

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

import maskcf_fast as mf


class CounterfactualTrainer(Trainer):
    """A trainer whose model is a method of this package: a student with its frozen teacher."""

    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.AdamW(self.model.student.parameters(), lr=self.args.learning_rate)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.model.training:
            step = model(inputs["pixel_values"], inputs["labels"])
            return (step.loss, {"logits": step.logits}) if return_outputs else step.loss
        logits = self.model.student(inputs["pixel_values"])  # evaluation needs no counterfactual images
        loss = F.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def main() -> None:
    torch.manual_seed(0)
    backbone = mf.VisionTransformer(
        mf.VisionTransformerConfig(image_size=32, patch_size=8, width=64, depth=3, heads=4, output_dim=32)
    )
    student = mf.ImageClassifier(backbone, mf.CosineClassifier(32, num_classes=3))
    method = mf.CounterfactualDistiller(student, copy.deepcopy(backbone), "object-single", weight=1.0)

    # Pixels in [0, 1], as ToTensor gives them: the model normalises by itself.
    data = [{"pixel_values": torch.rand(3, 32, 32), "labels": i % 3} for i in range(24)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=8,
            per_device_train_batch_size=12,
            learning_rate=1e-3,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = CounterfactualTrainer(model=method, args=arguments, train_dataset=data, eval_dataset=data)
        for epochs in ("before", "after"):
            print(f"{epochs}: loss {trainer.evaluate()['eval_loss']:.4f}")
            if epochs == "before":
                trainer.train()


if __name__ == "__main__":
    main()
