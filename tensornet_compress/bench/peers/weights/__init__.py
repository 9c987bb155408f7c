"""Peers that compress weights."""
