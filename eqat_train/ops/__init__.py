"""Training operations: one folder an op, a plain-torch reference behind each call."""
