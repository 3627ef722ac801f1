"""Transformers of graphs."""
