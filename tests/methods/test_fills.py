"""A fill that only says what it is: every place that a strategy passes through takes it."""

from dataclasses import replace

import pytest
import torch
from test_step import SIZES, check_against_paper, make

from maskcf_fast.methods import FILLS, CounterfactualDistiller, Fill, MaskStrategy, register_fill, strategy_names
from maskcf_fast.methods.fills import REGIONS
from maskcf_fast.models import CosineClassifier, ImageClassifier, VisionTransformer
from maskcf_fast.training import Trainer
from maskcf_fast.training.settings import parse
from maskcf_fast.visualization.draws import Draws
from maskcf_fast.visualization.images import Images
from maskcf_fast.visualization.maps import counterfactuals
from maskcf_fast.visualization.page import Page, page_data

GREY = 102


class Grey(Fill):
    def encode(self, backbone, tokens, mask, donors, dropped):
        side = backbone.config.image_size
        grey = backbone.embed(torch.full((1, side, side, 3), GREY, dtype=torch.uint8, device=tokens.device))
        others = tokens.shape[1] - mask.shape[1]
        masked = torch.cat([mask.new_zeros(len(mask), others), mask], dim=1)
        return backbone.encode(torch.where(masked[..., None], grey.to(tokens.dtype), tokens))[0]

    def pixels(self, images, mask, donors):
        side, size = round(mask.shape[1] ** 0.5), images.shape[-1]
        hidden = mask.view(-1, 1, side, side).repeat_interleave(size // side, 2).repeat_interleave(size // side, 3)
        return images.masked_fill(hidden, GREY if images.dtype == torch.uint8 else GREY / 255)


@pytest.fixture(autouse=True)
def _grey():
    register_fill(Grey("grey", {"object": 0.4, "context": 0.2, "random": 0.25}))
    yield
    del FILLS["grey"]


@pytest.mark.parametrize("size", ["8×8 patches", "attention pool"])
@pytest.mark.parametrize("region", REGIONS)
def test_the_step_equals_the_paper_order(region, size):
    strategy = MaskStrategy.from_name(f"{region}-grey")
    assert (strategy.rate or strategy.threshold) == {"object": 0.4, "context": 0.2, "random": 0.25}[region]
    check_against_paper(*make(SIZES[size]), strategy, seed=0)


def test_a_run_and_its_settings_take_it(change):
    assert "context-grey" in strategy_names()
    assert parse(["--method.strategy", "random-grey"]).method.mask_strategy().rate == 0.25
    config = change(method={"strategy": "object-grey"}, optim={"epochs": 1, "batch_size": 1})  # needs no other image
    Trainer(replace(config, eval_every=0), quiet=True)
    with pytest.raises(ValueError, match=r"unknown strategy 'object-gray'.*did you mean 'object-grey'"):
        MaskStrategy.from_name("object-gray")


def test_the_page_shows_it():
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    cam = torch.rand(3, 16)
    strategies = [MaskStrategy.from_name(f"{region}-grey") for region in REGIONS]
    draws = Draws.draw(3, 16, torch.Generator().manual_seed(0))
    for strategy in strategies:
        mask, made = counterfactuals(strategy, images, cam, draws.of(strategy))
        hidden = mask.view(3, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)
        assert (made[hidden] == GREY).all()
        assert torch.equal(made[~hidden], images[~hidden])
    shown = Images(("a", "b", "c"), images, torch.zeros(3, dtype=torch.int64))
    data = page_data(Page("", {}, shown, ["x"], cam, torch.ones(3, 1), strategies, draws))
    assert all(image["fills"]["grey"]["picture"].startswith("data:image/png;base64,") for image in data["images"])


def test_methods_ask_for_what_it_needs():
    student = ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, 3))
    method = CounterfactualDistiller(student, VisionTransformer("tiny"), "object-grey")
    assert method.strategy.fixed_length
    assert not method.strategy.filling.other_images
    out = method.backward(torch.rand(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64))
    assert out.loss.isfinite()
