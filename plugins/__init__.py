"""Self-supervised objectives without a framework: losses, predictors, heads, targets, and the methods made of them."""
