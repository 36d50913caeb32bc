"""Classification on top of a feature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.checks import FLOATS, check_tensor
from ..core.errors import UserError
from ..core.precision import no_autocast
from .backbone import Backbone
from .vit import VisionTransformer


class CosineClassifier(nn.Module):
    """``logits = W · f / ‖f‖ + b``: CLIP's zero-shot classifier, trained on.

    Args:
        feature_dim: Dimension of the feature, ``D``.
        num_classes: Number of classes.
    """

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        _check_sizes(feature_dim, num_classes)
        # Rows of length 10: logits of unit features that a softmax can tell apart, and that still learn.
        self.weight = nn.Parameter(10 * F.normalize(torch.randn(num_classes, feature_dim), dim=1))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    @classmethod
    def from_text(cls, embeddings: Tensor, scale: float = 100.0) -> CosineClassifier:
        """The zero-shot head: one text embedding per class (``[classes, D]``), normalised, times ``scale``."""
        check_tensor("embeddings", embeddings, ["classes", "D"], dtypes=FLOATS)
        head = cls(embeddings.shape[1], embeddings.shape[0])
        with torch.no_grad():
            head.weight.copy_(F.normalize(embeddings.float(), dim=1) * scale)
        return head

    def forward(self, features: Tensor) -> Tensor:
        """Features ``[N, D]`` to logits ``[N, classes]``, in the weights' dtype also under autocast."""
        with no_autocast(features.device):
            return F.linear(F.normalize(features.to(self.weight.dtype), dim=-1), self.weight, self.bias)


class LinearClassifier(nn.Linear):
    """``logits = W · f + b`` on the feature as it is: for models without a text tower.

    Args:
        feature_dim: Dimension of the feature, ``D``.
        num_classes: Number of classes.
    """

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        _check_sizes(feature_dim, num_classes)
        super().__init__(feature_dim, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Features ``[N, D]`` to logits ``[N, classes]``, in the weights' dtype also under autocast."""
        with no_autocast(features.device):
            return F.linear(features.to(self.weight.dtype), self.weight, self.bias)


HEADS: dict[str, type[CosineClassifier | LinearClassifier]] = {"cosine": CosineClassifier, "linear": LinearClassifier}


def _check_sizes(feature_dim: int, num_classes: int) -> None:
    if type(feature_dim) is not int or type(num_classes) is not int:
        raise TypeError(f"a head's sizes must be ints, got {feature_dim!r} features, {num_classes!r} classes")
    if feature_dim < 1 or num_classes < 1:
        raise UserError(f"a head needs positive sizes, got {feature_dim} features, {num_classes} classes")


class ImageClassifier(nn.Module):
    """A vision transformer with a head: what is fine-tuned.

    Args:
        backbone: Gives features.
        head: Maps features to logits.

    Raises:
        ValueError: The head expects features of another size.
    """

    def __init__(self, backbone: Backbone, head: CosineClassifier | LinearClassifier) -> None:
        super().__init__()
        if head.weight.shape[1] != backbone.config.feature_dim:
            raise UserError(
                f"the head expects features of size {head.weight.shape[1]}, "
                f"the backbone gives {backbone.config.feature_dim}"
            )
        self.backbone = backbone
        self.head = head

    @property
    def transformer(self) -> VisionTransformer:
        """The backbone where it is the compact vision transformer.

        Raises:
            ValueError: It is another library's, unmodified.
        """
        if not isinstance(self.backbone, VisionTransformer):
            raise UserError("this needs the compact vision transformer, and the model is another library's, unmodified")
        return self.backbone

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches in the blocks: class token and registers. The name is timm's."""
        return self.backbone.config.prefix

    def features(self, images: Tensor) -> Tensor:
        """Images to features ``[N, D]``."""
        return self.backbone(images)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits ``[N, classes]``."""
        return self.head(self.backbone(images))
