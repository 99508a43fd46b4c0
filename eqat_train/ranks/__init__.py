"""Several processes that train together, one a GPU, started by torchrun; without it nothing here does anything.

Rank 0 plans, measures, prints and writes; the others take part in what is trained
(:mod:`eqat_train.pipeline.following`) and read what rank 0 tells them from torchrun's store. Tensors travel by NCCL
between GPUs and by gloo between CPUs.
"""
