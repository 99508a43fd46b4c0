"""Training: Block-AP, then E2E-QP (EfficientQAT, arXiv 2407.11062)."""
