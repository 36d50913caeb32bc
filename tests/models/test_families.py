"""Every family of every library: in, the step, out, and its map."""

import copy
import json
import os
from functools import wraps
from pathlib import Path

import families
import pytest
import torch
from families import FAMILIES, PATCHES, assert_same, pixels
from safetensors.torch import load_file
from students import moved

from maskcf_fast.explain import explain
from maskcf_fast.methods import CounterfactualDistiller, MaskStrategy, paper_order_step, strategy_names
from maskcf_fast.models import CosineClassifier, ImageClassifier, VisionTransformer, load_backbone, load_source
from maskcf_fast.models.sources import load_classifier, load_named, load_text_tower
from maskcf_fast.training.export import export_model

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

PASSED = set()  # by family and test
EVERY = ("test_in", "test_in_at_another_image_size", "test_step", "test_out", "test_explain")


def noted(test):
    """Keep which families a test has passed for."""

    @wraps(test)
    def run(family, **others):
        test(family, **others)
        PASSED.add((family.id, test.__name__))

    return run


def every_family(test):
    return pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)(noted(test))


@pytest.fixture(autouse=True)
def trunks(request, monkeypatch):
    if "open_clip" in request.node.name:
        families.small_trunks(monkeypatch)


@every_family
def test_in(family, tmp_path):
    """The library's features, by the name of its own folder, and from its file of weights alone."""
    name, model = family.save(tmp_path)
    images, normalised = pixels()
    backbone = load_named(name)
    assert_same(backbone(images), family.features(model)(normalised))
    again = load_backbone(VisionTransformer(backbone.config), next(tmp_path.glob("*.safetensors")))
    assert torch.equal(again(images), backbone(images))


@pytest.mark.parametrize("side", [24, 48])
@every_family
def test_in_at_another_image_size(family, tmp_path, side):
    """Positions are resampled as the library does it: timm and open_clip where they load, Hugging Face as it goes."""
    name, model = family.save(tmp_path)
    if family.library == "open_clip":
        model = open_clip.create_model(f"local-dir:{tmp_path}", force_image_size=side).eval()
    elif family.library == "timm":
        model.set_input_size(side)
    images, normalised = pixels(side)
    assert_same(load_named(name, side)(images), family.features(model)(normalised))


@every_family
def test_step(family, tmp_path):
    """The fast step is the paper's, by all strategies; by two, where another library's model is alike."""
    name, _ = family.save(tmp_path)
    student, teacher = moved(load_named(name))
    teacher = teacher.backbone
    images, labels = pixels()[0], torch.tensor([0, 3, 4])
    first = next(other for other in FAMILIES if other.title == family.title) is family
    for strategy in map(MaskStrategy.from_name, strategy_names() if first else ["object-single", "context-none"]):
        draw = strategy.draw(3, PATCHES, generator=torch.Generator().manual_seed(0))
        fast = CounterfactualDistiller(student, teacher, strategy)(images, labels, draw=draw)
        paper = paper_order_step(student, teacher, strategy, images, labels, draw)
        assert torch.equal(fast.mask, paper.mask)
        grads = [torch.autograd.grad(out.loss, list(student.parameters())) for out in (fast, paper)]
        whole = torch.cat([grad.flatten() for grad in grads[1]]).norm()  # a key's bias has none but of rounding
        for a, b in zip(*grads, strict=True):
            assert (a - b).norm() <= 2e-5 * b.norm() + 1e-7 * whole
        torch.testing.assert_close(fast.loss, paper.loss, rtol=1e-5, atol=0)
        if strategy.needs_cam:  # of which the constants that were subtracted have left their rounding
            assert (fast.cam - paper.cam).norm() <= 1e-5 * paper.cam.norm() + 1e-7


@every_family
def test_out(family, tmp_path, monkeypatch):
    """Given back to its library, it is loaded as the same model with the same features."""
    (tmp_path / "in").mkdir()
    name, _ = family.save(tmp_path / "in")
    backbone = load_named(name)
    classifier = ImageClassifier(backbone, CosineClassifier(backbone.config.feature_dim, 2))
    out = tmp_path / "out"
    if family.library == "open_clip":
        cfg = json.loads((tmp_path / "in" / "open_clip_config.json").read_text())["model_cfg"]
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Small", cfg)
        call = export_model(classifier, ["ant", "bee"], "open_clip", out).load
        theirs = open_clip.create_model("Small")
        assert call.startswith('open_clip.create_model("Small").' if "ls_init" not in str(family.options) else "model.")
        theirs.visual.load_state_dict(load_file(out / "model.safetensors"))
        images, normalised = pixels()
        assert_same(theirs.eval().visual(normalised), backbone(images))
        return
    export_model(classifier, ["ant", "bee"], family.library, out)
    again = f"{family.library}:{'local-dir:' if family.library == 'timm' else ''}{out}"
    config, _ = load_source(again)
    assert config == backbone.config
    images, normalised = pixels()
    if family.library == "timm":
        theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    else:
        kind = getattr(transformers, family.kind if family.kind != "ViTMAEModel" else "ViTModel")
        theirs, report = kind.from_pretrained(out, output_loading_info=True)
        assert not any(report[key] for key in ("unexpected_keys", "mismatched_keys"))
        assert all("pooler" in key for key in report["missing_keys"])
    assert_same(family.features(theirs.eval())(normalised), backbone(images))
    assert_same(load_named(again)(images), backbone(images))


