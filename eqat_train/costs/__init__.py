"""What a run takes: memory, disk, network and time, from a model's shape and a machine's measured figures.

``eqat train --dry-run`` prints it for a run, docs/scaling.md tables it for models that nobody here has trained.
"""
