"""Self-supervised objectives that know no framework: losses, predictors, heads, targets, and the methods made of them."""
