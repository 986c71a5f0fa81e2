"""Edits of what few calls reach, each of which went unnoticed once: capacity that is not used, later chunks, frozen
weights beside trained biases, upstreams that are nearly right, transforms, devices, files that were cut short.
"""

from tests.mutants.records import Mutant

PATHS: tuple[Mutant, ...] = (
    Mutant(
        "dpo_kernels/packing.py",
        "        weights = (~unused).to(torch.float32)  #",
        "        weights = torch.ones_like(unused, dtype=torch.float32)  #",
        "tests/test_execution.py::test_capacity_that_is_not_used_adds_nothing",
        "capacity that stands for nothing counts in the bias's gradient",
    ),
    Mutant(
        "dpo_kernels/losses/sequences.py",
        "desirable_S=self.desirable_S[first:last]",
        "desirable_S=self.desirable_S[: last - first]",
        "tests/test_beyond_pairs.py::test_every_chunk_has_units_of_its_own",
        "a later chunk of KTO has the first one's labels",
    ),
    Mutant(
        "dpo_kernels/losses/sequences.py",
        "weights_S=self.weights_S[first:last]",
        "weights_S=self.weights_S[: last - first]",
        "tests/test_beyond_pairs.py::test_every_chunk_has_units_of_its_own",
        "a later chunk of KTO has the first one's weights",
    ),
    Mutant(
        "dpo_kernels/losses/sequences.py",
        "sizes=self.sizes[first:last]",
        "sizes=self.sizes[: last - first]",
        "tests/test_beyond_pairs.py::test_every_chunk_has_units_of_its_own",
        "a later chunk of groups has the first one's sizes",
    ),
    Mutant(
        "dpo_kernels/losses/binding.py",
        "{name: value[first:last] for",
        "{name: value[: last - first] for",
        "tests/test_execution.py::test_what_differs_by_pair_goes_with_its_pair",
        "a later chunk has the first one's values by pair",
    ),
    Mutant(
        "dpo_kernels/beyond_pairs.py",
        "return value.detach().to(sum_dtype(value.device))",
        "return value.to(sum_dtype(value.device))",
        "tests/test_beyond_pairs.py::test_estimates_are_never_differentiated",
        "an estimate of the KL is differentiated",
    ),
    Mutant(
        "dpo_kernels/passes.py",
        "enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()",
        "enabled=False) if device_type is None else nullcontext()",
        "tests/test_execution.py::test_under_autocast_only_the_operands_are_rounded",
        "autocast is left on inside a pass",
    ),
    Mutant(
        "dpo_kernels/integrations/token_logps.py",
        "                    dw.addmm_(d.t(), x)",
        "                    torch.mm(d.t(), x, out=dw)",
        "tests/test_token_logps.py",
        "the entropy's gradient of the head is that of the last tile",
    ),
    Mutant(
        "dpo_kernels/integrations/token_logps.py",
        "                    db += d.sum(dim=0)",
        "                    db = d.sum(dim=0)",
        "tests/test_token_logps.py",
        "the entropy's gradient of the bias is that of the last tile",
    ),
    Mutant(
        "dpo_kernels/autograd.py",
        "UPSTREAM_TOLERANCE = 1e-6",
        "UPSTREAM_TOLERANCE = 2e-2",
        "tests/test_main_grad.py::test_an_upstream_that_is_nearly_the_one_announced_is_another",
        "an upstream one percent off the announced one is taken",
    ),
    Mutant(
        "dpo_kernels/autograd.py",
        "UPSTREAM_TOLERANCE = 1e-6",
        "UPSTREAM_TOLERANCE = 2e-3",
        "tests/test_main_grad.py::test_an_upstream_that_is_nearly_the_one_announced_is_another",
        "an upstream a thousandth off the announced one is taken",
    ),
    Mutant(
        "dpo_kernels/strategies/chunked.py",
        "        self.scratch = kernels.scratch(",
        "        self.scratch = _Pass.kept = kernels.scratch(",
        "tests/test_memory.py::test_no_scratch_outlives_its_call",
        "scratch outlives its call",
    ),
    Mutant(
        "dpo_kernels/kernels/tiled.py",
        "        scratch = self.scratch(hidden_RH.device, tile.rows, tile.cols)\n"
        "        out = _Collected(rows, scratch, stats)\n"
        "        for start",
        "        scratch = TiledPasses.kept = self.scratch(hidden_RH.device, tile.rows, tile.cols)\n"
        "        out = _Collected(rows, scratch, stats)\n"
        "        for start",
        "tests/test_memory.py::test_no_scratch_outlives_its_call",
        "the scratch of log-probs outlives its call",
    ),
    Mutant(
        "dpo_kernels/kernels/tiled.py",
        "        scratch = self.scratch(hidden_RH.device, tile.rows, tile.cols)\n"
        "        out = _Collected(rows, scratch, stats)\n"
        "        direction",
        "        scratch = TiledPasses.kept = self.scratch(hidden_RH.device, tile.rows, tile.cols)\n"
        "        out = _Collected(rows, scratch, stats)\n"
        "        direction",
        "tests/test_memory.py::test_no_scratch_outlives_its_call",
        "the scratch of a frozen head outlives its call",
    ),
    Mutant(
        "dpo_kernels/kernels/tiled.py",
        "        scratch = self.scratch(hidden_RH.device, tile.rows, tile.cols)\n        grads =",
        "        scratch = TiledPasses.kept = self.scratch(hidden_RH.device, tile.rows, tile.cols)\n        grads =",
        "tests/test_memory.py::test_no_scratch_outlives_its_call",
        "the scratch of a backward pass outlives it",
    ),
    Mutant(
        "dpo_kernels/strategies/chunked.py",
        "        elif need_weight:",
        "        elif need_weight or need_bias:",
        "tests/test_execution.py::test_a_frozen_weight_costs_nothing_where_the_bias_is_trained",
        "a frozen weight gets a gradient where the bias is trained",
    ),
    Mutant(
        "dpo_kernels/kernels/tiled.py",
        "dw = self.buffer(device, vocab, width) if need_weight else None",
        "dw = self.buffer(device, vocab, width) if need_weight or need_bias else None",
        "tests/test_execution.py::test_a_frozen_weight_costs_nothing_where_the_bias_is_trained",
        "recomputing, a frozen weight gets a gradient where the bias is trained",
    ),
    Mutant(
        "dpo_kernels/calls.py",
        '"auto" if call.run.strategy == "chunked" else call.run.strategy, call.run.backend',
        "call.run.strategy, call.run.backend",
        "tests/test_execution.py::test_a_reference_is_scored_in_whatever_scratch_the_policy_runs_in",
        "a reference is refused in scratch in which the policy runs",
    ),
    Mutant(
        "dpo_kernels/autograd.py",
        "    backward = staticmethod(_pair_loss_backward)\n    vmap, jvp =",
        "    backward = staticmethod(_pair_loss_backward)\n    other, another =",
        "tests/test_autograd.py::test_transforms_without_a_rule_are_refused",
        "vmap and forward mode of a fused loss fail in torch's words",
    ),
    Mutant(
        "dpo_kernels/autograd.py",
        "    backward = staticmethod(_logps_backward)\n    vmap, jvp =",
        "    backward = staticmethod(_logps_backward)\n    other, another =",
        "tests/test_autograd.py::test_transforms_without_a_rule_are_refused",
        "vmap and forward mode of fused log-probs fail in torch's words",
    ),
    Mutant(
        "dpo_kernels/autograd.py",
        '    inputs.refuse_batched("the upstream of a fused loss", grad_total)\n',
        "",
        "tests/test_autograd.py::test_transforms_without_a_rule_are_refused",
        "batched gradients of a fused loss fail in torch's words",
    ),
    Mutant(
        "dpo_kernels/autograd.py",
        '    inputs.refuse_batched("the upstream of fused log-probs", grad_out)\n',
        "",
        "tests/test_autograd.py::test_transforms_without_a_rule_are_refused",
        "batched gradients of fused log-probs fail in torch's words",
    ),
    Mutant(
        "dpo_kernels/inputs.py",
        "        checks.refuse_forward_mode(name, tensor)\n",
        "        pass\n",
        "tests/test_autograd.py::test_transforms_without_a_rule_are_refused",
        "dual numbers lose their tangent in silence",
    ),
    Mutant(
        "dpo_kernels/kernels/extension.py",
        "torch.empty(0, dtype=accumulation_dtype(self.dtype), device=device)",
        "torch.empty(0, dtype=accumulation_dtype(self.dtype))",
        "tests/test_default_device.py",
        "buffers of the C++ backend lie on the default device",
    ),
    Mutant(
        "dpo_kernels/losses/state.py",
        "    if not policy_logps.numel():",
        "    if False:",
        "tests/test_kinds_of_tensors.py::test_none_to_average_over",
        "the KL of no completion is NaN",
    ),
    Mutant(
        "dpo_kernels/checks.py",
        "    if value.is_nested:",
        "    if False:",
        "tests/test_kinds_of_tensors.py",
        "a nested tensor fails deep inside",
    ),
    Mutant(
        "dpo_kernels/checks.py",
        '    if hasattr(kind, "__tensor_flatten__") and',
        "    if False and",
        "tests/test_kinds_of_tensors.py",
        "a wrapper of tensors is computed on as if it were one",
    ),
    Mutant(
        "examples/plain_loop.py",
        "    if len(rows) // options.batch < processes:",
        "    if len(rows) // options.batch < 0:",
        "tests/test_command_lines.py",
        "a loop with fewer pairs than a batch trains nothing and says nothing",
    ),
    Mutant(
        "dpo_kernels/integrations/heads.py",
        "for name in layer.active_adapters:",
        "for name in layer.active_adapters[:1]:",
        "tests/test_integration_peft.py::test_two_active_adapters_on_the_head_are_both_used",
        "a second active adapter on the head is dropped",
    ),
    Mutant(
        "dpo_kernels/integrations/fingerprint.py",
        "(head.logit_scale, head.softcap, implementations, autocast)",
        "(head.softcap, implementations, autocast)",
        "tests/test_integration_fingerprint.py::test_scale_and_cap_of_the_head_are_in_it",
        "log-probs of another scale are served",
    ),
    Mutant(
        "dpo_kernels/integrations/fingerprint.py",
        "repr((head.logit_scale, head.softcap,",
        "repr((head.logit_scale,",
        "tests/test_integration_fingerprint.py::test_scale_and_cap_of_the_head_are_in_it",
        "log-probs of another softcap are served",
    ),
    Mutant(
        "dpo_kernels/integrations/precompute.py",
        "        if not torch.isfinite(logps[index]):",
        "        if False:",
        "tests/test_integration_precompute.py::test_log_probs_that_are_not_numbers_are_neither_kept_nor_returned",
        "log-probs that are not numbers are kept",
    ),
    Mutant(
        "dpo_kernels/integrations/precompute.py",
        'return "" if torch.isfinite(values).all() else "holds log-probs that are not numbers"',
        'return ""',
        "tests/test_integration_precompute.py::test_log_probs_that_are_not_numbers_are_neither_kept_nor_returned",
        "log-probs on disk that are not numbers are served",
    ),
    Mutant(
        "dpo_kernels/integrations/precompute.py",
        "        save_file(tensors, unfinished, metadata=key)\n        unfinished.replace(file)\n",
        "        save_file(tensors, file, metadata=key)\n",
        "tests/test_integration_precompute.py::test_a_file_has_its_name_only_when_it_is_whole",
        "a file has its name before it is whole",
    ),
)
