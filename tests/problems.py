"""Small inputs and patterns that several tests share."""

import re

import torch

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def rand(*shape, **how):
    return torch.zeros(*shape, **how) if how.get("device") == "meta" else torch.rand(*shape).to(how.get("dtype", F32))


def whole(*values, dtype=torch.int64, **how):
    return torch.tensor(values, dtype=dtype, **how)


def says(words):
    """A pattern of these words; " ... " stands for anything."""
    return "(?s)" + ".*".join(re.escape(part) for part in words.split(" ... "))


META = {"device": "meta"}


def problem(trainable=True, pairs=4, length=16, vocab=512):
    labels = torch.randint(0, vocab, (2 * pairs, length))
    hidden = torch.randn(2 * pairs, length, 8, requires_grad=True)
    return hidden, torch.randn(vocab, 8, requires_grad=trainable), labels
