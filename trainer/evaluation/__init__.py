"""Metrics, calibration and thresholds, in NumPy alone."""
