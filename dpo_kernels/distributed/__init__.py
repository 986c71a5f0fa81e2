"""Work that is split over ranks. Only this package of the core imports ``torch.distributed``.

``VocabParallel`` says that the head is split along the vocabulary, ``ContextParallel`` that the tokens of each sequence
are. Both are small values without an engine: every collective is one of ``torch.distributed``, on the caller's group.
``unsharded`` gathers a head that FSDP2 or ZeRO-3 shards.
"""

from dpo_kernels.distributed.context_parallel import ContextParallel
from dpo_kernels.distributed.sharded_heads import unsharded
from dpo_kernels.distributed.vocab_parallel import VocabParallel

__all__ = ["ContextParallel", "VocabParallel", "unsharded"]
