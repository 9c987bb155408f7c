"""Our own methods as benchmarks run them."""
