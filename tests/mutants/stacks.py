"""Edits of what serves other training stacks."""

from tests.mutants.records import Mutant

_LLAMAFACTORY = "tests/integrations/test_llamafactory.py"
_LOGPS = "tests/integrations/test_logps.py"
_MEGATRON = "tests/integrations/test_megatron.py"
_REQUIREMENTS = "tests/integrations/test_requirements.py"
_TITAN = "tests/integrations/test_torchtitan.py"

STACKS = [
    Mutant(
        "dpo_kernels/integrations/requirements.py",
        "Version(Version(found).base_version)",
        "Version(found)",
        f"{_REQUIREMENTS}::test_a_release_that_is_new_enough_is_taken",
        "a stack from its main branch is refused",
    ),
    Mutant(
        "dpo_kernels/integrations/requirements.py",
        " and spec.origin is not None",
        "",
        f"{_REQUIREMENTS}::test_a_folder_with_the_name_of_a_package_is_none",
        "any folder with a stack's name is taken for the stack",
    ),
    Mutant(
        "dpo_kernels/integrations/logps.py",
        "labels.t().reshape(-1), None",
        "labels.reshape(-1), None",
        f"{_LOGPS}::test_every_layout_gives_what_full_logits_give",
        "with the sequence first, labels are read in the wrong order",
    ),
    Mutant(
        "dpo_kernels/integrations/logps.py",
        "if name not in EXECUTION]",
        "if name not in (*EXECUTION, *INSTEAD)]",
        f"{_LOGPS}::test_what_is_unknown_is_refused",
        "vocab_parallel is overwritten in silence",
    ),
    Mutant(
        "dpo_kernels/integrations/logps.py",
        "else slice(vocab_size)",
        "else slice(None)",
        f"{_LOGPS}::test_padded_rows_of_the_head_are_cut",
        "padding of the vocabulary is in the sum",
    ),
    Mutant(
        "dpo_kernels/integrations/logps.py",
        "        logps = torch.nn.functional.pad(logps[:, :-1], (1, 0))  # each at the place of its label\n",
        "        pass\n",
        f"{_LOGPS}::test_every_layout_gives_what_full_logits_give",
        "with the sequence first, shifted log-probs stand one place too early",
    ),
    Mutant(
        "dpo_kernels/integrations/megatron.py",
        "        ctx.weight.grad_added_to_main_grad = True\n",
        "",
        f"{_MEGATRON}::test_what_megatron_adds_later_is_not_added_twice",
        "Megatron is not told that the gradient is in main_grad",
    ),
    Mutant(
        "dpo_kernels/integrations/megatron.py",
        "setdefault((id(made.group), sequence_parallel), made)",
        "setdefault(sequence_parallel, made)",
        f"{_MEGATRON}::test_heads_that_share_a_context_have_their_own_groups",
        "a head takes the group of another one that was called before it",
    ),
    Mutant(
        "dpo_kernels/integrations/megatron.py",
        "sequence_sharded_hidden=sequence_parallel)",
        "sequence_sharded_hidden=False)",
        f"{_MEGATRON}::test_a_head_that_is_split_over_ranks",
        "with sequence parallelism a rank's hidden states are taken for all",
    ),
    Mutant(
        "dpo_kernels/integrations/megatron.py",
        "ranks > 1 and packed_seq_params",
        "ranks > 2 and packed_seq_params",
        f"{_MEGATRON}::test_what_does_not_fit_is_named",
        "the loss of a part of each sequence is taken for the whole loss",
    ),
    Mutant(
        "dpo_kernels/integrations/megatron.py",
        "        weight, bias = token_rows(weight, bias, context.vocab_size)\n",
        "",
        f"{_MEGATRON}::test_the_loss_of_pairs_is_that_of_the_log_probs",
        "the loss of pairs has the padding of the vocabulary in it",
    ),
    Mutant(
        "dpo_kernels/integrations/megatron.py",
        "packed_seq_params.cu_seqlens_q if padded is None else padded",
        "packed_seq_params.cu_seqlens_q",
        f"{_MEGATRON}::test_padding_within_a_packed_batch_moves_the_boundaries",
        "padding within a packed batch moves the boundaries of its sequences",
    ),
    Mutant(
        "dpo_kernels/integrations/openrlhf.py",
        '_ipo_of_sums if sums_in_ipo else "ipo"',
        "_ipo_of_sums",
        f"{_LOGPS}::test_ipo_takes_averages_unless_asked",
        "IPO takes sums without being asked",
    ),
    Mutant(
        "dpo_kernels/integrations/torchtitan.py",
        "denominator=pairs",
        "denominator=None",
        f"{_TITAN}::test_micro_batches_add_up_with_the_pairs_of_all",
        "each micro-batch is divided by its own pairs",
    ),
    Mutant(
        "dpo_kernels/integrations/verl.py",
        "return patch if patch is not None and patch.function is function else None",
        "return patch",
        f"{_LOGPS}::test_what_a_later_patch_keeps_of_ours_computes_as_verl_does",
        "taking the patch off takes off a later one",
    ),
    Mutant(
        "dpo_kernels/integrations/verl.py",
        "_patches.pop().on = False",
        "_patches.pop()",
        f"{_LOGPS}::test_what_a_later_patch_keeps_of_ours_computes_as_verl_does",
        "what a later patch keeps of ours still computes here",
    ),
    Mutant(
        "dpo_kernels/integrations/llamafactory/dpo.py",
        'options |= {"token_weights": ld_token_weights(labels, self.ld_alpha, shift=True)}',
        "pass",
        f"{_LLAMAFACTORY}::test_a_step_of_dpo_is_that_of_llamafactory[LD-DPO]",
        "LD-DPO's weights are forgotten",
    ),
    Mutant(
        "dpo_kernels/integrations/llamafactory/dpo.py",
        'AVERAGED = ("ipo", "orpo", "simpo")',
        'AVERAGED = ("ipo", "orpo")',
        f"{_LLAMAFACTORY}::test_a_step_of_dpo_is_that_of_llamafactory[simpo]",
        "SimPO gets sums",
    ),
    Mutant(
        "dpo_kernels/integrations/llamafactory/dpo.py",
        "losses - self.ftx_gamma * x.policy_chosen_logps / x.chosen_tokens.clamp(min=1)",
        "losses - self.ftx_gamma * chosen",
        f"{_LLAMAFACTORY}::test_a_step_of_dpo_is_that_of_llamafactory[with SFT]",
        "the SFT term takes sums",
    ),
    Mutant(
        "dpo_kernels/integrations/llamafactory/dpo.py",
        '            kwargs.setdefault("loss_type", self.loss_type)\n',
        "            pass\n",
        f"{_LLAMAFACTORY}::test_the_loss_that_is_asked_for_is_computed",
        "TRL computes sigmoid whatever is asked",
    ),
    Mutant(
        "dpo_kernels/integrations/llamafactory/dpo.py",
        'logits = (out.stats["mean_logits"].view(2, -1) * tokens)',
        'logits = (out.stats["mean_logits"].view(2, -1) * tokens.mean())',
        f"{_LLAMAFACTORY}::test_a_step_of_dpo_is_that_of_llamafactory[sigmoid]",
        "a long sequence's logits weigh as a short one's",
    ),
    Mutant(
        "dpo_kernels/integrations/llamafactory/kto.py",
        "ref_logps[desirable], ref_logps[~desirable] = chosen, rejected",
        "ref_logps[:] = torch.cat([chosen, rejected])",
        f"{_LLAMAFACTORY}::test_a_step_of_kto_is_that_of_llamafactory[both-plain]",
        "sequences get each other's reference",
    ),
    Mutant(
        "dpo_kernels/integrations/llamafactory/kto.py",
        "            kl=kl.to(hidden.device),\n",
        "",
        f"{_LLAMAFACTORY}::test_a_step_of_kto_is_that_of_llamafactory[both-plain]",
        "the loss leaves its estimate of the KL divergence out",
    ),
    Mutant(
        "dpo_kernels/integrations/llamafactory/rows.py",
        "(token_type_ids == 0) | (token_type_ids != before)",
        "token_type_ids == 0",
        f"{_LLAMAFACTORY}::test_pairs_in_rows_are_scored_as_the_two_sequences_alone",
        "the first token of a sequence is scored from padding",
    ),
    Mutant(
        "dpo_kernels/integrations/llamafactory/patch.py",
        "    if _replaced:\n        return Patch(False)\n",
        "",
        f"{_LLAMAFACTORY}::test_the_patch_goes_on_once_and_comes_off",
        "a second patch takes the first for what was there",
    ),
    Mutant(
        "dpo_kernels/integrations/llamafactory/__main__.py",
        '    launcher.__file__ = f"--module {MODULE}"  # it is put into the command line of torchrun\n',
        "",
        f"{_LLAMAFACTORY}::test_the_command_line_hands_the_patch_to_its_processes",
        "the processes that torchrun starts have no patch",
    ),
]
