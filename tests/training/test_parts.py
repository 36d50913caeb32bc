"""What of the student is trained, how fast, and on what."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from runs import after_dying

from maskcf_fast.data.mixing import Mixup
from maskcf_fast.methods import CounterfactualDistiller, FineTuning
from maskcf_fast.models import CosineClassifier, ImageClassifier, VisionTransformer
from maskcf_fast.models.adapters import merged_state
from maskcf_fast.training import Trainer
from maskcf_fast.training.build import build_optimizer
from maskcf_fast.training.parts import choose_trained
from maskcf_fast.training.runs import read_run
from maskcf_fast.training.settings import OptimConfig, parse

ALL = ("attn.qkv", "attn.out", "fc", "proj")


def model():
    torch.manual_seed(0)
    return ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, 3))


def test_adapters_have_the_gradients_of_their_product():
    """Of a model with the merged weights: dB = s dW Aᵀ, dA = s Bᵀ dW; and the map and mask of that model."""
    torch.manual_seed(1)
    batch = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    student, plain, teacher = model(), model(), model().backbone
    choose_trained(OptimConfig(lora_rank=2, lora_alpha=3.0, lora_layers=ALL), student, 0)
    layers = [block.get_submodule(name) for block in student.backbone.blocks for name in ALL]
    adapters = [layer.parametrizations.weight[0] for layer in layers]
    assert all(torch.equal(a, b) for a, b in zip(student(batch[0]), plain(batch[0]), strict=True))
    with torch.no_grad():
        for adapter in adapters:
            adapter.b.normal_(std=0.05)
    state = merged_state(student)
    plain.load_state_dict(state)
    draw = torch.Generator().manual_seed(2)
    outs = []
    for one in (student, plain):
        method = CounterfactualDistiller(one, teacher, "object-single", 3.0)
        outs.append(method.backward(*batch, generator=draw.manual_seed(2)))
    assert torch.equal(outs[0].mask, outs[1].mask)
    assert outs[0].mask.any()
    own = [block.get_submodule(name) for block in plain.backbone.blocks for name in ALL]
    for layer, adapter in zip(own, adapters, strict=True):
        torch.testing.assert_close(adapter.b.grad, 1.5 * layer.weight.grad @ adapter.a.T, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(adapter.a.grad, 1.5 * adapter.b.T @ layer.weight.grad, rtol=1e-4, atol=1e-6)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(layers) + 2 == len([p for p in student.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("optim", "moves"),
    [
        ({"lora_rank": 2}, lambda name: "attn.qkv.weight" in name or "attn.out.weight" in name),
        ({"lora_rank": 2, "last_blocks": 1, "lora_layers": ("fc",)}, lambda name: "blocks.3.fc.weight" in name),
        (
            {"last_blocks": 2},
            lambda name: any(part in name for part in ("blocks.2", "blocks.3", "ln_post", "projection")),
        ),
    ],
)
def test_only_what_is_chosen_moves(change, tmp_path, optim, moves):
    """In what is saved, which a model without adapters reads; and a run continues exactly."""
    config = change(optim=optim)
    whole = Trainer(config, quiet=True)
    before = {name: tensor.clone() for name, tensor in merged_state(whole.method.student).items()}
    expected = whole.run()
    run = read_run(config.out, "final")
    saved = run.tuned().state_dict()
    moved = {name for name in saved if not torch.equal(saved[name], before[name])}
    assert moved == {name for name in saved if moves(name) or name.startswith("head.")}
    assert saved.keys() == run.initial().state_dict().keys()
    resumed = after_dying(config, tmp_path / "parts", step=5)
    assert resumed.run() == expected
    again = read_run(tmp_path / "parts", "final").tuned().state_dict()
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_learning_rates_fall_layer_by_layer():
    """One update of AdamW without decay moves every entry with a gradient by its rate."""
    method = FineTuning(model())
    optimizer, schedule = build_optimizer(OptimConfig(lr=0.1, weight_decay=0.0, layer_decay=0.5), method, 10)
    for _ in range(2):  # the rise takes a fifth of a step
        schedule.step()
    rate = optimizer.param_groups[0]["lr"]
    before = {name: p.detach().clone() for name, p in method.student.named_parameters()}
    for p in method.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    steps = {name: (before[name] - p).detach().mean() / rate for name, p in method.student.named_parameters()}
    for name, step in steps.items():
        block = name.split(".")[2] if ".blocks." in name else None
        first = any(part in name for part in ("patch", "class_embedding", "position", "ln_pre"))
        below = 4 - int(block) if block else 5 if first else 0
        assert float(step) == pytest.approx(0.5**below, rel=1e-3), name
    assert {len(build_optimizer(OptimConfig(), method, 10)[0].param_groups), len(optimizer.param_groups)} == {1, 6}


def test_mixup_is_the_mixture_of_two_losses():
    images, labels = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8), torch.tensor([0, 1, 2, 0, 1, 1])
    mixup = Mixup(0.4, 3)
    state = torch.get_rng_state()
    mixed, soft = mixup(images, labels, (0, 0, 5, 0))
    assert torch.equal(torch.get_rng_state(), state)
    share = float(soft[0, 0])  # of label 0; the image before it has label 1
    assert 0 < share < 1
    plain = images.permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(mixed, share * plain + (1 - share) * plain.roll(1, 0))
    assert torch.equal(mixup(images, labels, (0, 0, 5, 0))[0], mixed)
    assert not torch.equal(mixup(images, labels, (0, 0, 6, 0))[0], mixed)
    student = model()
    logits = student(mixed)
    expected = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, labels.roll(1))
    torch.testing.assert_close(FineTuning(student)(mixed, soft).task, expected.detach())


@pytest.mark.parametrize("name", ["ft", "kd", "fd", "l2-sp", "lp"])
def test_methods_without_masks_train_on_mixed_images(change, name):
    trainer = Trainer(change(method={"name": name}, data={"mixup": 0.2}, optim={"epochs": 1}), quiet=True)
    trainer.run()
    plain = Trainer(replace(trainer.config, data=replace(trainer.config.data, mixup=0.0), out=trainer.folder / "x"))
    plain.run()
    weights = [run.method.student.head.weight for run in (trainer, plain)]
    assert not torch.equal(*weights)


def test_a_rank_that_is_not_low(change):
    with pytest.raises(ValueError, match=r"lora_rank=97 is no low rank of attn.qkv, which has 96: take less"):
        Trainer(change(optim={"lora_rank": 97}), quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("--method.name lp --optim.lora-rank 2", "lora_rank=2 has no effect on lp"),
        ("--method.name lp --optim.last-blocks 2", "last_blocks=2 has no effect on lp"),
        ("--method.name lp --optim.layer-decay 0.5", "layer_decay=0.5 has no effect on lp"),
        ("--method.name l2-sp --optim.lora-rank 2", "rests the weights that l2-sp"),
        ("--optim.lora-rank 2 --parallel fsdp", "does not go with --parallel fsdp"),
        ("--optim.lora-rank -1", "must not be negative, got -1"),
        ("--optim.lora-alpha 2", "go with --optim.lora-rank, got 2"),
        ("--optim.lora-layers fc", "lora_layers=('fc',) goes with --optim.lora-rank, which is 0"),
        ("--optim.lora-rank 2 --optim.lora-layers fc fc", "none twice"),
        ("--optim.last-blocks 0", "at least 1, got 0: the method lp"),
        ("--model.arch tiny --optim.last-blocks 5", "last_blocks=5 exceeds the 4 blocks of tiny"),
        ("--optim.layer-decay 1.5", "must lie in (0, 1], got 1.5"),
        ("--optim.ema-student 1", r'ema_student must lie in [0, 1), or be "beta", got 1'),
        ("--method.ema-teacher -0.1", "ema_teacher must lie in [0, 1)"),
        ("--data.mixup 0.2", "a mixed image has two labels"),
        ("--data.mixup -1 --method.name ft", "mixup must not be negative, got -1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        parse(changes.split()).validate()
    assert message in str(error.value)
