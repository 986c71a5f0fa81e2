"""Work that is split over ranks. Only this package of the core imports ``torch.distributed``.

A ``VocabParallel`` says that the head is split along the vocabulary. It is a small value without an engine: every
collective is one of ``torch.distributed``, on the group that the caller has made. ``unsharded`` gathers a head that
FSDP2 or ZeRO-3 shards.
"""

from dpo_kernels.distributed.sharded_heads import unsharded
from dpo_kernels.distributed.vocab_parallel import VocabParallel

__all__ = ["VocabParallel", "unsharded"]
