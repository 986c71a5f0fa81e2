"""Bad input: the kind of exception and the words in it, one line a case; and what is not an error."""

import inspect
import math
import re
from functools import partial

import pytest
import torch

from dpo_kernels import (
    FusedDPOLoss,
    dpo_loss,
    explain,
    fused_dpo_loss,
    fused_sequence_logps,
    fused_token_logps,
    losses,
)
from dpo_kernels.kernels import installed
from dpo_kernels.losses import LOSSES, LossSpec
from tests.problems import BF16, F32, F64, META, rand, says, whole
from tests.small import STRATEGIES

S, T, H, V = 4, 3, 5, 7
LABELS = [[1, 2, 3], [-100, 4, 5], [6, 0, -100], [3, 2, 1]]


def marked(value, *place, dtype=torch.int64):
    """The labels with one of them replaced."""
    labels = torch.tensor(LABELS, dtype=dtype)
    labels[place] = value
    return labels


class DTensor(torch.Tensor):
    """Goes by the name of torch.distributed's."""


def valid():
    return {
        "hidden": rand(S, T, H),
        "weight": rand(V, H),
        "labels": torch.tensor(LABELS),
        "ref_logps": -rand(S),
    }


def packed(**changes):
    """A valid packed problem of four sequences of three tokens, changed."""
    cu_seqlens = torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32)
    return {"hidden": rand(12, H), "labels": torch.tensor(LABELS).view(-1), "cu_seqlens": cu_seqlens} | changes


def scored_here(**changes):
    """A reference to be scored instead of a cached one, changed."""
    return {"ref_logps": None, "ref_hidden": rand(S, T, 4), "ref_weight": rand(V, 4)} | changes


def by_token(**changes):
    """A reference that is cached by token, changed."""
    return {"ref_logps": None, "ref_token_logps": -rand(S, T)} | changes


def over_rows(**changes):
    """Labels that share two rows of the hidden states, changed."""
    return {"hidden": rand(2, H), "rows": torch.arange(S * T).view(S, T) % 2} | changes


def a_callable(x):
    return x.policy_rejected_logps - x.policy_chosen_logps


