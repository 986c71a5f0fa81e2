"""A judge that took no part in the training: VADER's compound sentiment of sampled continuations."""

from dataclasses import dataclass
from statistics import pstdev

import torch
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from demo.model import LanguageModel

POSITIVE = 0.05  # VADER's own bound for a positive text


@dataclass(frozen=True)
class Judgement:
    """The mean compound score (-1 to 1) with its standard error, the share of positive texts, and the texts."""

    score: float
    error: float
    positive: float
    texts: list[str]


def judge_samples(lm: LanguageModel, count: int, tokens: int, seed: int) -> Judgement:
    """Sample `count` continuations of the prompt and score them; a seed always draws the same random numbers."""
    texts = sample(lm, count, tokens, seed)
    analyzer = SentimentIntensityAnalyzer()
    scores = [analyzer.polarity_scores(text)["compound"] for text in texts]
    return Judgement(
        score=sum(scores) / count,
        error=pstdev(scores) / count**0.5,
        positive=sum(score >= POSITIVE for score in scores) / count,
        texts=texts,
    )


def sample(lm: LanguageModel, count: int, tokens: int, seed: int) -> list[str]:
    """Return `count` continuations of the prompt of at most `tokens` tokens."""
    prompt = torch.tensor([lm.prompt] * count, device=lm.device)
    torch.manual_seed(seed)
    rows = lm.causal.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        top_k=0,  # the model's own distribution, not what a truncation makes of it
        max_new_tokens=tokens,
        pad_token_id=lm.end,
        eos_token_id=lm.end,
    )
    return [_until(lm.end, row[prompt.shape[1] :].tolist(), lm) for row in rows]


def _until(end: int, ids: list[int], lm: LanguageModel) -> str:
    return lm.decode(ids[: ids.index(end)] if end in ids else ids).strip()
