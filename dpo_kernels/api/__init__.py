"""The public functions: the contract of each, and a few calls into the layers below."""
