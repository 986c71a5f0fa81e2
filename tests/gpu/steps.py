"""What the GPU tests do, by device: the same body runs on the CPU, so that its logic is tried before a GPU is there."""

import weakref
from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dpo_kernels as dk
from dpo_kernels.shapes import accumulation_dtype
from tests.cases import Case, run
from tests.tolerance import RELATIVE_L2_BAR, TWO_ROUNDINGS_BAR, log_prob_error, relative_l2

MIB = 2**20


def inputs_of(case, device, seed=0):
    return case.tensors(seed, device=device)


def step(inputs, **options):
    """Loss and gradients of a call."""
    leaves = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    out = dk.fused_dpo_loss(**inputs, **options)
    return [out.loss.detach(), *torch.autograd.grad(out.loss, leaves)]


def assert_equal_bits(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def compiled_is_eager(device, backend, compiler):
    """One graph, forward and backward, with the bits of the eager call up to what a compiler reorders around it."""
    case = Case(torch.bfloat16, bias=True)
    inputs, options = inputs_of(case, device), {**case.keywords(), "backend": backend}

    def loss(hidden, weight, bias, labels, ref_logps):
        return dk.fused_dpo_loss(hidden, weight, labels, bias=bias, ref_logps=ref_logps, **options).loss

    arguments = [inputs[name] for name in ("hidden", "weight", "bias", "labels", "ref_logps")]
    torch._dynamo.reset()
    found = []
    for call in (loss, torch.compile(loss, backend=compiler, fullgraph=True)):
        value = call(*arguments)
        found.append([value.detach(), *torch.autograd.grad(value, arguments[:3])])
    torch._dynamo.reset()
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-7)
    for eager, other in zip(found[0][1:], found[1][1:], strict=True):
        assert relative_l2(other, eager) <= 1e-3


def autocast_rounds_the_operands_alone(device, backend, dtype):
    """Float32 parameters under autocast: the loss of the rounded operands, and float32 gradients."""
    rounded = inputs_of(Case(dtype), device)
    wide = {
        name: value.detach().float().requires_grad_(value.requires_grad) if value.is_floating_point() else value
        for name, value in rounded.items()
    }
    options = {"backend": backend}
    want = step(rounded, **options)
    with torch.autocast(torch.device(device).type, dtype):
        got = step(wide, **options)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-7)
    for grad, other in zip(got[1:], want[1:], strict=True):
        assert grad.dtype == torch.float32
        assert relative_l2(grad, other) <= TWO_ROUNDINGS_BAR[dtype]


def main_grad_gains_what_autograd_gets(device, backend, dtype):
    """Two calls add to one buffer; the gain of each is the gradient that autograd would have got."""
    case = Case(dtype)
    inputs = inputs_of(case, device)
    options = {**case.keywords(), "backend": backend, "strategy": "chunked"}
    _, _, grad = step(inputs, **options)
    buffer = torch.zeros(grad.shape, dtype=accumulation_dtype(dtype), device=device)
    for calls in (1, 2):
        dk.fused_dpo_loss(**inputs, **options, main_grad=buffer).loss.backward()
        assert relative_l2(buffer / calls, grad) <= TWO_ROUNDINGS_BAR.get(dtype, RELATIVE_L2_BAR[dtype])
    assert inputs["weight"].grad is None


