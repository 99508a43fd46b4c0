"""Conversion, verification and inspection of quantized checkpoints, and the eqat command."""
