"""Measurements behind docs/results.md, docs/recipes.md and docs/scaling.md. From the repository's folder:

    python -m benchmarks.ops.dequant_matmul --csv benchmarks/results/dequant_matmul.csv
    python -m benchmarks.plot

``ops`` has a script for each op, ``loops`` one for each loop, training and generating; ``scaling`` is about memory,
more GPUs and larger models, ``export`` about conversions and the readers of what they write, and ``recipes`` about what
the trained models are worth. Each checks before it measures; its first lines say the rest. ``results`` has the rows.
"""
