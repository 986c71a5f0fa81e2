"""Entry point of `python -m demo`: options in, exit code out; the heavy imports wait until Ctrl-C is covered."""

import os
import signal
import sys

INTERRUPTED = 130  # what a shell reports for a process ended by SIGINT


def main(argv: list[str] | None = None) -> int:
    """Run the demo and return its exit code: 0 done, 1 could not be done, 2 bad option, 130 interrupted."""
    # The only network access of the demo is pip's; transformers must not look anywhere for the model.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait in a busy loop take the cores that others need: with one other busy process on two cores a
    # training step took 22 s, and 3.5 s with threads that sleep. On quiet cores the two are equal (1.8 s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A background shell starts programs with SIGINT ignored; it should end this one all the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        from demo.options import parse_options

        options = parse_options(argv)
        # Importing torch and transformers takes seconds, in which Ctrl-C must not end in a traceback either.
        from demo.run import run

        return run(options)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
