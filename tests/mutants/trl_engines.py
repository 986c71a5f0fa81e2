"""Edits of what ``FusedDPOTrainer`` and ``patch_trl`` do under engines that shard the head."""

from tests.mutants.records import Mutant

_ENGINES = "tests/integrations/test_trl_engines.py"
_PATCH = "tests/integrations/test_trl_patch.py"
_KTO = "tests/integrations/test_trl_kto.py"
_ONE_PASS = "tests/integrations/test_trl_one_pass.py"

TRL_ENGINES = [
    Mutant(
        "dpo_kernels/integrations/trl/compatibility.py",
        "            tell(model)\n",
        "",
        f"{_ENGINES}::test_logs_and_parameters_are_those_of_trl[FSDP2-FSDP1-llama]",
        "the reference is looked at when FSDP1 has made its head flat",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/reference_check.py",
        "    if any(wrong):",
        "    if pairs and difference:",
        f"{_ENGINES}::test_log_probs_that_are_wrong_on_one_rank_end_all_of_them[FSDP2]",
        "a rank raises alone and the others wait for it",
    ),
    Mutant(
        "dpo_kernels/integrations/split_head.py",
        "VocabParallel.of(weight)",
        "VocabParallel.of(weight, reduce_hidden_grad=False)",
        f"{_ENGINES}::test_a_head_that_is_split_over_the_ranks_trains_as_trl_trains_it",
        "the gradient of the hidden states is that of one rank's tokens",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/gathered_logps.py",
        "with maybe_gather_lm_head_ctx(weight, bias), torch",
        "with maybe_gather_lm_head_ctx(), torch",
        f"{_ENGINES}::test_the_backward_gathers_a_head_that_was_freed",
        "the backward reads a head that ZeRO-3 has freed",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/gathered_logps.py",
        "total = total + (entropies",
        "total = (entropies",
        f"{_PATCH}::test_a_head_that_is_gathered_again_has_the_same_gradients",
        "with an entropy the gradient of the log-probs is lost",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/gathered_logps.py",
        "x.policy_chosen_logps * grad_logps",
        "x.policy_chosen_logps",
        f"{_PATCH}::test_a_head_that_is_gathered_again_has_the_same_gradients",
        "every log-prob is taken to have the gradient 1",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/patch.py",
        "return gathered_token_logps(*given)",
        "return token_logps(*given)",
        f"{_ENGINES}::test_the_backward_gathers_a_head_that_was_freed",
        "nothing gathers the head of ZeRO-3 for the backward",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/patch.py",
        "    if getattr(utils, NAME, None) is function:\n        setattr",
        "    if True:\n        setattr",
        f"{_PATCH}::test_ours_first",
        "taking the patch off takes off a later one of somebody else",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/patch.py",
        "    function.on = False\n",
        "",
        f"{_PATCH}::test_ours_first",
        "under a later patch ours goes on computing after it was taken off",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/patch.py",
        "        return getattr(self.replaced, name)\n",
        "        raise AttributeError(name)\n",
        f"{_PATCH}::test_theirs_first",
        "another patch does not see that it was there already, and comes again on top",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/patch.py",
        "    if names == ARGUMENTS:",
        "    if names is not None and names[:9] == ARGUMENTS:",
        f"{_PATCH}::test_another_trl_is_refused",
        "a tenth argument is taken for none, and every call of TRL's dies",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/trainer.py",
        'if hasattr(self, "_truncate_inputs") and',
        "if False and",
        "tests/integrations/test_trl.py::test_sequences_are_cut_where_trl_0_29_cuts_them",
        "on TRL 0.29 max_length is forgotten",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/orpo.py",
        "_left_out = 1",
        "_left_out = 0",
        f"{_ONE_PASS}::test_logs_are_those_of_trl[orpo-llama]",
        "the mean of ORPO's logits counts the last position too",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/orpo.py",
        "    prompt = ~completion & (mask == 1) & ~rejected\n",
        "    prompt = ~completion & (mask == 1)\n",
        f"{_ONE_PASS}::test_every_scored_position_is_in_one_sequence",
        "ORPO's NLL counts the prompts of the rejected rows too",
    ),
    Mutant(
        "dpo_kernels/integrations/fused_step.py",
        "    loss.separable = True  # type: ignore[attr-defined]\n",
        "",
        f"{_ONE_PASS}::test_no_full_logits_are_made",
        "the loss counts as coupled, and costs a pass more",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/cpo.py",
        "torch.zeros_like(out.loss)",
        "-out.chosen_logps.sum() / tokens",
        f"{_ONE_PASS}::test_every_loss_of_cpo_is_that_of_trl[simpo]",
        "an NLL is logged that cpo_alpha=0 leaves out",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/one_pass.py",
        "        self._check_formula(loss.detach(), of_trl)\n",
        "",
        f"{_ONE_PASS}::test_a_trl_that_adds_up_its_loss_otherwise_is_refused",
        "another formula of a later TRL goes unnoticed",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/kto.py",
        "            kl=kl.to(hidden.device),\n",
        "",
        f"{_KTO}::test_logs_are_those_of_trl[llama]",
        "KTO's loss leaves its estimate of the KL divergence out",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/kto.py",
        "self.accelerator.gather_for_metrics((kl_logps - reference_kl.to(kl_logps)).mean()).mean()",
        "(kl_logps - reference_kl.to(kl_logps)).mean()",
        f"{_ENGINES}::test_the_fused_kto_trainer_logs_what_trl_logs[FSDP2]",
        "each rank takes the KL estimate of its own sequences",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/kto.py",
        'batch[f"{prefix}completion_mask"] == 0',
        'batch["completion_mask"] == 0',
        f"{_KTO}::test_gradients_are_those_of_trl[llama]",
        "the KL sequences are scored where the completions are",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/kto.py",
        "spread(out.logps) / tokens",
        "spread(out.logps)",
        f"{_KTO}::test_logs_are_those_of_trl[llama]",
        "a sequence's log-prob is logged once for each of its tokens",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/kto.py",
        "            undesirable_weight=self.undesirable_weight,\n",
        "",
        f"{_KTO}::test_logs_are_those_of_trl_in_every_setup[weights]",
        "KTO's weight of undesirable sequences is forgotten",
    ),
    Mutant(
        "dpo_kernels/integrations/trl/kto.py",
        "            self.precompute_ref_logps, self._scored = precomputed, None\n",
        "            self._scored = None\n",
        f"{_KTO}::test_logs_are_those_of_trl[llama]",
        "after the first step the trainer takes its references for precomputed",
    ),
]
