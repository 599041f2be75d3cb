"""Self-supervised objectives that know no framework: losses, predictors, heads, targets and the methods they make."""
