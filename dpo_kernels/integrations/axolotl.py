"""Trainers for axolotl's key ``trainer_cls``, which takes the path of a class.

    trainer_cls: dpo_kernels.integrations.axolotl.FusedAxolotlDPOTrainer

axolotl's own trainers are TRL's with mixins. Here the fused trainers stand between the two. A plugin of axolotl is not
the way: for preference training it drops the model from the trainer's arguments.
"""

from typing import Any

from dpo_kernels.integrations.requirements import require

require("axolotl", "0.19", "dpo_kernels.integrations.axolotl")

from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer  # noqa: E402

from dpo_kernels.integrations.trl import FusedDPOTrainer  # noqa: E402


class FusedAxolotlDPOTrainer(AxolotlDPOTrainer, FusedDPOTrainer):
    """axolotl's DPO trainer on the fused loss, for ``rl: dpo`` and ``rl: ipo``.

    Args:
        *args, **kwargs: as axolotl gives them to its own.

    Example::

        # in the YAML file
        rl: dpo
        trainer_cls: dpo_kernels.integrations.axolotl.FusedAxolotlDPOTrainer

    """


def __getattr__(name: str) -> Any:
    """Make the trainers for ``rl: orpo`` and ``rl: simpo`` when they are asked for: ``trl.experimental`` warns."""
    if name == "FusedAxolotlORPOTrainer":
        from axolotl.core.trainers import AxolotlORPOTrainer

        from dpo_kernels.integrations.trl import FusedORPOTrainer

        made = type(name, (AxolotlORPOTrainer, FusedORPOTrainer), {"__module__": __name__})
    elif name == "FusedAxolotlCPOTrainer":
        from axolotl.core.trainers import AxolotlCPOTrainer

        from dpo_kernels.integrations.trl import FusedCPOTrainer

        made = type(name, (AxolotlCPOTrainer, FusedCPOTrainer), {"__module__": __name__})
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made
    return made
