"""Drop-ins for training stacks: TRL, transformers with PEFT, and reference log-probs computed before training.

Each module imports the stack that it serves. The rest of the package imports none of them.
"""
