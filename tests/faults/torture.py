"""How often tests injure things: seldom in CI, as often as the project promises by `make torture`."""

import os

SHARE = float(os.environ.get("TORTURE", "0"))
"""Share of the full counts; 0 in CI."""


def count(small: int, full: int) -> int:
    """How many times to do it."""
    return max(small, round(SHARE * full))
