"""Peers that compress key-value caches: each turns plain states into what it would decode, and counts its bits."""
