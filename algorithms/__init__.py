"""Algorithms: one file each. Installed as `vlarl_bench.algorithms`."""
