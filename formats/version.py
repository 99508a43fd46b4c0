"""The version that checkpoints record as their producer's."""

__all__ = ["__version__"]

__version__ = "0.1.0"
