"""Benchmarks of sgdr_fused: ``python -m benchmarks.step``, ``.small_tensors`` and ``.threads``."""
