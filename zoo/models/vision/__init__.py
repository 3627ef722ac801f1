"""Image backbones and classifiers."""
