"""Fine-tuning methods: strategies, the counterfactual step, and its neighbours."""

import pkgutil
from importlib import import_module

from .averaging import OutputEnsemble, average, interpolate, model_stock
from .counterfactual import CounterfactualDistiller
from .feature_distillation import FeatureDistillation
from .fills import FILLS, Fill, register_fill
from .fine_tuning import FineTuning
from .knowledge_distillation import KnowledgeDistillation
from .l2sp import L2SP
from .losses import StepOutput
from .method import Method
from .paper_order import paper_order_step
from .registry import METHODS, build_method, register
from .strategies import Draw, MaskStrategy, strategy_names

for _module in pkgutil.iter_modules(__path__):  # each registers its methods
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "FILLS",
    "L2SP",
    "METHODS",
    "CounterfactualDistiller",
    "Draw",
    "FeatureDistillation",
    "Fill",
    "FineTuning",
    "KnowledgeDistillation",
    "MaskStrategy",
    "Method",
    "OutputEnsemble",
    "StepOutput",
    "average",
    "build_method",
    "interpolate",
    "model_stock",
    "paper_order_step",
    "register",
    "register_fill",
    "strategy_names",
]