# Shapes, values and combinations; case: (what is changed in a valid call, words of the message).
VALUE_ERRORS = {
    "denominator tensor 0": ({"denominator": torch.tensor(0.0)}, "denominator must be > 0, got 0.0"),
    "denominator tensor NaN": ({"denominator": torch.tensor(torch.nan)}, "denominator must be > 0, got nan"),
    "denominator elsewhere": (
        {"denominator": torch.tensor(3.0, device="meta")},
        "denominator is on meta but hidden is on cpu",
    ),
    "H of 0": ({"hidden": rand(S, T, 0), "weight": rand(V, 0)}, "weight must have ... H >= 1, got (7, 0)"),
    "ignore_index beyond 64 bits": ({"ignore_index": 2**70}, "ignore_index must fit 64 bits"),
    # hidden
    "hidden 2-D without cu_seqlens": ({"hidden": rand(12, H)},
        "hidden must have shape (2B, T, H) ... cu_seqlens ... (12, 5) without cu_seqlens"),
    "hidden 4-D": ({"hidden": rand(1, S, T, H)}, "hidden must have shape ... (1, 4, 3, 5)"),
    "hidden 3-D with cu_seqlens": (packed(hidden=rand(S, T, H)),
        "hidden must have shape (N, H) ... cu_seqlens ... (4, 3, 5)"),
    "odd number of sequences": ({"hidden": rand(3, T, H), "labels": whole(*LABELS[:3]), "ref_logps": rand(3)},
        "even number of sequences ... got 3 ... hidden (3, 3, 5)"),
    "odd number of sequences, packed": (packed(cu_seqlens=whole(0, 3, 6, 12)), "even number of sequences ... got 3"),
    # weight and bias
    "H mismatch": ({"weight": rand(V, H + 1)},
        "weight has H = 6 (shape (7, 6)) ... hidden has H = 5 (shape (4, 3, 5))"),
    "weight 1-D": ({"weight": rand(H)}, "weight must have shape (V, H) ... got (5,)"),
    "weight without rows": ({"weight": rand(0, H)}, "weight must have shape (V, H) with V >= 1 ... got (0, 5)"),
    "bias shape": ({"bias": rand(V + 1)}, "bias has shape (8,) ... expected (7,) ... weight (7, 5)"),
    "bias 2-D": ({"bias": rand(V, 1)}, "bias has shape (7, 1) ... expected (7,)"),
    # devices
    "hidden elsewhere": ({"hidden": rand(S, T, H, **META)},
        "weight is on cpu but hidden is on meta: hidden has no values"),
    "weight elsewhere": ({"weight": rand(V, H, **META)}, "weight is on meta but hidden is on cpu: weight has no values"
        " ... offloaded ... within the model's forward, or load the model without offloading"),
    "bias elsewhere": ({"bias": rand(V, **META)}, "bias is on meta but hidden is on cpu"),
    "labels elsewhere": ({"labels": whole(*LABELS, **META)}, "labels is on meta but hidden is on cpu"),
    "cu_seqlens elsewhere": (packed(cu_seqlens=whole(0, 3, 6, 9, 12, **META)), "cu_seqlens is on meta"),
    "token_weights elsewhere": ({"token_weights": rand(S, T, **META)}, "token_weights is on meta"),
    "ref_logps elsewhere": ({"ref_logps": rand(S, **META)}, "ref_logps is on meta but hidden is on cpu"),
    "ref_hidden elsewhere": (scored_here(ref_hidden=rand(S, T, 4, **META)), "ref_hidden is on meta"),
    "ref_weight elsewhere": (scored_here(ref_weight=rand(V, 4, **META)), "ref_weight is on meta"),
    "ref_bias elsewhere": (scored_here(ref_bias=rand(V, **META)), "ref_bias is on meta"),
    # labels
    "labels shape": ({"labels": whole(*LABELS)[:, :2]},
        "labels has shape (4, 2) ... expected (4, 3) ... hidden (4, 3, 5)"),
    "labels flat": ({"labels": whole(*LABELS).view(-1)}, "labels has shape (12,) ... expected (4, 3)"),
    "labels not packed": (packed(labels=whole(*LABELS)), "labels has shape (4, 3) ... expected (12,)"),
    "label V": ({"labels": marked(V, 2, 1)},
        "labels[2, 1] = 7 is outside [0, 7) ... weight has 7 rows ... ignore_index = -100"),
    "label V, int32": ({"labels": marked(V, 3, 0, dtype=torch.int32)}, "labels[3, 0] = 7 is outside [0, 7)"),
    "label -1": ({"labels": marked(-1, 0, 2)}, "labels[0, 2] = -1 is outside [0, 7) ... ignore_index = -100"),
    "label far away": ({"labels": marked(2**40, 0, 0)}, "labels[0, 0] = 1099511627776 is outside [0, 7)"),
    "label -100 of another ignore_index": ({"ignore_index": -1},
        "labels[1, 0] = -100 is outside [0, 7) ... ignore_index = -1"),
    "label V, packed": (packed(labels=marked(V, 1, 1).view(-1)), "labels[4] = 7 is outside [0, 7)"),
    "label V, shifted": ({"labels": marked(V, 2, 1), "shift": True}, "labels[2, 1] = 7 is outside [0, 7)"),
    "label V at the end, shifted": ({"labels": marked(V, 1, 2), "shift": True}, "labels[1, 2] = 7 is outside [0, 7)"),
    "label V, packed and shifted": (packed(labels=marked(V, 1, 1).view(-1), shift=True),
        "labels[4] = 7 is outside [0, 7)"),
    # cu_seqlens
    "cu_seqlens 2-D": (packed(cu_seqlens=whole([0, 3, 6, 9, 12])),
        "cu_seqlens must have shape (S + 1,) ... got (1, 5)"),
    "cu_seqlens empty": (packed(cu_seqlens=torch.empty(0, dtype=torch.int32)),
        "cu_seqlens must have shape (S + 1,) ... got (0,)"),
    "cu_seqlens not from 0": (packed(cu_seqlens=whole(1, 3, 6, 9, 12)),
        "cu_seqlens must rise from 0 to N = 12 ... got [1, 3, 6, 9, 12]"),
    "cu_seqlens short of N": (packed(cu_seqlens=whole(0, 3, 6, 9, 11)),
        "cu_seqlens must rise from 0 to N = 12 ... got [0, 3, 6, 9, 11]"),
    "cu_seqlens past N": (packed(cu_seqlens=whole(0, 3, 6, 9, 13)), "cu_seqlens must rise from 0 to N = 12"),
    "cu_seqlens falling": (packed(cu_seqlens=whole(0, 6, 3, 9, 12)),
        "cu_seqlens must rise ... without falling ... [0, 6, 3, 9, 12]"),
    # token_weights and the logits' options
    "token_weights shape": ({"token_weights": rand(S, T + 1)}, "token_weights has shape (4, 4) ... labels (4, 3)"),
    "softcap 0": ({"softcap": 0.0}, "softcap must be > 0 or None ... got 0.0"),
    "softcap negative": ({"softcap": -30.0}, "softcap must be > 0 or None ... got -30.0"),
    "softcap inf": ({"softcap": math.inf}, "softcap must be finite ... got inf"),
    "logit_scale NaN": ({"logit_scale": math.nan}, "logit_scale must be finite ... got nan"),
    "logit_scale inf": ({"logit_scale": -math.inf}, "logit_scale must be finite ... got -inf"),
    # the reference
    "no reference": ({"ref_logps": None},
        "'sigmoid' ... needs a reference and got none ... ref_hidden, ref_logps or ... reference_free=True"),
    "no reference for ipo": ({"ref_logps": None, "loss_type": "ipo"},
        "'ipo' ... needs a reference and got none ... ref_hidden, ref_logps or ... reference_free=True"),
    "two references": ({"ref_hidden": rand(S, T, H)}, "ref_hidden and ref_logps are both given ... pass one"),
    "reference_free with ref_logps": ({"reference_free": True}, "reference_free=True and ref_logps exclude each other"),
    "reference_free with ref_hidden": (scored_here(reference_free=True),
        "reference_free=True and ref_hidden exclude each other"),
    "ref_logps shape": ({"ref_logps": rand(2)},
        "ref_logps has shape (2,) ... expected (4,) ... in the order of the input"),
    "ref_logps by pair": ({"ref_logps": rand(2, 2)}, "ref_logps has shape (2, 2) ... expected (4,)"),
    "two cached references": ({"ref_token_logps": -rand(S, T)},
        "ref_logps and ref_token_logps are both given ... pass one"),
    "reference_free with ref_token_logps": (by_token(reference_free=True),
        "reference_free=True and ref_token_logps exclude each other"),
    "ref_token_logps shape": (by_token(ref_token_logps=-rand(S)),
        "ref_token_logps has shape (4,) ... labels (4, 3) ... one for each label"),
    "ref_token_logps elsewhere": (by_token(ref_token_logps=rand(S, T, **META)),
        "ref_token_logps is on meta but hidden is on cpu"),
    "ref_token_logps for a loss without a reference": (by_token(loss_type="simpo"),
        "ref_token_logps is given, but the loss 'simpo' has no reference"),
    "ref_weight without ref_hidden": ({"ref_weight": rand(V, H)}, "ref_weight is given without ref_hidden"),
    "ref_bias without ref_hidden": ({"ref_bias": rand(V)}, "ref_bias is given without ref_hidden"),
    "ref_hidden shape": (scored_here(ref_hidden=rand(S, T + 1, 4)),
        "ref_hidden has shape (4, 4, 4) ... hidden (4, 3, 5)"),
    "ref_hidden 2-D": (scored_here(ref_hidden=rand(12, 4)), "ref_hidden has shape (12, 4) ... hidden (4, 3, 5)"),
    "ref_weight of another H": (scored_here(ref_weight=rand(V, 6)), "ref_weight has H = 6 ... ref_hidden has H = 4"),
    "ref_hidden of another H, shared head": (scored_here(ref_weight=None),
        "ref_weight=None ... H = 5 ... ref_hidden has H = 4"),
    "ref_weight of another V": (scored_here(ref_weight=rand(V + 2, 4)),
        "ref_weight has V = 9 ... weight has V = 7 ... labels are shared"),
    "ref_bias shape": (scored_here(ref_bias=rand(V + 1)), "ref_bias has shape (8,) ... expected (7,)"),
    # rows
    "rows with a shift": (over_rows(shift=True), "rows says which row predicts each label ... leave shift=False"),
    "rows without their hidden": (over_rows(hidden=rand(S, T, H)), "hidden must have shape (M, H) ... (4, 3, 5)"),
    "rows of another shape": (over_rows(rows=whole(*LABELS)[:, :2]),
        "labels has shape (4, 3), expected (4, 2) to match rows (4, 2)"),
    "rows packed without cu_seqlens": (over_rows(rows=whole(*range(4))),
        "rows has shape (4,), expected (2B, T) without cu_seqlens"),
    "rows padded with cu_seqlens": (over_rows(cu_seqlens=whole(0, 3, 6, 9, 12)),
        "rows has shape (4, 3), expected (N,) with cu_seqlens"),
    "rows elsewhere": (over_rows(rows=torch.zeros(S, T, dtype=torch.int64, **META)),
        "rows is on meta but hidden is on cpu"),
    "rows and another ref_hidden": (over_rows(ref_logps=None, ref_hidden=rand(S, T, 4), ref_weight=rand(V, 4)),
        "ref_hidden has shape (4, 3, 4), expected that of hidden (2, 5)"),
    # the KL divergence from the reference
    "kl of a cached reference": ({"stats": ("kl",)},
        "stats='kl' needs the KL divergence ... give ref_hidden, and ref_weight ... not enough"),
    "kl of a reference by token": (by_token(loss_type="tdpo1"),
        "the loss 'tdpo1' needs the KL divergence ... give ref_hidden"),
    "kl without a reference": ({"ref_logps": None, "reference_free": True, "loss_type": "tdpo2"},
        "the loss 'tdpo2' needs the KL divergence ... give ref_hidden"),
    "kl of a sample": (scored_here(loss_type=("sigmoid", "tdpo1"), gradient="sparse"),
        "the loss 'sigmoid+tdpo1' does not go with gradient='sparse'"),
    "kl by streaming": (scored_here(loss_type="tdpo1", strategy="streaming"),
        "strategy='streaming' cannot run this: a KL divergence needs whole rows of both heads' logits"),
    "kl by frozen_head": (scored_here(loss_type="tdpo1", strategy="frozen_head"),
        "strategy='frozen_head' cannot run this: it keeps the derivatives of log-probs"),
    "kl in too small a scratch": (scored_here(loss_type="tdpo1", scratch_bytes=73),
        "scratch_bytes=73 is less than the 74 bytes that one row of both heads' logits needs"),
    "tdpo_alpha negative": (scored_here(loss_type="tdpo2", tdpo_alpha=-0.5),
        "tdpo_alpha must lie in [0.0, ... got -0.5"),
    "tdpo_alpha for tdpo1": (scored_here(loss_type="tdpo1", tdpo_alpha=0.5),
        "tdpo_alpha is not an option of the loss 'tdpo1' ... it has: none"),
    # the loss
    "loss_type unknown": ({"loss_type": "dpo"},
        "unknown loss_type 'dpo' ... known: ... hinge ... ipo ... sigmoid ... callable"),
    "beta NaN": ({"beta": math.nan}, "beta must be finite ... got nan"),
    "beta inf": ({"beta": math.inf}, "beta must be finite ... got inf"),
    "beta negative": ({"beta": -0.1}, "beta must be >= 0 ... got -0.1"),
    "beta 0 for ipo": ({"loss_type": "ipo", "beta": 0.0}, "beta must be > 0 for ipo ... got 0.0"),
    "label_smoothing above": ({"label_smoothing": 0.6}, "label_smoothing must lie in [0.0, 0.5] ... got 0.6"),
    "label_smoothing below": ({"label_smoothing": -0.1}, "label_smoothing must lie in [0.0, 0.5] ... got -0.1"),
    "label_smoothing NaN": ({"label_smoothing": math.nan}, "label_smoothing must be finite ... got nan"),
    "label_smoothing for hinge": ({"label_smoothing": 0.1, "loss_type": "hinge"},
        "label_smoothing is not an option of the loss 'hinge' ... it has: none"),
    "label_smoothing for a callable": ({"label_smoothing": 0.1, "loss_type": a_callable},
        "label_smoothing is not an option of the loss 'a_callable'"),
    "no such option": ({"temperature": 1.0},
        "temperature is not an option of the loss 'sigmoid' ... it has: label_smoothing"),
    "no such option for ipo": ({"gamma": 1.0, "loss_type": "ipo"},
        "gamma is not an option of the loss 'ipo' ... it has: none"),
    # reduction
    "reduction unknown": ({"reduction": "avg"}, "unknown reduction 'avg' ... known: mean, sum, none"),
    "reduction None": ({"reduction": None}, "unknown reduction None ... known: mean, sum, none"),
    "denominator with sum": ({"reduction": "sum", "denominator": 2.0},
        "denominator goes with reduction='mean' only ... 'sum'"),
    "denominator with none": ({"reduction": "none", "denominator": 2.0},
        "denominator goes with reduction='mean' only ... 'none'"),
    "denominator 1-d": ({"denominator": torch.tensor([2.0])},
        "denominator must be a number or a 0-d tensor ... got shape (1,)"),
    "denominator 0": ({"denominator": 0}, "denominator must be > 0 ... got 0"),
    "denominator negative": ({"denominator": -2.0}, "denominator must be > 0 ... got -2.0"),
    "denominator NaN": ({"denominator": math.nan}, "denominator must be finite ... got nan"),
    "empty batch": ({"hidden": rand(0, T, H), "labels": whole(*LABELS)[:0], "ref_logps": rand(0)},
        "empty batch ... reduction='mean' ... use 'sum' or give a denominator"),
    "empty batch, packed": (packed(hidden=rand(0, H), labels=whole(), cu_seqlens=whole(0), ref_logps=rand(0)),
        "empty batch ... reduction='mean'"),
    # how to run
    "pairs unknown": ({"pairs": "zipped"}, "unknown pairs 'zipped' ... known: stacked, interleaved"),
    "stats unknown": ({"stats": ("entropy", "top5")},
        "unknown stats 'top5' ... known: entropy, mean_logits, top1, log_sum_p2, kl, token_logps"),
    "backend unknown": ({"backend": "cutlass"}, "unknown backend 'cutlass' ... known: auto, triton, cuda, cpp, torch"),
    "backend triton": ({"backend": "triton", **{n: valid()[n].double() for n in ("hidden", "weight")}},
        "backend='triton' cannot run this: ... float64"),
    "backend cuda": ({"backend": "cuda"}, "backend='cuda' cannot run this: hidden is on cpu"),
    "strategy unknown": ({"strategy": "tiled"},
        "unknown strategy 'tiled' ... known: auto, chunked, frozen_head, recompute, streaming"),
    "scratch_bytes negative": ({"scratch_bytes": -1}, "scratch_bytes must be at least 0 ... got -1"),
    "scratch too small for chunked": ({"scratch_bytes": 10, "strategy": "chunked"},
        "strategy='chunked' cannot run this ... scratch_bytes=10 is less than the ... one row of logits"),
    "scratch too small for recompute": ({"scratch_bytes": 10, "strategy": "recompute"},
        "strategy='recompute' cannot run this ... scratch_bytes=10"),
    "max_scored_tokens 0": ({"max_scored_tokens": 0}, "max_scored_tokens must be at least 1 ... got 0"),
    "chunked with a coupled callable": ({"strategy": "chunked", "loss_type": a_callable},
        "strategy='chunked' cannot run this ... coupled over the batch"),
}  # fmt: skip

