"""Refuses what must never be committed: too many bytes, paths of one machine, pickles. Called by .ci/run."""

import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

LIMIT_MIB = 40
MACHINE_PATH = re.compile(rb"(?<![\w.~])/(?:work|root|opt)/\w")
PICKLE_NAMES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".ckpt"}
PICKLE_START = re.compile(rb"\x80[\x02-\x05][\x95}\]c(q]")


def is_pickle(name: str, content: bytes) -> bool:
    """Whether the file is a pickle by name or content, also inside an archive (`torch.save`, `np.savez`)."""
    if Path(name).suffix in PICKLE_NAMES or PICKLE_START.match(content):
        return True
    if content.startswith(b"\x93NUMPY") and b"'|O'" in content[:128]:
        return True
    if content.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(is_pickle(inner, archive.read(inner)) for inner in archive.namelist())
    return False


def problems(files: dict[str, bytes]) -> list[str]:
    """One line for each thing wrong with these files (name -> content)."""
    found = []
    total = sum(map(len, files.values())) / 2**20
    if total > LIMIT_MIB:
        found.append(f"{total:.1f} MiB tracked; the limit is {LIMIT_MIB} MiB")
    for name, content in files.items():
        if is_pickle(name, content):
            found.append(f"{name}: a pickle; use safetensors or JSON")
        if b"\0" not in content:
            for number, line in enumerate(content.splitlines(), start=1):
                if MACHINE_PATH.search(line):
                    found.append(f"{name}:{number}: a path of one machine: {line.decode(errors='replace').strip()}")
    return found


def main() -> int:
    """Checks the files that git tracks in the current folder."""
    names = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True).stdout.split("\0")
    files = {name: Path(name).read_bytes() for name in names if name and Path(name).is_file()}
    print(f"{len(files)} tracked files, {sum(map(len, files.values())) / 2**20:.1f} MiB")
    found = problems(files)
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
