"""LLaMA-Factory's DPO and KTO trainers on one pass over the LM head, and the layout of its newer trainer.

    python -m dpo_kernels.integrations.llamafactory train dpo.yaml

does what ``llamafactory-cli train dpo.yaml`` does, with ``patch_llamafactory()`` before it. LLaMA-Factory is imported
when the patch is put on.
"""

from dpo_kernels.integrations.llamafactory.patch import patch_llamafactory, unpatch_llamafactory
from dpo_kernels.integrations.llamafactory.rows import pairs_in_rows

__all__ = ["pairs_in_rows", "patch_llamafactory", "unpatch_llamafactory"]