# Dtypes and types.
TYPE_ERRORS = {
    "reference_free a str": ({"reference_free": "no"}, "reference_free must be a bool, got str"),
    "weight sparse": ({"weight": rand(V, H).to_sparse()}, "weight must be a dense tensor, got layout torch.sparse_coo"),
    "hidden int64": ({"hidden": torch.ones(S, T, H, dtype=torch.int64)}, "hidden must be float32 ... got torch.int64"),
    "hidden complex": ({"hidden": rand(S, T, H, dtype=torch.complex64)},
        "hidden must be float32 ... got torch.complex64"),
    "hidden a list": ({"hidden": [[[0.0]]]}, "hidden must be a tensor ... got list"),
    "weight int32": ({"weight": torch.ones(V, H, dtype=torch.int32)}, "weight must be float32 ... got torch.int32"),
    "weight a DTensor": ({"weight": rand(V, H).as_subclass(DTensor)},
        "weight is a DTensor of shape (7, 5) ... attach() ... unsharded(head) ... VocabParallel.of(weight)"),
    "hidden a DTensor": ({"hidden": rand(S, T, H).as_subclass(DTensor)}, "hidden is a DTensor ... gather it"),
    "bias int64": ({"bias": torch.ones(V, dtype=torch.int64)}, "bias must be float32 ... got torch.int64"),
    "weight of another dtype": ({"weight": rand(V, H, dtype=BF16)},
        "hidden is torch.float32 but weight is torch.bfloat16 ... cast one of them ... autocast"),
    "hidden float64": ({"hidden": rand(S, T, H, dtype=F64)}, "hidden is torch.float64 but weight is torch.float32"),
    "bias of another dtype": ({"bias": rand(V, dtype=BF16)}, "hidden is torch.float32 but bias is torch.bfloat16"),
    "reference of mixed dtypes": (scored_here(ref_weight=rand(V, 4, dtype=BF16)),
        "ref_hidden is torch.float32 but ref_weight is torch.bfloat16"),
    "labels bool": ({"labels": torch.ones(S, T, dtype=torch.bool)}, "labels must be int32 or int64 ... got torch.bool"),
    "labels float32": ({"labels": torch.ones(S, T)}, "labels must be int32 or int64 ... got torch.float32"),
    "labels uint8": ({"labels": torch.ones(S, T, dtype=torch.uint8)},
        "labels must be int32 or int64 ... got torch.uint8"),
    "labels a list": ({"labels": LABELS}, "labels must be a tensor ... got list"),
    "ignore_index a float": ({"ignore_index": -100.0}, "ignore_index must be an integer ... got float"),
    "shift an int": ({"shift": 1}, "shift must be a bool ... got int"),
    "cu_seqlens float32": (packed(cu_seqlens=torch.tensor([0.0, 3, 6, 9, 12])),
        "cu_seqlens must be int32 or int64 ... got torch.float32"),
    "cu_seqlens a list": (packed(cu_seqlens=[0, 3, 6, 9, 12]), "cu_seqlens must be a tensor ... got list"),
    "token_weights int64": ({"token_weights": torch.ones(S, T, dtype=torch.int64)},
        "token_weights must be floating point ... got torch.int64"),
    "token_weights a list": ({"token_weights": [1.0]}, "token_weights must be a tensor ... got list"),
    "softcap a bool": ({"softcap": True}, "softcap must be a real number ... got bool"),
    "logit_scale a str": ({"logit_scale": "1"}, "logit_scale must be a real number ... got str"),
    "ref_logps int64": ({"ref_logps": torch.ones(S, dtype=torch.int64)},
        "ref_logps must be floating point ... got torch.int64"),
    "rows of floats": (over_rows(rows=rand(S, T)), "rows must be int32 or int64 ... got torch.float32"),
    "rows and hidden a list": (over_rows(hidden=[[0.0] * H] * 2), "hidden must be a tensor, got list"),
    "rows a list": (over_rows(rows=[[0] * T] * S), "rows must be a tensor, got list"),
    "kl of other widths": (scored_here(ref_hidden=rand(S, T, 4).double(), ref_weight=rand(V, 4).double(),
        stats=("kl",)), "stats='kl' needs logits of one dtype ... torch.float64 ... torch.float32"),
    "ref_token_logps int64": (by_token(ref_token_logps=torch.ones(S, T, dtype=torch.int64)),
        "ref_token_logps must be floating point ... got torch.int64"),
    "ref_logps a list": ({"ref_logps": [0.0] * 4}, "ref_logps must be a tensor ... got list"),
    "ref_hidden int64": (scored_here(ref_hidden=torch.ones(S, T, 4, dtype=torch.int64)), "ref_hidden must be float32"),
    "loss_type a number": ({"loss_type": 3}, "loss_type must be a name or a callable ... got int"),
    "beta a str": ({"beta": "0.1"}, "beta must be a real number ... got str"),
    "beta a bool": ({"beta": True}, "beta must be a real number ... got bool"),
    "beta a tensor": ({"beta": torch.tensor(0.1)}, "beta must be a real number ... got Tensor"),
    "label_smoothing a str": ({"label_smoothing": "0"}, "label_smoothing must be a real number"),
    "denominator a bool": ({"denominator": True}, "denominator must be a real number ... got bool"),
    "denominator a bool tensor": ({"denominator": torch.tensor(True)},
        "denominator must be a real number ... torch.bool"),
    "denominator a str": ({"denominator": "2"}, "denominator must be a real number ... got str"),
    "stats a str": ({"stats": "entropy"}, "stats must be a tuple of names ... got str"),
    "scratch_bytes a str": ({"scratch_bytes": "2GiB"}, "scratch_bytes must be an integer or None ... got str"),
    "scratch_bytes a float": ({"scratch_bytes": 1e9}, "scratch_bytes must be an integer or None ... got float"),
    "max_scored_tokens a bool": ({"max_scored_tokens": True},
        "max_scored_tokens must be an integer or None ... got bool"),
}  # fmt: skip

