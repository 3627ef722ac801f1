"""Attention: `api` the door, `reference` the definition, `xla`, `tpu` and `gpu` the bodies."""
