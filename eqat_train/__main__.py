"""``python -m eqat_train ...`` is ``eqat train ...``: what ``torchrun -m eqat_train ...`` starts on each GPU."""

import sys

from eqat_export.cli import main

sys.argv[1:1] = ["train"]
main()
