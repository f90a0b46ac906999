"""ALOHA: tasks, simulator, scripted expert."""