BAD = {case: (*row, ValueError) for case, row in VALUE_ERRORS.items()}
BAD |= {case: (*row, TypeError) for case, row in TYPE_ERRORS.items()}


def module(hidden, weight, labels, **options):
    """The call in its module form."""
    tensors = {
        name: options.pop(name) for name in inspect.signature(FusedDPOLoss.forward).parameters if name in options
    }
    return FusedDPOLoss(**options)(hidden, weight, labels, **tensors)


@pytest.mark.parametrize("function", [fused_dpo_loss, explain, module])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, function):
    changes, words, kind = BAD[case]
    with pytest.raises(kind, match=says(words)):
        function(**valid() | changes)


def test_a_head_that_deepspeed_has_partitioned_is_named():
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id = 1
    with pytest.raises(ValueError, match=says("weight must have shape (V, H) ... got (0,): DeepSpeed ZeRO-3")):
        fused_dpo_loss(**valid() | {"weight": weight})


PRIMITIVES = (fused_sequence_logps, fused_token_logps)
SHARED = [
    (function, case)
    for function in PRIMITIVES
    for case in BAD
    if BAD[case][0].keys() <= inspect.signature(function).parameters.keys() and not case.startswith("odd")
]


@pytest.mark.parametrize(("function", "case"), SHARED, ids=lambda value: getattr(value, "__name__", value))
def test_bad_input_of_the_primitives(function, case):
    changes, words, kind = BAD[case]
    base = {name: value for name, value in valid().items() if name != "ref_logps"}
    with pytest.raises(kind, match=says(words)):
        function(**base | changes)