def sequences_and_groups(device, backend):
    """KTO, BCO, Plackett-Luce and InfoNCE beside float64 on the CPU."""
    inputs = inputs_of(Case(torch.bfloat16), device)
    wide = {
        name: value.detach().to("cpu", torch.float64 if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    for name in ("hidden", "weight"):
        wide[name].requires_grad_()
    desirable = torch.tensor([True, False, True, True, False, False])

    def calls(given, where, name):
        moved = desirable.to(where)
        return {
            "kto": lambda: dk.fused_kto_loss(**given, desirable=moved, kl=0.7, undesirable_weight=2.0, backend=name),
            "bco": lambda: dk.fused_kto_loss(**given, desirable=moved, loss_type="bco", delta=0.3, backend=name),
            "ranked": lambda: dk.fused_group_loss(**given, group_sizes=[3, 1, 2], backend=name),
            "infonce": lambda: dk.fused_group_loss(**given, group_sizes=[2, 4], loss_type="infonce", backend=name),
        }

    mine, truth = calls(inputs, device, backend), calls(wide, "cpu", "torch")
    for what, call in mine.items():
        found = []
        for each, given in ((call, inputs), (truth[what], wide)):
            out = each()
            grads = torch.autograd.grad(out.loss, [given["hidden"], given["weight"]])
            found.append([out.loss.detach().cpu(), *(grad.cpu() for grad in grads)])
        (loss, *grads), (true_loss, *true_grads) = found
        torch.testing.assert_close(
            loss.double(), true_loss, rtol=1e-4, atol=1e-5, msg=lambda text, w=what: f"{w}: {text}"
        )
        for grad, true in zip(grads, true_grads, strict=True):
            assert relative_l2(grad, true) <= TWO_ROUNDINGS_BAR[torch.bfloat16], what


def log_probs_of_a_wide_head_are_float32(device, backend, strategy):
    """Token log-probs against float64; logits rounded to bfloat16 would be off by 0.07 nats."""
    g = torch.Generator().manual_seed(0)
    width, vocab, deviation = 4096, 2048, 6.0
    hidden = torch.randn(4, 8, width, generator=g).to(device, torch.bfloat16)
    weight = (torch.randn(vocab, width, generator=g) * deviation * width**-0.5).to(device, torch.bfloat16)
    logits = hidden.double() @ weight.double().t()
    order = logits.argsort(-1)
    for labels in (order[..., 0], order[..., vocab // 2], order[..., -1]):
        exact = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        got = dk.fused_token_logps(hidden, weight, labels, strategy=strategy, backend=backend)
        allowed = log_prob_error(width, float(logits.abs().max()), on_a_gpu=device == "cuda")
        assert float((got.double() - exact).abs().max()) <= allowed


# --- memory -----------------------------------------------------------------------------------------------------------


def predicted_bytes(plan, rows):
    """The most that a call with ``rows`` rows of hidden states holds beside its inputs, by its plan and the docs."""
    work, wide = plan.workload, accumulation_dtype(plan.workload.dtype).itemsize
    narrow = work.dtype.itemsize
    head = work.vocab * work.width * (wide + narrow) if work.needs_grad.head else 0
    # dX is summed by token, scattered to the input's rows and rounded. A chunk's rows are gathered, scaled, rounded.
    hidden = work.num_tokens * work.width * 2 * wide + rows * work.width * (wide + narrow)
    chunk = plan.tile.rows * work.width * 2 * (wide + narrow)
    by_token = work.num_tokens * 40 * 8  # some forty numbers of at most eight bytes
    return plan.scratch_bytes + plan.extra_bytes + head + hidden + chunk + by_token


class Live(TorchDispatchMode):
    """The most bytes at a time of the storages that operations made; what an operator holds inside is not seen."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf.untyped_storage())
        return out

    def add(self, storage):
        if storage._cdata in self.sizes or not storage.nbytes():
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, key):
        self.now -= self.sizes.pop(key)


def peak_of(call, device):
    """Peak bytes of a call over what was there before; on a CPU of the storages that torch's operations make."""
    if torch.device(device).type != "cuda":
        with Live() as live:
            call()
        return live.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_is_what_the_plan_says(device, backend, dtype, sizes, scratch_bytes, slack):
    """A call holds no more than its plan and the table of memory say, and that is less than the logits alone."""
    rows, length, width, vocab = sizes
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, length, width, generator=g).to(device, dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).mul_(width**-0.5).to(device, dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows, length), generator=g).to(device)
    options = {"reference_free": True, "backend": backend, "scratch_bytes": scratch_bytes, "strategy": "chunked"}
    plan = dk.explain(hidden, weight, labels, **options)
    assert plan.chunks > 1
    predicted = predicted_bytes(plan, rows * length)

    def call():
        dk.fused_dpo_loss(hidden, weight, labels, **options).loss.backward()
        hidden.grad = weight.grad = None

    call()  # compiles, and lets libraries take their workspaces
    peak = peak_of(call, device)
    assert scratch_bytes // 2 < peak <= predicted + slack, f"{peak / MIB:.4g} MiB, predicted {predicted / MIB:.4g}"
    return peak, predicted


# --- streams, determinism ---------------------------------------------------------------------------------------------


def two_streams_do_not_mix(device, backend):
    """Calls that take turns on two streams give the bits of calls one after another."""
    case = Case(torch.bfloat16, weights=True)
    data = [inputs_of(case, device, seed) for seed in (0, 1)]
    options = {**case.keywords(), "backend": backend}
    alone = [step(inputs, **options) for inputs in data]
    cuda = torch.device(device).type == "cuda"
    streams = [torch.cuda.Stream() for _ in data] if cuda else [None, None]
    for stream in streams if cuda else ():
        stream.wait_stream(torch.cuda.current_stream())
    found = [[], []]
    for _ in range(4):
        for number, (inputs, stream) in enumerate(zip(data, streams, strict=True)):
            with torch.cuda.stream(stream) if cuda else nullcontext():
                found[number].append(step(inputs, **options))
    if cuda:
        torch.cuda.synchronize()
    for expected, results in zip(alone, found, strict=True):
        for result in results:
            assert_equal_bits(expected, result)


def deterministic_mode_runs(device, backend, strategy):
    """Under ``torch.use_deterministic_algorithms`` nothing raises, and bits repeat."""
    case = Case(torch.bfloat16, bias=True, weights=True, reference="hidden")
    inputs, options = inputs_of(case, device), {**case.keywords(), "backend": backend, "strategy": strategy}
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first = run(dk.fused_dpo_loss, inputs, **options)
        for _ in range(3):
            again = run(dk.fused_dpo_loss, inputs, **options)
            assert all(torch.equal(first[key], again[key]) for key in first)
    finally:
        torch.use_deterministic_algorithms(before)


# --- a trainer --------------------------------------------------------------------------------------------------------


def trainer_logs_are_trls(device, folder):
    """Two steps of TRL's trainer and of ours have the same logs."""
    import trl

    from dpo_kernels.integrations.trl import FusedDPOTrainer
    from tests import trl_helpers

    found = []
    for trainer_class in (trl.DPOTrainer, FusedDPOTrainer):
        cpu = torch.device(device).type == "cpu"
        log, trainer = trl_helpers.run(trainer_class, folder, steps=2, use_cpu=cpu)
        assert trainer.accelerator.device.type == torch.device(device).type
        found.append(log)
    assert trainer.fallback_reason == ""
    assert len(found[0]) == len(found[1]) >= 3
    for theirs, ours in zip(*found, strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "eval_loss"):
            if key in theirs:
                assert abs(ours[key] - theirs[key]) <= 1e-4 * max(1.0, abs(theirs[key])), key
