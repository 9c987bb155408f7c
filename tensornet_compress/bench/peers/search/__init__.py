"""Peers that search or decompose one tensor."""
