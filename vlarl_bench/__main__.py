"""`python -m vlarl_bench` is `vlarl-bench`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
