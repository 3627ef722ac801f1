"""What every model of the zoo is: a Linen module that runs on any mesh."""

import flax.linen as nn

from zoo.layers.partition import on_any_mesh


class Model(nn.Module):
    """The base of models: `init` and `apply` run on meshes with Explicit axes, too."""

    init = nn.nowrap(on_any_mesh(nn.Module.init))
    apply = nn.nowrap(on_any_mesh(nn.Module.apply))