def test_what_the_tables_change_is_all_that_is_wrong():
    """The valid inputs pass, in each form, and one more sequence is one more log-prob."""
    assert fused_dpo_loss(**valid()).loss.isfinite()
    assert fused_dpo_loss(**valid() | packed()).loss.isfinite()
    assert fused_dpo_loss(**valid() | scored_here(ref_bias=rand(V))).loss.isfinite()
    odd = fused_sequence_logps(rand(3, T, H), rand(V, H), whole(*LABELS[:3]))
    assert odd.shape == (3,)
    assert (odd < 0).all()


@pytest.mark.parametrize("found", [False, True])
def test_triton_says_what_is_missing(monkeypatch, found):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: object() if found else None)
    monkeypatch.setattr(installed, "triton_version", installed.triton_version.__wrapped__)
    words = "hidden is on cpu ... CUDA" if found else "triton is not installed"
    with pytest.raises(ValueError, match=says(f"backend='triton' cannot run this: ... {words}")):
        fused_dpo_loss(**valid(), backend="triton")
    assert explain(**valid()).backend != "triton"


def test_every_name_of_the_family_is_listed():
    with pytest.raises(ValueError, match=says(" ... ".join(sorted(LOSSES)))):
        fused_dpo_loss(**valid(), loss_type="nope")


