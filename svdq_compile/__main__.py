"""``python -m svdq_compile``: the same as the ``svdq-compile`` command."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
