"""Training steps compiled for chips that are not there, and what the programs say.

`chips` knows the slices, `compiler` runs XLA in a process of its own (`worker` is what runs there),
`hlo` and `flow` read the program that comes out, `flops` counts what was traced. `plan` puts their
figures together, `search` looks for a slice or a partition that fits, `report` and `budgets` write
a plan down for people and for tests.
"""
