"""JSON documents that carry a digest of themselves: what a byte changed on a disk is named and never used.

A run's `config.json`, `manifest.json` and `stopped.json`, a sweep's cells, attempts and submissions, and the record of
demonstrations.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import BenchError
from .files import explained, write_json_atomic

SEAL = "sha256"


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object whole or not at all, with a digest of itself as its last entry."""
    write_json_atomic(path, seal(content))


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its digest."""
    return {**content, SEAL: _digest(content)}


def read_sealed(path: Path, older: bool = False) -> dict[str, Any]:
    """Reads what `write_sealed` wrote, and returns it without its digest.

    With `older`, a file that never had a digest is read as it is: run folders of earlier versions have none.

    Raises:
        BenchError: naming the file, if it is missing, or if anything in it was altered.
    """
    with explained(path):
        data = path.read_bytes()  # once: whoever holds the file may replace it at any time
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{path}: not valid JSON ({error}); restore it from a copy") from None
    if not isinstance(content, dict):
        raise BenchError(f"{path}: not a JSON object; restore it from a copy")
    # The text, too: two numbers may be written differently and still be read as the same.
    as_written = data == (json.dumps(content, indent=2) + "\n").encode()
    # One byte can spoil the digest or its name, but not both.
    if older and SEAL not in content and not re.fullmatch(r"[0-9a-f]{64}", str(next(reversed(content.values()), ""))):
        return content
    if content.pop(SEAL, None) != _digest(content) or not as_written:
        raise BenchError(
            f"{path}: damaged: its content does not match its SHA-256; restore it from a copy or remove it"
        )
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(content), sort_keys=True).encode()).hexdigest()
