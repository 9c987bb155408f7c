"""Products with coded numbers."""

__all__ = []
