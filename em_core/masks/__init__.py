"""From attention maps to masks: thresholds, competition, guards, resizing, the DenseCRF."""
