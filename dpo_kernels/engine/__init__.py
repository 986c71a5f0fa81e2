"""A plan is carried out: ``run`` for callers, ``autograd`` and ``operators`` for torch, ``passes`` for the work."""
