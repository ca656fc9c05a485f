"""Whole runs and what lasts of them: concept sets, keys, stores, the runner."""
