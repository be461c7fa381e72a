"""Benchmarks of sgdr_fused; run one with, for example, ``python -m benchmarks.steps``."""
