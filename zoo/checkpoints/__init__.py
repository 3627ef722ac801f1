"""Published checkpoints: reading their files safely, and rules from their names to ours and back.

- `files`: `.safetensors`, torch's `.pth/.pt/.bin` without torch, `.npz`, Hugging Face directories.
- `rules`: `Rule`, `Rules`, the transforms, `convert` and `export`.
- `runs`: the trainer's own checkpoints.
"""
