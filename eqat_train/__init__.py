"""Training: Block-AP, then E2E-QP (EfficientQAT, arXiv 2407.11062), and running what was trained.

Importing the package imports neither torch nor transformers. It makes ``transformers.AutoModelForCausalLM`` load
native checkpoints: now if transformers is there already, otherwise as soon as it is
(:mod:`eqat_train.inference.when_imported`).
"""

from .inference.when_imported import import_after

__all__: list[str] = []

import_after("transformers.quantizers.auto", "eqat_train.inference.transformers_quantizer")
