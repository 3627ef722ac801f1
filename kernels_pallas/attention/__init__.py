"""Attention: `api` is the door, `reference` the definition.

The bodies are `xla`, `tpu`, `gpu` (Triton), `cudnn` and `mosaic_gpu`; `choice` picks one.
"""
