"""What a run shows of itself: pictures, plots and metrics."""
