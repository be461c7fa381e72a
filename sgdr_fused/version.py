"""The version, which setuptools reads from here without importing the package."""

__version__ = "0.1.0"
