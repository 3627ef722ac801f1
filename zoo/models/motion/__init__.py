"""Systems of human motion."""
