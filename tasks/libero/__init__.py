"""LIBERO: tasks, simulator, scripted expert."""
