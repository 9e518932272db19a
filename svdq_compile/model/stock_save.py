"""diffusers' ``save_pretrained`` of a model that holds quantised weights: refused before it touches a folder.

It would rewrite config.json and delete the shards that lie there, and then fail to write weights it cannot see into.
"""

from __future__ import annotations

import functools
import types

from torch import nn

from ..errors import SaveError
from ..ops.weight import SVDQWeight


def guard(model: nn.Module) -> None:
    """Makes a model refuse ``save_pretrained`` for as long as it has a quantised weight."""
    stock = getattr(type(model), "save_pretrained", None)
    if stock is None:
        return

    # Under the stock method's name, which pickling asks for, and with its signature, which pipelines look at.
    @functools.wraps(stock)
    def save_pretrained(self, save_directory, *args, **kwargs):
        quantised = [name for name, parameter in self.named_parameters() if isinstance(parameter, SVDQWeight)]
        if not quantised:
            return stock(self, save_directory, *args, **kwargs)
        raise SaveError(
            f"save_pretrained cannot write quantised weights, of which the model has {len(quantised)}",
            file=save_directory,
            key=quantised[0],
            hint="svdq_compile.save_checkpoint(model, folder) writes them as they were exported; nothing was touched",
        )

    model.save_pretrained = types.MethodType(save_pretrained, model)
