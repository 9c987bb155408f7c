"""Benchmarks against peers at equal bytes: weights, caches, search and speed, on bundled or one's own inputs."""
