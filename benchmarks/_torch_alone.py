"""Lets timm be imported beside a CPU build of torch; import this module before timm.

torchvision's compiled ops do not load beside a torch from another source, and registering them
fails then. timm needs none of them, so here their registration does nothing.
"""

import torch

_register_fake = torch.library.register_fake


def _lenient(op, *args, **kwargs):
    if isinstance(op, str) and op.startswith("torchvision::"):
        return lambda function: function
    return _register_fake(op, *args, **kwargs)


torch.library.register_fake = _lenient
