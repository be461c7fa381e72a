"""Builds the native backend: how it is compiled (``recipe``), and into the cache (``build``)."""
