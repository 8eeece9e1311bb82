"""Training of NesT from the command line: ``python -m nest_fast.train --data DIR``. Needs ``nest_fast[train]``.

``options`` (flags and recipes) ← ``data``, ``model``, ``distributed``, ``checkpoint``, ``log`` ← ``trainer`` ←
``__main__``. Data, augmentation, optimizer, schedule, losses and the moving average are timm's and torchvision's.
"""
