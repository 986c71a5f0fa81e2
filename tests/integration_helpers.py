"""Tiny random models of many kinds, a batch for them, and what tests of the integrations compare them with."""

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from dpo_kernels import fused_dpo_loss  # noqa: E402
from dpo_kernels.integrations.fingerprint_values import Values  # noqa: E402
from dpo_kernels.integrations.transformers import fused_lm_head  # noqa: E402

V, H = 67, 32
SMALL = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def without(*names):
    return {name: value for name, value in SMALL.items() if name not in names}


CONFIGS = {
    "llama": lambda t: t.LlamaConfig(**SMALL),
    "qwen3": lambda t: t.Qwen3Config(**SMALL, tie_word_embeddings=True),
    "gemma2": lambda t: t.Gemma2Config(**SMALL, final_logit_softcapping=3.0, sliding_window=32),
    "cohere": lambda t: t.CohereConfig(**without("head_dim"), logit_scale=0.0625 * 5),
    "granite": lambda t: t.GraniteConfig(**without("head_dim"), logits_scaling=3.0),
    "phi": lambda t: t.PhiConfig(**without("head_dim")),
    "gpt2": lambda t: t.GPT2Config(
        vocab_size=V, n_embd=H, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "falcon_h1": lambda t: t.FalconH1Config(
        **SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, lm_head_multiplier=0.3
    ),
    "opt": lambda t: t.OPTConfig(  # its forward calls a part of its backbone, which narrows the hidden states
        **without("intermediate_size", "num_key_value_heads", "head_dim"), ffn_dim=48, word_embed_proj_dim=16,
        enable_bias=False,
    ),
    "bart": lambda t: t.BartConfig(
        vocab_size=V, d_model=H, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48, is_decoder=True,
        max_position_embeddings=64,
    ),
    "inkling": lambda t: t.InklingTextConfig(
        **without("intermediate_size"), moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
        logits_mup_width_multiplier=1.5,
    ),
}  # fmt: skip


def tiny(name, seed=0):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](transformers), attn_implementation="eager")
    with torch.no_grad():  # logits of the size of a trained model's, and a bias that shows
        head = model.get_output_embeddings()
        head.weight.mul_(20.0)
        if head.bias is not None:
            head.bias.normal_()
    return model.train(False)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (4, 11), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 8:] = mask[3, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels, torch.randn(4, generator=g) - 20.0


def full_logits_loss(logits, labels, ref_logps, beta):
    logps = logits[:, :-1].float().log_softmax(-1)
    scored = labels[:, 1:] != -100
    logps = logps.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    chosen, rejected = ((logps * scored).sum(-1) - ref_logps).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def both(model, batch, **options):
    """((loss, gradients) with full logits, the same fused)."""
    inputs, labels, ref = batch
    results = []
    for fused in (False, True):
        model.zero_grad()
        if fused:
            hidden, weight, head = fused_lm_head(model)(**inputs)
            loss = fused_dpo_loss(hidden, weight, labels, shift=True, ref_logps=ref, beta=0.1, **head, **options).loss
        else:
            loss = full_logits_loss(model(**inputs).logits, labels, ref, 0.1)
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), grads))
    return results


def assert_same(plain, fused):
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-5, atol=1e-6)
    assert fused[1].keys() == plain[1].keys()
    largest = max(grad.norm() for grad in plain[1].values())
    for name, grad in plain[1].items():
        if name.endswith("k_proj.bias") and grad.norm() < 1e-8 * largest:
            # A bias of the keys adds the same to all scores of a query, so that its gradient is 0 but for rounding.
            assert fused[1][name].norm() < 1e-8 * largest, name
            continue
        error = (fused[1][name] - grad).norm() / grad.norm().clamp(min=1e-6)
        assert error < 2e-5, f"{name}: {error:.1e}"


def rows(count=9, seed=0):
    g = torch.Generator().manual_seed(seed)

    def ids(least, most):
        return torch.randint(3, V, (int(torch.randint(least, most, (), generator=g)),), generator=g).tolist()

    return [{"prompt_ids": ids(1, 5), "chosen_ids": ids(1, 9), "rejected_ids": ids(1, 9)} for _ in range(count)]


LEAVING = {  # models whose forward leaves something behind
    "recurrent_gemma": lambda t: t.RecurrentGemmaConfig(
        **(SMALL | {"num_hidden_layers": 3}), lru_width=32, attention_window_size=8
    ),
    "rwkv": lambda t: t.RwkvConfig(
        vocab_size=V, hidden_size=H, num_hidden_layers=3, intermediate_size=48, rescale_every=1, context_length=64
    ),
    "xglm": lambda t: t.XGLMConfig(  # whose table of positions grows
        vocab_size=V, d_model=H, ffn_dim=48, num_layers=1, attention_heads=4, max_position_embeddings=8
    ),
    "trocr": lambda t: t.TrOCRConfig(  # likewise, but no buffer
        vocab_size=V,
        d_model=H,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_position_embeddings=8,
        use_learned_position_embeddings=False,
    ),
}


def leaving(name, seed=0, **options):
    config = LEAVING[name](transformers)
    config.update(options)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def told(value):
    """What the fingerprint takes of a value that a module holds."""
    parts = []
    Values(lambda data: parts.append(bytes(data)), lambda path, module: None).value("held", value)
    return b"".join(parts)
