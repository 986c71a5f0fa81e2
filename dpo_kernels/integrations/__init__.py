"""Drop-ins for training stacks. Each module imports its stack (transformers, TRL, PEFT) and nothing imports them."""
