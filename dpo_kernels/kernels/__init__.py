"""Backends: what turns rows of hidden states into log-probs and gradients. They know no preference."""
