"""The stand-in for SmolLM2: a Llama-like model of a million parameters, taught to write on the same ratings."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from demo.data import IGNORED, batches_forever, rows
from demo.model import LanguageModel
from dpo_kernels import fused_sequence_logps

VOCABULARY = 2048
END = "<|end|>"
SFT_BATCH = 32
SFT_LR = 3e-3


def build_scratch(texts: Sequence[str], seed: int) -> LanguageModel:
    """Build a tokenizer from `texts` and an untrained model for it."""
    tokenizer = _train_tokenizer(texts)
    end = tokenizer.get_vocab()[END]
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    torch.manual_seed(seed)
    causal = LlamaForCausalLM(config)
    return LanguageModel(
        name=f"A {sum(parameter.numel() for parameter in causal.parameters()) / 1e6:.2f}M model from scratch",
        causal=causal,
        encode=lambda text: tokenizer.encode(text).ids,
        decode=tokenizer.decode,
        end=end,
    )


def supervise(lm: LanguageModel, texts: Sequence[str], steps: int, seed: int) -> None:
    """Teach `lm` to continue the prompt with sentences like `texts`, by maximum likelihood."""
    optimizer = torch.optim.AdamW(lm.causal.parameters(), lr=SFT_LR, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=SFT_LR, total_steps=max(steps, 2))
    batches = batches_forever(len(texts), SFT_BATCH, seed)
    with tqdm(total=steps, desc="supervised training", unit="step") as bar:
        for _ in range(steps):
            chosen = [texts[index] for index in next(batches)]
            batch = rows(chosen, lm.encode, lm.prompt, lm.end).to(lm.device)
            logps = fused_sequence_logps(lm.hidden(batch), lm.head, batch.labels, shift=True)
            loss = -logps.sum() / (batch.labels != IGNORED).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2f}")
            bar.update()


def _train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer
