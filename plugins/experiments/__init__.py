"""Suites of experiments, their reports, published numbers, theory and benchmarks.

The top floor: these modules may import everything, and no other package imports them.
"""
