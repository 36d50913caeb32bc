"""Bad arguments of the ops: the error names the argument, what was given and what is taken."""

from __future__ import annotations

import cases
import pytest
import torch

import maskcf_fast as mf

IMAGES = {"images": torch.rand(5, 3, 24, 24), "mask": torch.ones(5, 16, dtype=torch.bool), "donors": torch.arange(5)}
CAM = {"cam": torch.rand(5, 16), "threshold": 0.3, "top_k": None, "region": "object"}
TOKENS = {"tokens": torch.rand(4, 10, 5), "mask": torch.arange(9).expand(4, 9) < 6, "prefix": 1}
LAYER = dict(cases.relevance_case(3, 2, 10, 8)().items())
GOOD = {
    mf.select_patches: CAM | {"impl": "auto"},
    mf.refill_patches: IMAGES | {"grid": None, "impl": "auto"},
    mf.counterfactual_refill: {"images": IMAGES["images"], "donors": IMAGES["donors"], "grid": None} | CAM,
    mf.patchify: {"images": torch.zeros(5, 24, 24, 3, dtype=torch.uint8), "patch_size": 6, "mean": (0.5, 0.4, 0.3),
                  "std": (0.2, 0.2, 0.2), "dtype": torch.float32, "mask": IMAGES["mask"], "donors": IMAGES["donors"],
                  "impl": "auto"},
    mf.gather_tokens: TOKENS | {"donors": torch.arange(4), "impl": "auto"},
    mf.drop_tokens: TOKENS | {"dropped": 6},
    mf.pack_tokens: TOKENS,
    mf.attention_relevance: LAYER | {"impl": "auto"},
    mf.relevance_cam: {"taps": [[LAYER[name] for name in "qkv"]], "grads": [LAYER["grad_out"]], "start_layer": 0,
                       "scale": None, "prefix": 1, "readout": "class", "impl": "auto"},
    mf.bias_gelu: {"x": torch.rand(4, 10, 5), "bias": torch.rand(5), "activation": "gelu", "impl": "auto"},
    mf.residual_norm: {"x": torch.rand(4, 10, 5), "branch": torch.rand(4, 10, 5), "weight": torch.rand(5),
                       "bias": torch.rand(5), "eps": 1e-5, "impl": "auto"},
    mf.sample_donors: {"n": 4, "num_patches": 9, "generator": None},
}  # fmt: skip
OPTIONAL = {
    "threshold", "top_k", "grid", "mask", "donors", "dropped", "relevance", "scale", "num_patches", "generator",
    "branch",
}  # fmt: skip
OF_NO_KIND = [None, object(), [], "3", 1.5, True, torch.ones(1, 1, 1, 1, 1)]
# What of these each argument takes.
TAKEN = {"threshold": {1.5}, "scale": {1.5}, "eps": {1.5}}


@pytest.mark.parametrize("op", GOOD, ids=lambda op: op.__name__)
def test_an_argument_of_no_kind_that_the_op_takes_is_named(op):
    good = GOOD[op]
    op(**good)
    for name in good:
        for value in OF_NO_KIND:
            if (value is None and name in OPTIONAL) or (isinstance(value, float) and value in TAKEN.get(name, ())):
                continue
            with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
                op(**good | {name: value})


