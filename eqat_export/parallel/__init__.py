"""Exports spread over processes: those of one machine (``--workers``), or the ranks that torchrun started.

One process plans and publishes, the others encode layers and write their bytes where it tells them. Places are given
out in the order of the layers, from what each really takes, so that the output is the same bytes however many take
part.
"""
