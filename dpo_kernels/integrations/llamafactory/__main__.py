"""LLaMA-Factory's command line with the fused trainers: ``python -m dpo_kernels.integrations.llamafactory train ...``.

The arguments are those of ``llamafactory-cli``. Its launcher starts the processes of a distributed run from a file of
its own. Here it is told to start this module instead, so that every process has the patch.
"""

import os
import sys

from dpo_kernels.integrations.llamafactory import patch_llamafactory

MODULE = "dpo_kernels.integrations.llamafactory"


def main() -> None:
    """Put the patch on, and do as LLaMA-Factory's command line, or as one of the processes that it starts.

    Raises:
        ImportError: LLaMA-Factory is not installed, or too old.
        RuntimeError: this LLaMA-Factory is not known.

    Example::

        sys.argv = ["llamafactory-cli", "train", "dpo.yaml"]
        main()

    """
    patch_llamafactory()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started this process
        from llamafactory.train.tuner import run_exp

        if sys.argv[1:2] == ["train"]:
            del sys.argv[1]
        run_exp()
        return
    from llamafactory import cli, launcher

    launcher.__file__ = f"--module {MODULE}"  # it is put into the command line of torchrun
    cli.main()


if __name__ == "__main__":
    main()
