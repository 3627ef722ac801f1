"""Attention in many small windows: `api` the door, `reference` the definition."""