BYTES, BOOLS, FLOATS, INDICES = torch.uint8, torch.bool, torch.float32, torch.int64
BAD = [
    (mf.select_patches, {"threshold": None}, "exactly one of threshold and top_k.*threshold=None, top_k=None"),
    (mf.select_patches, {"top_k": 2}, "exactly one of threshold and top_k.*threshold=0.3, top_k=2"),
    (mf.select_patches, {"threshold": torch.ones(5)}, r"threshold must be a number, got a tensor of shape \[5\]"),
    (mf.select_patches, {"threshold": float("nan")}, "threshold must be a number, got NaN"),
    (mf.select_patches, {"threshold": None, "top_k": 17}, "top_k must lie between 0 and L=16, got 17"),
    (mf.select_patches, {"threshold": None, "top_k": -1}, "top_k must lie between 0 and L=16, got -1"),
    (mf.select_patches, {"threshold": None, "top_k": 2.0}, "top_k must be an int, got 2.0"),
    (mf.select_patches, {"region": "objects"}, "region must be 'object' or 'context', got 'objects'"),
    (mf.select_patches, {"impl": "refrence"}, "impl must be one of 'auto', .*; did you mean 'reference'"),
    (mf.select_patches, {"cam": torch.rand(9)}, r"cam must have shape \[N, L\], got \[9\]"),
    (mf.select_patches, {"cam": torch.rand(0, 9)}, "cam must not be empty"),
    (mf.select_patches, {"cam": torch.ones(2, 9, dtype=INDICES)}, "cam must have dtype float32, .*, got int64"),
    (mf.select_patches, {"cam": [[1.0]]}, "cam must be a torch.Tensor, got list"),
    (mf.refill_patches, {"donors": torch.tensor([0, 1, 2, 3, 5])}, "donors must index the batch, 0 to 4, got 5"),
    (mf.refill_patches, {"donors": torch.tensor([0, 1, 2, 3, -1])}, "donors must index the batch, 0 to 4, got -1"),
    (mf.refill_patches, {"donors": torch.arange(5).int()}, "donors must have dtype int64, got int32"),
    (mf.refill_patches, {"donors": torch.arange(3)}, r"donors must have shape \[5\], got \[3\]"),
    (mf.refill_patches, {"donors": torch.zeros(5, 9, dtype=INDICES)}, r"shape \[5, 16\], got \[5, 9\]"),
    (mf.refill_patches, {"mask": torch.ones(5, 16)}, "mask must have dtype bool, got float32"),
    (mf.refill_patches, {"mask": torch.ones(5, 15, dtype=BOOLS)}, "L=15 patches are no square grid: pass grid="),
    (mf.refill_patches, {"mask": torch.ones(5, 25, dtype=BOOLS)}, "24×24 pixels do not divide into a grid of 5×5"),
    (mf.refill_patches, {"grid": (3, 4)}, r"grid=\(3, 4\) does not hold L=16 patches"),
    (mf.refill_patches, {"grid": (2.0, 8)}, r"grid\[0\] must be an int, got 2.0"),
    (mf.refill_patches, {"grid": (4, 4, 1)}, r"grid must be \(rows, columns\), got \(4, 4, 1\)"),
    (mf.refill_patches, {"images": torch.rand(3, 24, 24)}, r"images must have shape \[N, C, H, W\], got \[3, 24, 24\]"),
    (mf.refill_patches, {"images": torch.rand(0, 3, 24, 24)}, "images must not be empty"),
    (mf.refill_patches, {"images": torch.ones(5, 3, 24, 24, dtype=INDICES)}, "images must have dtype .*, got int64"),
    (mf.counterfactual_refill, {"cam": torch.rand(4, 16)}, r"cam must have shape \[5, L\], got \[4, 16\]"),
    (mf.patchify, {"patch_size": 5}, "24×24 pixels do not divide by patch_size=5"),
    (mf.patchify, {"patch_size": 0}, "patch_size must be at least 1, got 0"),
    (mf.patchify, {"std": (1.0, 0.0, 1.0)}, r"std must hold 3 positive values, got \(1.0, 0.0, 1.0\)"),
    (mf.patchify, {"mean": (0.5, "x", 0.5)}, r"mean\[1\] must be a number, got 'x'"),
    (mf.patchify, {"mean": 0.5}, "mean must be a sequence, got 0.5"),
    (mf.patchify, {"donors": None}, "mask and donors must be given together"),
    (mf.drop_tokens, {"dropped": 5}, r"dropped=5, but the mask leaves out \[6, 6, 6, 6\] patches"),
    (mf.drop_tokens, {"dropped": 10}, "dropped must lie between 0 and L=9, got 10"),
    *((op, change, message) for op in (mf.gather_tokens, mf.drop_tokens, mf.pack_tokens) for change, message in (
        ({"tokens": torch.ones(4, 10, 5, dtype=INDICES)}, "tokens must have dtype float32, .*, got int64"),
        ({"mask": torch.ones(4, 8, dtype=BOOLS)}, r"mask must have shape \[4, 9\], got \[4, 8\]"),
        ({"prefix": 5}, r"mask must have shape \[4, 5\], got \[4, 9\]"),
        ({"prefix": 10}, "prefix must lie between 0 and T - 1=9, got 10"),
        ({"prefix": -1}, "prefix must lie between 0 and T - 1=9, got -1"),
    )),
    (mf.gather_tokens, {"donors": torch.arange(4) + 1}, "donors must index the batch, 0 to 3, got 4"),
    (mf.attention_relevance, {"k": LAYER["k"][:, :1]}, r"k must have shape \[3, 2, T, 8\], got \[3, 1, 10, 8\]"),
    (mf.attention_relevance, {"v": LAYER["v"][:, :, :4]}, r"v must have shape \[3, 2, 10, 8\], got \[3, 2, 4, 8\]"),
    (mf.attention_relevance, {"v": LAYER["v"].double()}, "v must have dtype float32, got float64"),
    (mf.attention_relevance, {"q": LAYER["q"][:, :, :3], "grad_out": LAYER["q"][:, :, :3]}, "q must have .* got Tq=3"),
    (mf.attention_relevance, {"grad_out": LAYER["q"][:, :, :3]}, r"grad_out must have shape \[3, 2, 10, 8\]"),
    (mf.attention_relevance, {"relevance": torch.ones(3, 9)}, r"relevance must have shape \[3, 10\], got \[3, 9\]"),
    (mf.attention_relevance, {"scale": float("inf")}, "scale must be finite, got inf"),
    (mf.relevance_cam, {"taps": [], "grads": []}, "taps and grads must have one entry per layer, got 0 and 0"),
    (mf.relevance_cam, {"grads": [LAYER["q"]] * 2}, "taps and grads must have one entry per layer, got 1 and 2"),
    (mf.relevance_cam, {"taps": [[LAYER["q"]] * 2]}, r"taps\[0\] must begin with q, k and v, got 2 entries"),
    (mf.relevance_cam, {"taps": [[LAYER["q"], None, LAYER["v"]]]}, r"taps\[0\]\[1\] must be .*, got NoneType"),
    (mf.relevance_cam, {"grads": ["x"]}, r"grads\[0\] must be a torch.Tensor, got str"),
    (mf.relevance_cam, {"start_layer": 1}, "start_layer must lie between -1 and 0, got 1"),
    (mf.relevance_cam, {"prefix": 10}, "prefix must lie between 0 and T - 1=9, got 10"),
    (mf.relevance_cam, {"prefix": 0}, 'readout="class" needs a class token, but prefix=0: all tokens are patches'),
    (mf.relevance_cam, {"readout": "map"}, "readout must be 'class', 'mean', 'attention' or weights, got 'map'"),
    (mf.relevance_cam, {"readout": torch.ones(9)}, r"readout must have shape \[10\], got \[9\]"),
    (mf.relevance_cam, {"readout": "attention"}, "an attention pool has one query, got Tq=10"),
    (mf.sample_donors, {"n": 0}, "n must be at least 1, got 0"),
    (mf.sample_donors, {"n": 1}, "at least 2 images in the batch, got 1"),
    (mf.sample_donors, {"n": "4"}, "n must be an int, got '4'"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "change", "message"), BAD, ids=[f"{op.__name__}: {message}" for op, _, message in BAD])
def test_the_message(op, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        op(**GOOD[op] | change)
