"""Scripts to start from, one for each method in lightly's three dialects; ``generate.py`` is their source."""
