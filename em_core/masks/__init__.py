"""How attention maps become masks: thresholds, competition, guards, resizing, the DenseCRF."""
