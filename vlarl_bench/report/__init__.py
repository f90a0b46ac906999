"""Tables, plots and videos, made from rows and nothing else."""
