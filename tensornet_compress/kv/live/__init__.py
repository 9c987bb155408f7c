"""Live mode: packed codes that attention contracts with."""
