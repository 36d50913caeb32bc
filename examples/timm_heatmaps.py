"""Heat maps of a timm model, unmodified and with its fused attention: python examples/timm_heatmaps.py [MODEL] [OUT]"""

import sys

import timm
import torch
import torch.nn.functional as F

import maskcf_fast as mf

name = sys.argv[1] if len(sys.argv) > 1 else "vit_tiny_patch16_224"
torch.manual_seed(0)
model = timm.create_model(name, pretrained=False).eval()  # pretrained=True loads the weights
size = timm.data.resolve_data_config({}, model=model)["input_size"]
images = torch.randn(2, *size)  # preprocessed as the model wants it: timm.data.create_transform

cam = mf.explain(model, images)  # [N, L]: for the predicted class; labels=… for another
side = int(cam.shape[1] ** 0.5)
heat = (cam / cam.amax(1, keepdim=True).clamp_min(1e-8)).view(-1, 1, side, side)
heat = F.interpolate(heat, images.shape[-2:], mode="bilinear")  # [N, 1, S, S] in [0, 1], to lay over the images
print(f"{name}: {tuple(heat.shape)}, from {heat.amin().item():.2f} to {heat.amax().item():.2f}")

if len(sys.argv) > 2:
    from matplotlib import pyplot

    pyplot.imsave(sys.argv[2], heat[0, 0].numpy(), cmap="inferno")
