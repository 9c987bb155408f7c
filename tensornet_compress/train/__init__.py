"""Fitting what was compressed: propagation through blocks, thresholding, healing."""
