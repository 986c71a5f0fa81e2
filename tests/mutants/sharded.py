"""Edits of what stands around heads that an engine shards."""

from tests.mutants.records import Mutant

FOUR = "tests/distributed/test_sharded_heads.py"  # the start on four ranks is the smallest

SHARDED = (
    Mutant(
        "dpo_kernels/integrations/head_forward.py",
        "    return module(hidden, **{CALL: unrounded})\n",
        "    whole = types.SimpleNamespace(weight=module.weight.full_tensor(), bias=None, _forward_pre_hooks={})\n"
        "    return read(whole, hidden)\n",
        f"{FOUR}::test_training_equals_one_process[training on four: untied, own, resharded]",
        "a head of its own unit is read with full_tensor() outside of its forward",
    ),
    Mutant(
        "dpo_kernels/engine/autograd.py",
        "    return total, logps, means, by_label(tokens, problem), tuple(of_both)\n",
        "    return total if problem.packed.used else total.detach(), logps, means, by_label(tokens, problem), ()\n",
        f"{FOUR}::test_training_equals_one_process[training on four: nothing scored]",
        "a micro-batch in which nothing is scored is not connected to the graph",
    ),
    Mutant(
        "dpo_kernels/integrations/head_check.py",
        "if not len(rows) and in_step and ids.shape[:2].numel():",
        "if False:",
        f"{FOUR}::test_a_rank_whose_batch_is_padding_compares_in_step_with_the_others",
        "a rank whose batch is padding leaves the self-check out, and its collectives",
    ),
    Mutant(
        "dpo_kernels/distributed/sharded_heads.py",
        "    handle = module.register_forward_hook(instead)\n",
        "",
        f"{FOUR}::test_results_keep_their_precision_whatever_the_unit_returns",
        "log-probs are rounded to the output_dtype of FSDP2's policy",
    ),
    Mutant(
        "dpo_kernels/distributed/sharded_heads.py",
        "        state._pre_backward(grad)\n",
        "",
        f"{FOUR}::test_training_equals_one_process[own_loops on four: apart]",
        "the engine is not told that the backward pass of an unsharded head runs",
    ),
    Mutant(
        "dpo_kernels/distributed/sharded_heads.py",
        "    if not torch.is_grad_enabled():\n        module.reshard()\n",
        "",
        f"{FOUR}::test_without_gradients_the_head_is_a_shard_again_after_the_context",
        "a head that was gathered without gradients stays gathered",
    ),
)
