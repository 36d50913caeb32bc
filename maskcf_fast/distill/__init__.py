"""Fine-tuning methods: strategies, the counterfactual step, and its neighbours."""

from .counterfactual import CounterfactualDistiller
from .methods import FeatureDistillation, FineTuning, KnowledgeDistillation, Method, StepOutput
from .paper_order import paper_order_step
from .strategies import PAPER_CUTS, Draw, MaskStrategy

__all__ = [
    "PAPER_CUTS",
    "CounterfactualDistiller",
    "Draw",
    "FeatureDistillation",
    "FineTuning",
    "KnowledgeDistillation",
    "MaskStrategy",
    "Method",
    "StepOutput",
    "paper_order_step",
]
