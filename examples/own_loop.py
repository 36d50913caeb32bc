"""The counterfactual step in a training loop of your own: python examples/own_loop.py"""

import copy

import torch

import maskcf_fast as mf

torch.manual_seed(0)

# A tiny model with random weights. With real ones: backbone = mf.VisionTransformer("ViT-B/32"), and
# mf.load_backbone(backbone, "weights.safetensors") for weights of open_clip, Hugging Face or timm.
backbone = mf.VisionTransformer(
    mf.VisionTransformerConfig(image_size=32, patch_size=8, width=64, depth=3, heads=4, output_dim=32)
)
student = mf.ImageClassifier(backbone, mf.CosineClassifier(32, num_classes=3))
method = mf.CounterfactualDistiller(student, copy.deepcopy(backbone), "object-single", weight=1.0)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

images = torch.randint(0, 256, (24, 32, 32, 3), dtype=torch.uint8)  # or float [N, 3, H, W] in [0, 1]
labels = torch.arange(24) % 3

for epoch in range(8):
    for batch in torch.randperm(24).split(12):  # donors come from the batch: the larger, the more to choose from
        step = method(images[batch], labels[batch])
        optimizer.zero_grad()
        step.loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    print(
        f"epoch {epoch}: loss {step.loss.item():.4f}, cross-entropy {step.task.item():.4f}; "
        f"{step.mask.float().mean().item():.0%} of the patches refilled"
    )
