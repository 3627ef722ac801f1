"""The axes of a device mesh, written once: kernels, models and trainer all take them from here.

They stand in this package because it imports nothing of `zoo`.
"""

BATCH_AXES = ("data", "fsdp")
"""What a batch is cut over; `fsdp` cuts parameters, too."""
HEAD_AXES = ("tensor",)
"""What heads, MLP channels and vocabularies are cut over."""
LENGTH_AXES = ("sequence",)
"""What the length of a sequence is cut over."""
AXES = (*BATCH_AXES, *HEAD_AXES, *LENGTH_AXES)
"""All of them, from the outermost of a mesh to the innermost."""
