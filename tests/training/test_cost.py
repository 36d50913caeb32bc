"""What a step is said to cost, against what one that runs takes."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from maskcf_fast import info
from maskcf_fast.core.errors import UserError
from maskcf_fast.methods import CounterfactualDistiller
from maskcf_fast.models import CosineClassifier, ImageClassifier, Rotary, VisionTransformer, blocks, preset
from maskcf_fast.models.sources import load_architecture
from maskcf_fast.training.cost import complete_flop_counter, forward_flops, step_cost

CONFIGS = {
    "class token": preset("tiny", width=192, depth=2),
    "gates, rotary, attention pool": preset(
        "tiny", width=192, depth=2, pool="attention", gated_mlp=True, activation="silu", rotary=Rotary(), registers=2
    ),
}


def attend(q, k, v, mask):
    """As on a GPU: a CPU computes it in float32."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def allocated(step):
    """Bytes that the step allocates at its highest point, by the allocator's own events; how many remain."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as done:
        step()
    events = [e for e in done.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("name", "precision", "recompute"),
    [
        ("class token", "fp32", False),
        ("class token", "fp32", "gelu"),
        ("gates, rotary, attention pool", "fp32", False),
        ("gates, rotary, attention pool", "fp32", True),
        ("gates, rotary, attention pool", "bf16", False),
        ("gates, rotary, attention pool", "bf16", True),
    ],
)
def test_against_a_step_that_runs(name, precision, recompute, monkeypatch):
    monkeypatch.setattr(blocks, "attend", attend)
    config = CONFIGS[name]
    cost = step_cost(config, 32, classes=10, precision=precision, recompute=recompute)
    student = ImageClassifier(VisionTransformer(config), CosineClassifier(config.feature_dim, 10))
    teacher = VisionTransformer(config)
    method = CounterfactualDistiller(student, teacher, "object-single")
    method.precision, student.backbone.recompute = precision, recompute
    if precision == "bf16":
        method.narrow_teacher()
    images = torch.randint(256, (32, config.image_size, config.image_size, 3), dtype=torch.uint8)
    labels = torch.zeros(32, dtype=torch.int64)

    def step():
        method.backward(images, labels)

    step()
    peak = allocated(step)
    assert cost.memory["activations"] + cost.memory["buffers of the ops"] == pytest.approx(peak, rel=0.05)
    complete_flop_counter()
    with FlopCounterMode(display=False) as counter:
        step()
    assert cost.flops == counter.get_total_flops() > 0
    optimizer = torch.optim.AdamW(student.parameters())
    optimizer.step()
    state = [x for moments in optimizer.state.values() for key, x in moments.items() if key != "step"]
    parts = {
        "weights": list(student.parameters()),
        "gradients": [p.grad for p in student.parameters()],
        "optimiser state": state,
        "teacher": list(teacher.parameters()),
    }
    for part, tensors in parts.items():
        assert cost.memory[part] == sum(x.numel() * x.element_size() for x in tensors)
    assert cost.parameters == sum(p.numel() for p in teacher.parameters())


def test_bf16_and_a_division_among_processes_take_less():
    plain, half = (step_cost(CONFIGS["class token"], 32, precision=precision) for precision in ("fp32", "bf16"))
    assert half.memory["activations"] < 0.8 * plain.memory["activations"]
    whole = sum(plain.memory[part] for part in ("activations", "buffers of the ops"))
    assert plain.divided(8) == (plain.total - whole) // 8 + whole + 6 * plain.block


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("ViT-L/14", 303.97),
        ("open_clip:ViT-H-14", 632.08),
        ("timm:vit_giant_patch14_reg4_dinov2", 1136.48),
        ("timm:vit_7b_patch16_dinov3", 6716.04),
        ("open_clip:ViT-SO400M-14-SigLIP-384", 428.23),
    ],
)
def test_large_models_by_name_without_their_weights(name, millions):
    """The published sizes."""
    pytest.importorskip(name.partition(":")[0] if ":" in name else "torch")
    with torch.device("meta"):
        model = VisionTransformer(load_architecture(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_the_command(capsys):
    assert info.main(["--model", "tiny", "--batch", "4", "--precision", "fp32"]) == 0
    said = capsys.readouterr().out
    assert "tiny: 32 px, 16 patches, object-single, fp32, 4 images per GPU" in said
    for part in ("parameters", "FLOPs per step", "weights", "teacher", "activations", "fits on one GPU", "fits on 8"):
        assert part in said
    assert info.main(["--model", "tiny", "--batch", "1"]) == 1
    assert "--batch must be at least 2" in capsys.readouterr().err
    assert info.main(["--model", "tiny", "--batch", str(10**14)]) == 1
    assert "1,000,000 at most, got 100000000000000" in capsys.readouterr().err
    assert info.main(["--model", "foo:bar"]) == 1
    assert "a model is named open_clip:MODEL" in capsys.readouterr().err
    assert info.main(["--model", "ViT-L/41"]) == 1
    assert "did you mean 'ViT-L/14'" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not divide by patch_size=14"):
        load_architecture("ViT-L/14", 225)


def test_a_model_that_is_no_vision_transformer():
    pytest.importorskip("timm")
    with pytest.raises(UserError, match="it is a ResNet, neither timm's VisionTransformer nor its Eva"):
        load_architecture("timm:resnet18")


@pytest.mark.parametrize(
    "changes", [{}, {"registers": 4}, {"class_token": False}, {"gated_mlp": True, "mlp_width": 96, "output_dim": None}]
)
def test_a_plain_forward_pass_is_what_a_counter_counts(changes):
    """Of a model that reads all tokens; one that reads its class token leaves out most of the last block."""
    config = preset("tiny", pool="mean", **changes)
    complete_flop_counter()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        VisionTransformer(config)(torch.rand(2, 3, config.image_size, config.image_size))
    assert counter.get_total_flops() == 2 * forward_flops(config)
