"""Peers: methods of others, run for real, one file a method or family."""
