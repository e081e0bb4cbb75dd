"""``python -m trtx_py``: the same as ``trtx``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
