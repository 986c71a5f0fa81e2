"""Edits of what a head that is split over ranks goes through, beside those in ``core.py``."""

from tests.mutants.records import Mutant

_INTERPRETED = "tests/interpreted/test_vocab_parallel.py::"

_KERNELS = [
    Mutant(
        "dpo_kernels/kernels/triton/row_kernels.py",
        "if (column >= 0) & (column < cols):",
        "if column < cols:",
        _INTERPRETED + "test_kernels_leave_labels_outside_of_the_tile_alone",
        "the logit of a label before the shard is read",
    ),
    Mutant(
        "dpo_kernels/kernels/triton/row_kernels.py",
        "if (column >= 0) & (column < cols):",
        "if column >= 0:",
        _INTERPRETED + "test_kernels_leave_labels_outside_of_the_tile_alone",
        "the logit of a label after the shard is read",
    ),
    Mutant(
        "dpo_kernels/kernels/triton/matmul_kernels.py",
        'own_logit = tl.where((own_col >= 0) & (own_col < BLOCK_V), own_logit, -float("inf"))',
        "own_logit = own_logit + 0.0",
        _INTERPRETED + "test_split_equals_whole[streaming]",
        "a label of another shard has the logit 0",
    ),
    Mutant(
        "dpo_kernels/strategies/streaming.py",
        "if problem.head.vocab:",
        "if True:",
        _INTERPRETED + "test_split_equals_whole[streaming]",
        "a kernel is launched over an empty shard",
    ),
    Mutant(
        "dpo_kernels/strategies/frozen_head.py",
        "out_CH.mul_(rescale(own_max, state.max)[:, None])",
        "pass",
        _INTERPRETED + "test_split_equals_whole[chunked]",
        "a shard's sum of head rows stays under its own maximum",
    ),
]

_SYNCS = "tests/distributed/test_host_syncs.py::test_a_static_capacity_adds_no_sync_after_the_first_call"

_HOST = [
    Mutant(
        "dpo_kernels/engine/in_step.py",
        "(policy.hidden, reference.ref_hidden), policy.labels, keep=static)",
        "(policy.hidden, reference.ref_hidden), policy.labels)",
        _SYNCS + "[chunked-trainable]",
        "a static call reads the sizes of the shards every time",
    ),
    Mutant(
        "dpo_kernels/distributed/group.py",
        "return not static or checks_always()",
        "return True",
        _SYNCS + "[chunked-trainable]",
        "a static call compares the ranks every time",
    ),
    Mutant(
        "dpo_kernels/segments.py",
        "segments = torch.bucketize(place, counts_S.cumsum(0), right=True)",
        "segments = torch.repeat_interleave(place[: counts_S.shape[0]], counts_S)",
        _SYNCS + "[chunked-trainable]",
        "sums on a device of another kind wait for the counts",
    ),
    Mutant(
        "dpo_kernels/segments.py",
        "segments = torch.bucketize(place, counts_S.cumsum(0), right=True)",
        "segments = torch.bucketize(place, counts_S.cumsum(0))",
        _SYNCS + "[chunked-trainable]",
        "the first token of a sequence counts for the one before on a device of another kind",
    ),
]

_TRAINS = "tests/distributed/test_tensor_parallel_example.py::test_it_trains_as_one_process_does"

_EXAMPLE = [
    Mutant(
        "examples/tensor_parallel_dpo.py",
        "to_local(grad_placements=[Replicate()])",
        "to_local(grad_placements=[torch.distributed.tensor.Partial()])",
        _TRAINS,
        "the gradient of the hidden states is added up by the loss and by the layers",
    ),
    Mutant(
        "examples/tensor_parallel_dpo.py",
        "        tensor /= copies.size()\n",
        "        pass\n",
        _TRAINS + "[4]",
        "the copies of the model add up their gradients",
    ),
]

_SCALING = [
    Mutant(
        "benchmarks/scaling.py",
        "return self._ring(2 * size * (self.ranks - 1) / self.ranks, 2, links)",
        "return self._ring(2 * size * (self.ranks - 1), 2, links)",
        "tests/bench/test_scaling.py::test_collectives",
        "an all-reduce moves the whole at every hop",
    ),
    Mutant(
        "benchmarks/scaling.py",
        "links.network * (self.ranks // self.nodes)",
        "links.network",
        "tests/bench/test_scaling.py::test_collectives",
        "a node has one adapter for all of its GPUs",
    ),
    Mutant(
        "benchmarks/scaling.py",
        "return self.chunks + 1 + AGREEMENTS if self.given_bytes else 0",
        "return self.chunks + AGREEMENTS if self.given_bytes else 0",
        "tests/bench/test_scaling.py::test_a_call_has_as_many_collectives_and_bytes_as_the_model_says",
        "the sum of the gradient of the hidden states is no collective",
    ),
]

TENSOR_PARALLEL: list[Mutant] = [*_KERNELS, *_HOST, *_EXAMPLE, *_SCALING]
