"""Running a quantized model: packed linears, transformers' loader, and the decoding loop behind ``eqat generate``."""