def test_label_errors_leave_unscored_places_alone():
    """With shift the first label of a sequence is predicted by nothing, so it is not looked at."""
    inputs = valid() | {"labels": marked(V, 2, 0)}
    got = fused_dpo_loss(**inputs, shift=True).loss
    torch.testing.assert_close(got, fused_dpo_loss(**inputs | {"labels": marked(-100, 2, 0)}, shift=True).loss)


CONSTRUCTION = [
    "loss_type unknown", "loss_type a number", "beta NaN", "beta negative", "beta a str", "beta 0 for ipo",
    "label_smoothing above", "label_smoothing for hinge", "no such option", "reduction unknown", "pairs unknown",
    "stats unknown", "stats a str", "backend unknown", "strategy unknown", "scratch_bytes negative",
    "scratch_bytes a str", "max_scored_tokens 0", "ignore_index a float", "shift an int",
    "reference_free a str", "softcap negative", "logit_scale NaN",
]  # fmt: skip


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_the_module_refuses_at_construction(case):
    changes, words, kind = BAD[case]
    with pytest.raises(kind, match=says(words)):
        FusedDPOLoss(**changes)


@pytest.mark.parametrize("given", ["ref_logps", "ref_hidden"])
def test_a_reference_for_a_loss_without_one(monkeypatch, given):
    spec = LossSpec("odds", lambda x: x.policy_rejected_logps - x.policy_chosen_logps, needs_reference=False)
    monkeypatch.setitem(losses.LOSSES, "odds", spec)
    inputs = valid() if given == "ref_logps" else valid() | scored_here()
    with pytest.raises(ValueError, match=says(f"{given} is given ... 'odds' has no reference ... leave it out")):
        fused_dpo_loss(**inputs, loss_type="odds")
    with pytest.raises(ValueError, match=says("ref_chosen_logps is given ... 'odds' has no reference ... pass None")):
        dpo_loss(rand(2), rand(2), rand(2), rand(2), loss_type="odds")
    out = fused_dpo_loss(**valid() | {"ref_logps": None}, loss_type="odds", reduction="none")
    torch.testing.assert_close(out.loss, out.rejected_logps - out.chosen_logps)


