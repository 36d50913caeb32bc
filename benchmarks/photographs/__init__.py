"""Real photographs and a really pre-trained model: what each method does to a spurious background."""
