"""What holds for all tests: the renderer is chosen as every command chooses it, before anything imports MuJoCo, no test
fails because the machine is busy with something else, and those that wait for minutes begin first."""

from hypothesis import HealthCheck, settings

from vlarl_bench.doctor import require_gl

require_gl()
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

LONG = ("slurm", "torture")
"""Folders of few tests that take minutes, most of which they wait: begun last, they would be waited for."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.parent.name not in LONG)