@pytest.mark.parametrize("other", [BF16, F32])
def test_mixed_dtypes_are_accepted_under_autocast(other):
    inputs = valid() | {"weight": rand(V, H, dtype=other), "bias": rand(V)}
    with torch.autocast("cpu", dtype=BF16):
        got = fused_dpo_loss(**inputs).loss
    rounded = {name: inputs[name].to(BF16) for name in ("hidden", "weight", "bias")}
    torch.testing.assert_close(got, fused_dpo_loss(**inputs | rounded).loss, rtol=0, atol=0)


def test_autocast_does_not_narrow_float64():
    with torch.autocast("cpu", dtype=BF16), pytest.raises(TypeError, match=says("torch.float64 ... torch.float32")):
        fused_dpo_loss(**valid() | {"hidden": rand(S, T, H, dtype=F64)})


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_the_minimum_scratch_of_chunked_is_exact(dtype, trainable):
    inputs = valid() | {"hidden": rand(S, T, H, dtype=dtype), "weight": rand(V, H, dtype=dtype)}
    inputs["weight"].requires_grad_(trainable)
    with pytest.raises(ValueError, match=says("less than the ... bytes")) as raised:
        fused_dpo_loss(**inputs, strategy="chunked", scratch_bytes=1)
    least = int(re.search(r"the (\d+) bytes", str(raised.value)).group(1))
    with pytest.raises(ValueError, match=f"scratch_bytes={least - 1} is less than the {least} bytes"):
        fused_dpo_loss(**inputs, strategy="chunked", scratch_bytes=least - 1)
    got = fused_dpo_loss(**inputs, strategy="chunked", scratch_bytes=least).loss
    torch.testing.assert_close(got, fused_dpo_loss(**inputs).loss)
    # auto cuts the vocabulary instead.
    torch.testing.assert_close(fused_dpo_loss(**inputs, scratch_bytes=least - 1).loss, got)


