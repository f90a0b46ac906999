"""What holds for all tests: the renderer is chosen as every command chooses it, before anything imports MuJoCo, and no
test fails because the machine is busy with something else."""

from hypothesis import HealthCheck, settings

from vlarl_bench.doctor import require_gl

require_gl()
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
