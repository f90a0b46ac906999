"""Numbers in short, wherever seeds and initial states are listed."""

from collections.abc import Iterable


def spans(numbers: Iterable[int]) -> str:
    """Integers in order, neighbours as one span: 0-24, 30."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{low}-{high}" if low < high else str(low) for low, high in parts)
