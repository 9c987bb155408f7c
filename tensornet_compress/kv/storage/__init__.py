"""Storage mode: entropy-coded blocks of all layers together."""
