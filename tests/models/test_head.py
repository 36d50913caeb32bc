from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maskcf_fast.core.errors import UserError
from maskcf_fast.models import HEADS, CosineClassifier, ImageClassifier, LinearClassifier, VisionTransformer
from maskcf_fast.training.build import build_model
from maskcf_fast.training.settings import ModelConfig


def test_linear_head_is_a_linear_layer_on_the_raw_feature():
    head = LinearClassifier(64, 3)
    features = torch.randn(5, 64)
    torch.testing.assert_close(head(features), features @ head.weight.T + head.bias)
    assert not torch.allclose(head(2 * features), head(features))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(features.bfloat16()), head(features.bfloat16().float()))


def test_both_heads_fit_the_classifier_alike():
    for kind in HEADS.values():
        head = kind(64, 3)
        assert [tuple(p.shape) for p in head.state_dict().values()] == [(3, 64), (3,)]
        assert ImageClassifier(VisionTransformer("tiny"), head)(torch.rand(2, 3, 32, 32)).shape == (2, 3)
        with pytest.raises(ValueError, match="positive sizes, got 0 features, 3 classes"):
            kind(0, 3)
    with pytest.raises(ValueError, match="expects features of size 32, the backbone gives 64"):
        ImageClassifier(VisionTransformer("tiny"), LinearClassifier(32, 3))
    assert HEADS["cosine"] is CosineClassifier


@pytest.mark.parametrize("before", ["", "module.", "model.", "_orig_mod.", "net.module."])
@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
def test_a_head_in_other_trainers_checkpoints(tmp_path, before, wrapper):
    """As the weights beside it, whatever was put in front or around; alone in its file, or in the classifier's."""
    torch.manual_seed(0)
    model = ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, 3))
    states = {
        "classifier": model.state_dict(),
        "head": model.head.state_dict(),
        "named": {f"head.{name}": tensor for name, tensor in model.head.state_dict().items()},
        "fc": {f"fc.{name}": tensor for name, tensor in model.head.state_dict().items()},
    }
    for name, state in states.items():
        state = {f"{before}{key}": tensor for key, tensor in state.items()}
        torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / name)
    weights = tmp_path / "classifier"
    for head in (None, *(tmp_path / name for name in states)):
        read = build_model(ModelConfig(arch="tiny", weights=weights, head=head), 3, seed=1).state_dict()
        assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("classes", ["no JSON", "{}", "[1, 2, 3]", "null", 9999 * "[", '["a", "b"]'])
def test_class_names_beside_a_head_that_are_none(tmp_path, classes):
    save_file({"weight": torch.ones(3, 64)}, tmp_path / "head", {"classes": classes})
    config = ModelConfig(arch="tiny", weights=Path("random"), head=tmp_path / "head")
    with pytest.raises(UserError, match=r"the classes in .*head|the head in .*head is of other classes"):
        build_model(config, 3, 0, ["a", "b", "c"])


def test_a_file_with_other_than_one_head_is_refused(tmp_path):
    for state in ({"a.weight": torch.ones(3, 64), "b.weight": torch.ones(3, 64)}, {"bias": torch.ones(3)}):
        torch.save(state, tmp_path / "head")
        with pytest.raises(UserError, match=r'head must hold one head, "weight" \[classes, D\], it holds'):
            build_model(ModelConfig(arch="tiny", weights=Path("random"), head=tmp_path / "head"), 3, seed=1)
