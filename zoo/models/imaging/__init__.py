"""Models that make images: restoration, generation, composition."""
