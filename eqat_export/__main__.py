"""``python -m eqat_export`` is the ``eqat`` command."""

from .cli import main

main()
