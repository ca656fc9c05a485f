"""What a run shows: pictures, plots, metrics."""
