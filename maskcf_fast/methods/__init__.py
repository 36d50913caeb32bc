"""Fine-tuning methods: strategies, the counterfactual step, and its neighbours."""

from .averaging import OutputEnsemble, average, interpolate
from .counterfactual import CounterfactualDistiller
from .l2sp import L2SP
from .method import FeatureDistillation, FineTuning, KnowledgeDistillation, Method, StepOutput
from .paper_order import paper_order_step
from .strategies import PAPER_CUTS, Draw, MaskStrategy

__all__ = [
    "L2SP",
    "PAPER_CUTS",
    "CounterfactualDistiller",
    "Draw",
    "FeatureDistillation",
    "FineTuning",
    "KnowledgeDistillation",
    "MaskStrategy",
    "Method",
    "OutputEnsemble",
    "StepOutput",
    "average",
    "interpolate",
    "paper_order_step",
]
