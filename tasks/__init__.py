"""Task suites. Installed as `vlarl_bench.tasks`."""
