import pytest
import torch

from maskcf_fast.models import HEADS, CosineClassifier, ImageClassifier, LinearClassifier, VisionTransformer


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
    with pytest.raises(ValueError, match="expects features of size 32"):
        ImageClassifier(VisionTransformer("tiny"), LinearClassifier(32, 3))
    assert HEADS["cosine"] is CosineClassifier
