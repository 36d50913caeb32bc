"""Looking at counterfactual images: a page to explore in a browser, pictures, and rows for TensorBoard."""

from ..core.optional import need

need("matplotlib", "PIL")
