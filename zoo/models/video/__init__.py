"""Video models."""
