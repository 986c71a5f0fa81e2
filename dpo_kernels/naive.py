"""DPO in plain torch, from top to bottom: read this file first.

The fused kernels return the same loss and the same gradients, but never hold all the logits at once.

Shapes: B pairs of sequences, T positions in a sequence, H hidden size, V vocabulary size.
Order: the first B sequences are the chosen ones, and sequence ``B + i`` is the rejected partner of sequence ``i``.
Source: Rafailov et al., arXiv 2305.18290, eq. 7.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

NOT_SCORED = -100  # This label marks prompt and padding. The value is torch's default ``ignore_index``.


def dpo_loss(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, beta: float = 0.1) -> Tensor:
    """Return the DPO loss, a scalar; hidden is (2B, T, H), weight (V, H), labels (2B, T), ref_logps (2B,).

    ``hidden[s, t]`` predicts ``labels[s, t]``. ``ref_logps`` holds the reference model's log-prob of each sequence.

    Example: a head of zeros gives each token log-prob -log 4, so the margin is log 4 and the loss log(1 + 1 / 4).

    >>> hidden, weight, labels = torch.ones(2, 2, 3), torch.zeros(4, 3), torch.tensor([[-100, 1], [2, 3]])
    >>> round(float(dpo_loss(hidden, weight, labels, ref_logps=torch.zeros(2), beta=1.0)), 4)
    0.2231
    """
    logits = hidden @ weight.T  # (2B, T, V): the LM head scores every token of the vocabulary.
    log_probs = logits.log_softmax(dim=-1)  # (2B, T, V): the scores become log-probs.
    is_scored = labels != NOT_SCORED  # (2B, T): only the tokens of the completion count.
    targets = labels.where(is_scored, 0)  # (2B, T): gather needs a valid index everywhere; masked out below.
    token_logps = log_probs.gather(-1, targets[..., None])[..., 0]  # (2B, T): we keep the label's log-prob.
    logps = (token_logps * is_scored).sum(dim=-1)  # (2B,): a sequence's log-prob is the sum over its scored tokens.
    log_ratios = logps - ref_logps  # (2B,): they say how far the policy has moved from the reference.
    chosen, rejected = log_ratios.chunk(2)  # (B,) each: stacked order puts all chosen sequences first.
    margins = beta * (chosen - rejected)  # (B,): the margin is positive where the policy prefers the chosen one.
    return -logsigmoid(margins).mean()  # (): Bradley-Terry's negative log-likelihood, averaged over the pairs.


def dpo_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, beta: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d loss / d logits (2B, T, V), d hidden (2B, T, H) and d weight (V, H), derived by hand.

    The derivative of -log sigmoid(u) is -sigmoid(-u), so d loss / d logp is one number ``g`` per sequence:
    ``-beta sigmoid(-u) / B`` for the chosen one, and the opposite for the rejected one.
    The derivative of a token's log-prob by its logits is ``onehot(label) - softmax(logits)``.
    """
    logits = hidden @ weight.T  # (2B, T, V): the lines down to the margins are those of ``dpo_loss``.
    is_scored = labels != NOT_SCORED
    targets = labels.where(is_scored, 0)
    token_logps = logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
    chosen, rejected = ((token_logps * is_scored).sum(dim=-1) - ref_logps).chunk(2)
    margins = beta * (chosen - rejected)

    g_chosen = -beta * torch.sigmoid(-margins) / margins.shape[0]  # (B,): the mean divides by B.
    g = torch.cat([g_chosen, -g_chosen])  # (2B,): d loss / d logp of each sequence.
    g_token = g[:, None] * is_scored  # (2B, T): a sum passes its gradient on to each scored token.
    d_token = one_hot(targets, weight.shape[0]) - logits.softmax(dim=-1)  # (2B, T, V): d token_logp / d logits.
    d_logits = g_token[..., None] * d_token  # (2B, T, V): the chain rule.
    d_hidden = d_logits @ weight  # (2B, T, H): logits = hidden @ weight.T, so d hidden = d logits @ weight.
    d_weight = d_logits.flatten(0, 1).T @ hidden.flatten(0, 1)  # (V, H): and d weight sums over all positions.
    return d_logits, d_hidden, d_weight
