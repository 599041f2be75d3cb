"""Suites of experiments, their reports, published numbers, theory and benchmarks.

The top layer: these modules may import all other packages, and no other package imports them.
"""