@every_family
def test_explain(family, tmp_path):
    """The map of the library's unmodified module is the trainer's."""
    name, model = family.save(tmp_path)
    backbone = load_named(name)
    head = CosineClassifier(backbone.config.feature_dim, 4)
    images, normalised = pixels()
    labels = torch.tensor([0, 3, 1])
    features, pool = family.features(model), backbone.config.pool
    theirs = explain(
        lambda x: head(features(x)), normalised, labels, prefix_tokens=backbone.config.prefix, readout=pool
    )
    ours = explain(ImageClassifier(backbone, head), images, labels)
    method = CounterfactualDistiller(ImageClassifier(backbone, head), copy.deepcopy(backbone), "object-single")
    assert theirs.abs().max() > 1e-6
    for cam in (ours, method(images, labels).cam):
        assert (cam - theirs).norm() <= 2e-5 * theirs.norm()


WITH_TEXT = [f for f in FAMILIES if f.library == "open_clip" or f.kind in families.WITH_TEXT]


@pytest.mark.parametrize("family", WITH_TEXT, ids=lambda family: family.id)
@noted
def test_zero_shot(family, tmp_path):
    """The head that is made of the text tower gives the library's own logits, as does `explain`'s classifier."""
    images, normalised = pixels()
    prompts = ["a photo of the cat <end>", "the dog <end>", "a bus <end>"]
    if family.library == "hf":
        name, *model = families.with_text(families.WITH_TEXT[family.kind], tmp_path, **family.options)
        expected = families.text_logits(*model, prompts, normalised)
    else:
        name, model = family.save(tmp_path)
        with torch.no_grad():
            clean = "canonicalize" if "siglip" in family.kind else "lower"
            tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length, clean=clean)
            text = model.encode_text(tokenizer(prompts), normalize=True)
            expected = model.logit_scale.exp() * model.encode_image(normalised, normalize=True) @ text.T
    tower = load_text_tower(name, "cpu")
    student = ImageClassifier(load_named(name), CosineClassifier.from_text(tower.encode(prompts), tower.scale))
    assert expected.std(dim=1).min() > 1e-4
    assert_same(student(images), expected)
    loaded = load_classifier(name, pretrained=True, prompts=prompts, device=torch.device("cpu"))
    assert_same(loaded.logits(normalised), expected)


PAGE = Path(__file__).parents[2] / "docs" / "models.md"
LIBRARIES = ("open_clip", "hf", "timm")
HEAD = ["| | open_clip | Hugging Face | timm | zero-shot |", "|---|:-:|:-:|:-:|:-:|"]


def table(good):
    """Rows of the page: a mark where ``good`` of all tests of a family there, and of its zero-shot head in any."""
    rows = list(HEAD)
    for title in dict.fromkeys(family.title for family in FAMILIES):
        own = [family for family in FAMILIES if family.title == title]
        cells = [[(f, test) for f in own if f.library == at for test in EVERY] for at in LIBRARIES]
        cells.append([(f, "test_zero_shot") for f in own if f in WITH_TEXT])
        marks = ("✓" if cell and all(good(*one) for one in cell) else "" for cell in cells)
        rows.append(f"| {title} | {' | '.join(marks)} |")
    return "\n".join(rows)


def test_the_page_has_the_table_of_what_is_tested_here():
    """``MASKCF_WRITE_TABLE=1 pytest tests/models/test_families.py`` writes it, of what has passed before this."""
    if os.environ.get("MASKCF_WRITE_TABLE"):
        before, _, rest = PAGE.read_text().partition(HEAD[0])
        after = rest.partition("\n\n")[2]
        PAGE.write_text(f"{before}{table(lambda family, test: (family.id, test) in PASSED)}\n\n{after}")
    assert table(lambda *_: True) in PAGE.read_text(), "MASKCF_WRITE_TABLE=1 pytest tests/models/test_families.py"
