"""Architectures: one file a system, grouped by field."""
