"""Systems of audio-like signals, of motion, and of mathematics."""
