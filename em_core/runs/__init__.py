"""Whole runs and what remains of them: the runner, concept sets, keys and stores."""
