"""The ops alone, without models or training of this package: python examples/ops_alone.py"""

import torch
import torch.nn.functional as F

import maskcf_fast as mf

torch.manual_seed(0)

# 1. Relevance under fused attention: q, k, v and the gradient at the attention output, for every layer.
q, k, v = (torch.randn(4, 12, 197, 64, requires_grad=True) for _ in range(3))
out = F.scaled_dot_product_attention(q, k, v)
score = out[:, :, 0].sum()  # in a model: the label's logit
(grad,) = torch.autograd.grad(score, out)
cam = mf.relevance_cam([(q, k, v)], [grad])  # [4, 196]; no T×T map is formed

# 2. Which patches carry the object, and the same patches of other images in their place.
images = torch.randint(0, 256, (4, 3, 224, 224), dtype=torch.uint8)  # or floats
donors = mf.sample_donors(4)  # no image gives to itself
mask = mf.select_patches(cam, threshold=0.3)  # [4, 196] bool; region="context" takes the others
refilled = mf.refill_patches(images, mask, donors)  # [4, 3, 224, 224]; counterfactual_refill is the two in one

# 3. The same in token space, differentiable; or masked tokens left out.
tokens = torch.randn(4, 197, 768, requires_grad=True)
mixed = mf.gather_tokens(tokens, mask, donors)  # [4, 197, 768]
mixed.square().mean().backward()
top = mf.select_patches(cam, top_k=98)  # as many in every image, so that what is left is a dense batch
kept, _ = mf.drop_tokens(tokens, top)  # [4, 99, 768]

print(f"{mask.float().mean().item():.0%} of the patches masked; kept {tuple(kept.shape)}")