def test_chunked_wants_more_than_per_pair_upstreams_of_a_trainable_head():
    inputs = valid()
    inputs["weight"].requires_grad_()
    with pytest.raises(ValueError, match=says("strategy='chunked' cannot run ... reduction='none' ... the head wants")):
        fused_dpo_loss(**inputs, strategy="chunked", reduction="none")


RETURNS = {
    "a float": (lambda x: 1.0, TypeError, "must return a tensor ... got float"),
    "a scalar": (lambda x: a_callable(x).sum(), ValueError, "one loss per pair ... shape (2,) ... got ()"),
    "too many": (lambda x: torch.zeros(4), ValueError, "one loss per pair ... shape (2,) ... got (4,)"),
}


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("case", RETURNS)
def test_what_a_callable_must_not_return(case, trainable, separable):
    function, kind, words = RETURNS[case]
    function = partial(function)
    function.separable = separable
    function.__name__ = "mine"
    inputs = valid()
    inputs["weight"].requires_grad_(trainable)
    with pytest.raises(kind, match=says(f"loss_type: mine ... {words}")):
        fused_dpo_loss(**inputs, loss_type=function)
    with pytest.raises(kind, match=says(f"loss_type: mine ... {words}")):
        dpo_loss(rand(2), rand(2), rand(2), rand(2), loss_type=function)


def test_a_separable_callable_trains_nothing_of_its_own():
    factor = torch.tensor(2.0, requires_grad=True)

    def learned(x):
        return factor * a_callable(x)

    inputs = valid()
    inputs["weight"].requires_grad_()
    out = fused_dpo_loss(**inputs, loss_type=learned)
    out.loss.backward()
    torch.testing.assert_close(factor.grad, (out.rejected_logps - out.chosen_logps).mean())
    learned.separable = True
    with pytest.raises(
        ValueError, match=says("learned is marked separable ... shape () ... detach it ... `separable` unset")
    ):
        fused_dpo_loss(**inputs, loss_type=learned)


EMPTY = {
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "denominator": {"denominator": 3.0},
    "denominator tensor": {"denominator": torch.tensor(3.0)},
}


# chunked refuses per-pair upstreams of a trainable head.
EMPTY_RUNS = [(c, s) for c in EMPTY for s in ("auto", *STRATEGIES) if (c, s) != ("none", "chunked")]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("case", "strategy"), EMPTY_RUNS)
def test_an_empty_batch_is_no_error_where_it_has_a_value(layout, case, strategy):
    hidden = rand(0, T, H) if layout == "padded" else rand(0, H)
    inputs = {"hidden": hidden, "weight": rand(V, H), "labels": whole(*LABELS)[:0] if layout == "padded" else whole()}
    if layout == "packed":
        inputs["cu_seqlens"] = whole(0, dtype=torch.int32)
    inputs["weight"].requires_grad_()
    out = fused_dpo_loss(**inputs, ref_logps=rand(0), strategy=strategy, stats=("entropy",), **EMPTY[case])
    expected = torch.zeros(0) if case == "none" else torch.tensor(0.0)
    torch.testing.assert_close(out.loss.detach(), expected, rtol=0, atol=0)
    out.loss.sum().backward()
    assert torch.equal(inputs["weight"].grad, torch.zeros(V, H))
    assert out.chosen_logps.shape == out.rejected_rewards.shape == out.stats["entropy"].shape == (0,)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_fully_masked_sequence_is_no_error(strategy):
    inputs = valid()
    inputs["labels"][2] = -100  # the rejected sequence of pair 0
    inputs["hidden"][2] = math.nan
    inputs["hidden"].requires_grad_()
    inputs["weight"].requires_grad_()
    out = fused_dpo_loss(**inputs, beta=0.5, strategy=strategy)
    ref = inputs["ref_logps"]
    assert out.rejected_logps[0] == 0
    torch.testing.assert_close(out.rejected_rewards[0], -0.5 * ref[2])
    out.loss.backward()
    assert out.loss.isfinite()
    assert inputs["weight"].grad.isfinite().all()
    assert torch.equal(inputs["hidden"].grad[2], torch.zeros(T, H))
    assert inputs["hidden"].grad[0].abs().min() > 0
