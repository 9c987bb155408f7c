"""What calibration learns of a model's cache."""
