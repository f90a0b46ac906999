"""The renderer is chosen as every command chooses it, before anything imports MuJoCo."""

from vlarl_bench.doctor import require_gl

require_gl()
