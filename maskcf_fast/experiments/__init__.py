"""Whole experiments: the demo, the paper's table, comparisons and the page of counterfactual images."""

from ..core.optional import need

need("matplotlib", "PIL", "sklearn", "tqdm", "tyro", "yaml")
