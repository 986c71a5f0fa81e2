"""The engine carries out a plan. ``run`` is for callers, ``autograd`` and ``operators`` for torch.

``passes`` does the work.
"""
