#!/bin/sh
# Makes the virtual environment .venv with the pinned packages of constraints.txt, and the system's GL libraries.
# Called by the Makefile, which stamps the result only when this ends well, so an interrupted set-up starts again.
set -eu
cd "$(dirname "$0")/.."
VENV=.venv
# Off-screen rendering (OSMesa), and what OpenCV, which robosuite imports, links against.
SYSTEM_PACKAGES="libosmesa6 libgl1 libglib2.0-0"

say() { printf '%s\n' "$*" >&2; }
stop() { say "setup: $*"; exit 1; }
works() { command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

PYTHON=${PYTHON:-}
if [ -n "$PYTHON" ]; then
    works "$PYTHON" || stop "PYTHON=$PYTHON is not Python 3.11 or newer; give one that is: make setup PYTHON=python3.11"
else
    for candidate in python3.11 python3; do
        if works "$candidate"; then PYTHON=$candidate; break; fi
    done
    [ -n "$PYTHON" ] || stop "needs Python 3.11 or newer; run: apt-get install python3.11 python3.11-venv"
fi
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    stop "Python $version lacks its venv module; run: apt-get update && apt-get install python$version-venv"

# Before the long download: are the shared libraries there? With MUJOCO_GL=egl (or glfw) OSMesa is not asked for.
missing_libraries() {
    "$PYTHON" - <<'PY'
import ctypes
import os

wanted = [["libGL.so.1"], ["libgthread-2.0.so.0"]]
if os.environ.get("MUJOCO_GL", "osmesa") == "osmesa":
    wanted.append(["libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"])
for names in wanted:
    for name in names:
        try:
            ctypes.CDLL(name)
            break
        except OSError:
            pass
    else:
        print(names[0], end=" ")
PY
}
missing=$(missing_libraries)
if [ -n "$missing" ]; then
    command="apt-get update -qq && apt-get install -y -qq $SYSTEM_PACKAGES"
    command -v apt-get >/dev/null 2>&1 || stop "missing $missing: install this system's packages for OSMesa, libGL and GLib"
    [ "$(id -u)" = 0 ] || stop "missing $missing; run: sudo sh -c '$command'"
    say "setup: installing $SYSTEM_PACKAGES"
    DEBIAN_FRONTEND=noninteractive sh -c "$command" >/dev/null </dev/null || stop "failed: $command"
    missing=$(missing_libraries)
    [ -z "$missing" ] || stop "still missing $missing after: $command"
fi

if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    say "setup: making $VENV with $PYTHON ($version)"
    "$PYTHON" -m venv --clear "$VENV"
fi
# Torch comes first and pinned, so that nothing after it can pull in another build. Which build that is, is up to pip's
# settings: where the default wheel is a CUDA one and you want the smaller CPU one, set PIP_EXTRA_INDEX_URL (or
# PIP_FIND_LINKS) to a place that holds CPU wheels, as in PyTorch's own install instructions.
# Not compiled: all modules take one core about two minutes, and Python compiles those that it imports.
say "setup: installing the pinned packages (about 3.5 GB on disk; minutes, the first time)"
"$VENV/bin/python" -m pip install -q --no-compile -c constraints.txt torch
"$VENV/bin/python" -m pip install -q --no-compile -c constraints.txt --use-pep517 -e '.[dev]'
say "setup: done"
