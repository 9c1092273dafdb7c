"""The measuring core: cases, peers, and a race that verifies before it times.

``python -m benchmarks run --quick`` is the place to begin.
"""
