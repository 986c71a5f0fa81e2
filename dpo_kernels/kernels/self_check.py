"""The self-check: every row operation of a backend, once, on a small problem, beside torch in float64 on the CPU.

Each operation is given inputs of its own, so that a mismatch names the kernel that made it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import LogitsGradient, RowKernels, RowScale, RowState
from dpo_kernels.kernels.small_problem import (
    CUT,
    OF_BFLOAT16,
    OF_FLOAT64,
    OF_GEMMS,
    OF_LOGITS,
    OF_SOFTCAP,
    TALL,
    WIDE,
    WIDTH,
    WIDTH_OF_PRODUCTS,
    Mismatch,
    Sigmoid,
    SmallProblem,
    in_float64,
)
from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.shapes import STATS, Head


def mismatches(kernels: type[RowKernels], dtype: torch.dtype, device: torch.device) -> list[Mismatch]:
    """Return what a backend computes otherwise than torch does in float64 on the CPU.

    Args:
        kernels: the class of the backend.
        dtype: dtype of the GEMM operands.
        device: where the backend's tensors lie. The CPU is one, too.

    Returns:
        The mismatches in the order of the operations, none for a healthy backend.

    Raises:
        RuntimeError: a kernel does not run.

    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return list(SelfCheck(kernels, dtype, device).run())


Result = TypeVar("Result")


class SelfCheck(SmallProblem):
    """The operations of a backend; each method checks a few of them."""

    def run(self) -> Iterator[Mismatch]:
        """Yield what differs."""
        yield from self.reductions()
        yield from self.gradients_of_tiles()
        for rich in (False, True):
            yield from self.projections(rich)
            yield from self.recomputed(rich)
            if self.ours.streams_logps:
                yield from self.streamed(rich)
        yield from self.sequences()

    def reductions(self) -> Iterator[Mismatch]:
        """Yield mismatches of ``reduce`` over two tiles, with every statistic, and of ``row_logps``."""
        rows, cols = WIDE
        z, labels, cut = self.logits(rows, cols), self.labels(rows, cols), int(CUT * cols)
        state = self.ours.new_state(rows, self.device, STATS)
        for start, stop in ((0, cut), (cut, cols)):
            tile = self.tile(rows, stop - start, z[:, start:stop])
            self.ours.reduce(state, tile, self.moved(labels), start)
        want, launch = self.whole_state(z, labels, STATS), f"{rows} x {cols} in two tiles, all statistics"
        yield from self.compare_states("reduce", launch, state, want)
        got_rows = self.ours.row_logps(state, self.moved(labels), cols)
        want_rows = self.truth.row_logps(want, labels, cols)
        pairs = {"logp": (got_rows.logp, want_rows.logp)}
        pairs |= {name: (got_rows.stats[name], want_rows.stats[name]) for name in STATS}
        yield from self.compare("row_logps", launch, pairs, OF_LOGITS)
        logp, tile, launch = (
            self.ours.buffer(self.device, rows),
            self.tile(rows, cols, z),
            f"{rows} x {cols}, whole rows",
        )
        one, want = self.ours.reduce_to_logps(tile, self.moved(labels), logp, True), self.whole_state(z, labels)
        yield from self.compare_states("reduce_to_logps", launch, one, want)
        pair = {"logp": (logp, self.truth.row_logps(want, labels, cols).logp)}
        yield from self.compare("reduce_to_logps", launch, pair, OF_LOGITS)

    def gradients_of_tiles(self) -> Iterator[Mismatch]:
        """Yield mismatches of ``dlogits_`` and ``reduce_and_dlogits``, and of the products with their results."""
        rows, cols = WIDE
        z, labels, cut = self.logits(rows, cols), self.labels(rows, cols), int(CUT * cols)
        state, scale = self.whole_state(z, labels), self.normal(rows).abs() + 0.5
        plain = self.head(cols, rich=False, width=WIDTH_OF_PRODUCTS)
        capped = replace(plain, softcap=8.0)
        size = f"{rows} x {cols}"

        one, launch = self.ours.new_state(rows, self.device, ()), f"{size}, whole rows"
        tile = self.tile(rows, cols, z)
        self.ours.reduce(one, tile, self.moved(labels), 0, keep_logits=False)
        yield from self.compare_states("reduce", launch, one, state)
        got = self.dlogits(tile, labels, 0, state, plain, scale, one.exponentiated)
        want = self.true_dlogits(z, labels, 0, state, plain, scale)
        yield from self.compare_gradient("dlogits_", launch, got, want, 0)
        yield from self.products(launch, got, plain, 0)

        launch = f"{rows} x {cols - cut} from column {cut}, softcap"
        got = self.dlogits(self.tile(rows, cols - cut, z[:, cut:]), labels, cut, state, capped, scale)
        want = self.true_dlogits(z[:, cut:], labels, cut, state, capped, scale)
        yield from self.compare_gradient("dlogits_", launch, got, want, cut)
        yield from self.products(launch, got, capped, cut)

        one, launch = self.ours.new_state(rows, self.device, ()), f"{size}, whole rows"
        got = self.ours.reduce_and_dlogits(one, self.tile(rows, cols, z), self.moved(labels), self.moved_head(plain))
        yield from self.compare_states("reduce_and_dlogits", launch, one, state)
        want = self.true_dlogits(z, labels, 0, state, plain, None)
        yield from self.compare_gradient("reduce_and_dlogits", launch, got, want, 0)

    def dlogits(
        self,
        tile: Tensor,
        labels: Tensor,
        start: int,
        state: RowState,
        head: Head,
        scale: Tensor | None,
        exponentiated: bool = False,
    ) -> LogitsGradient:
        """Return our gradient of a tile, from the true state."""
        at = (self.moved(labels), start, self.moved(state.max), self.moved(state.others))
        row_scale = None if scale is None else self.moved(scale)
        return self.ours.dlogits_(tile, *at, self.moved_head(head), row_scale, exponentiated)

    def true_dlogits(
        self, z: Tensor, labels: Tensor, start: int, state: RowState, head: Head, scale: Tensor | None
    ) -> LogitsGradient:
        """Return the true gradient of a tile."""
        return self.truth.dlogits_(z.clone(), labels, start, state.max, state.others, head, scale)

    def products(self, launch: str, d: LogitsGradient, head: Head, start: int) -> Iterator[Mismatch]:
        """Yield mismatches of the products with a gradient, written and then added."""
        rows, cols = d.values.shape
        width = head.weight.shape[1]
        x, true = self.short(rows, width, unit=2.0**-4), in_float64(d)
        moved, moved_x = self.moved_head(head), self.moved(x, self.dtype)
        shapes = {"grad_hidden": (rows, width), "grad_weight": (cols, width), "grad_bias": (cols,)}
        for name, shape in shapes.items():
            got = self.ours.buffer(self.device, *shape).fill_(torch.nan)
            want = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
            for accumulate in (False, True):
                for kernels, grad, given_head, given_x, out in (
                    (self.ours, d, moved, moved_x, got),
                    (self.truth, true, head, x, want),
                ):
                    if name == "grad_hidden":
                        kernels.grad_hidden(grad, given_head, start, out, accumulate)
                    elif name == "grad_weight":
                        kernels.grad_weight(grad, given_x, out, accumulate)
                    else:
                        kernels.grad_bias(grad, start, out, accumulate)
            yield from self.compare(name, f"{launch}, accumulated", {"product": (got, want)}, OF_GEMMS, floor=1.0)

    def projections(self, rich: bool) -> Iterator[Mismatch]:
        """Yield mismatches of ``project`` for two tiles."""
        rows, cols = TALL
        x, head, cut = self.short(rows, WIDTH, unit=2.0**-4), self.head(cols, rich), int(CUT * cols)
        for start, stop in ((0, cut), (cut, cols)):
            tile, want = self.tile(rows, stop - start), x.new_empty(rows, stop - start)
            self.ours.project(self.moved(x, self.dtype), self.moved_head(head), start, tile)
            self.truth.project(x, head, start, want)
            launch = f"{rows} x {stop - start} from column {start}, H={WIDTH}{_forms(rich)}"
            yield from self.compare("project", launch, {"logits": (tile, want)}, OF_LOGITS, floor=1.0)

    def recomputed(self, rich: bool) -> Iterator[Mismatch]:
        """Yield mismatches of ``recomputed_dlogits``, by every launch."""
        rows, cols = TALL
        x, head, labels = self.short(rows, WIDTH, unit=2.0**-4), self.head(cols, rich), self.labels(rows, cols)
        cut, scale, z = int(CUT * cols), self.normal(rows).abs() + 0.5, x.new_empty(rows, cols)
        self.truth.project(x, head, 0, z)
        state = self.whole_state(z, labels)
        want = self.true_dlogits(z[:, cut:], labels, cut, state, head, scale)
        moved = self.moved(x, self.dtype)

        def call() -> LogitsGradient:
            return self.ours.recomputed_dlogits(
                moved,
                self.moved_head(head),
                cut,
                self.tile(rows, cols - cut),
                self.moved(labels),
                self.moved(state.max),
                self.moved(state.others),
                self.moved(scale),
            )

        for name, got in self.by_launches("recomputed_dlogits", call, moved, rich):
            launch = f"{rows} x {cols - cut} from column {cut}, H={WIDTH}{_forms(rich)}{name}"
            yield from self.compare_gradient("recomputed_dlogits", launch, got, want, cut)

    def streamed(self, rich: bool) -> Iterator[Mismatch]:
        """Yield mismatches of ``stream_logps``, by every launch."""
        rows, cols = TALL
        x, head, labels = self.short(rows, WIDTH, unit=2.0**-4), self.head(cols, rich), self.labels(rows, cols)
        z, stats, moved = x.new_empty(rows, cols), STATS if rich else (), self.moved(x, self.dtype)
        self.truth.project(x, head, 0, z)
        want = self.whole_state(z, labels, stats)

        def call() -> RowState:
            return self.ours.stream_logps(moved, self.moved_head(head), self.moved(labels), stats)

        for name, got in self.by_launches("stream_logps", call, moved, rich):
            launch = f"{rows} x {cols}, H={WIDTH}{_forms(rich)}{name}"
            off = OF_SOFTCAP * (head.softcap or 0.0)
            yield from self.compare_states("stream_logps", launch, got, want, off, cols)

    def by_launches(
        self, operation: str, call: Callable[[], Result], x: Tensor, rich: bool
    ) -> Iterator[tuple[str, Result]]:
        """Yield what a call returns by each launch that this GPU and this compiler can take, with the launch's name.

        With ``rich`` only the first one is tried, since the code of the others is seldom used. Raises the error of the
        last launch if none can be taken.
        """
        errors: tuple[type[Exception], ...] = (RuntimeError, *self.kernels.launch_errors)
        results = 0
        refused: Exception | None = None
        for name, taken in self.ours.launches(operation, x, stats=rich and operation == "stream_logps"):
            try:
                with taken:
                    result = call()
            except errors as error:
                if not self.kernels.cannot_take(error):
                    raise
                refused = error  # the autotuner leaves such a launch out
                continue
            results += 1
            yield f"{name and ', ' + name}", result
            if rich:
                break
        if refused is not None and not results:
            raise refused

    def sequences(self) -> Iterator[Mismatch]:
        """Yield mismatches of sums over sequences, of the loss, and of the rounding of the head's gradient."""
        counts = torch.tensor([40, 0, 92, 1], device="cpu")
        rows, ref = int(counts.sum()), self.normal(4) * 20
        logp, weights = self.normal(rows).to(torch.float32), (self.normal(rows).abs() + 0.25).to(torch.float32)
        nothing, loss = ref.new_zeros(()), _as_loss(Sigmoid())
        got_sums = self.ours.segment_sum(self.moved(logp), self.moved(weights, torch.float32), self.moved(counts))
        want_sums = self.truth.segment_sum(logp, weights, counts)
        launch = f"{rows} tokens of 4 sequences"
        yield from self.compare("segment_sum", launch, {"sums": (got_sums, want_sums)}, OF_FLOAT64)
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        given = [value.to(self.device) for value in (logp, weights, counts, ref, nothing)]
        got_all = self.ours.sequence_loss(given[0], given[1], given[2], given[3], given[4], loss)
        want_all = self.truth.sequence_loss(logp, weights, counts, ref, nothing, loss)
        for name, got, want in zip(("sums", "losses", "slopes"), got_all, want_all, strict=True):
            pairs[name] = (got, want)
        yield from self.compare("sequence_loss", launch, pairs, OF_FLOAT64)
        yield from self.scales(launch, (logp, weights, counts, ref, nothing), loss)
        grad, factor = self.short(33, WIDTH, unit=2.0**-4), torch.tensor(0.75, dtype=self.sums, device=self.device)
        buffer = self.ours.buffer(self.device, 33, WIDTH).copy_(grad)
        rounded = self.ours.finalize_weight_grad(buffer, factor, self.dtype)
        if rounded is not None:
            pair = {"gradient": (rounded, 0.75 * grad)}
            yield from self.compare("finalize_weight_grad", f"33 x {WIDTH}", pair, OF_BFLOAT16)
        rows_of = torch.tensor([3, 33, 0, 32, 33], device="cpu")
        dx = torch.cat([grad, grad.new_zeros(1, WIDTH)])
        at_input = self.ours.to_input_rows(self.moved(dx), rows_of.to(self.device), factor, self.dtype)
        if at_input is not None:
            pair = {"rows": (at_input, 0.75 * dx[rows_of])}
            yield from self.compare("to_input_rows", f"5 of 33 rows x {WIDTH}", pair, OF_BFLOAT16)

    def scales(self, launch: str, of_tokens: tuple[Tensor, ...], loss: SequenceLoss) -> Iterator[Mismatch]:
        """Yield mismatches of the loss that also gives the factors of the rows."""
        logp, weights, counts, ref, nothing = of_tokens
        rows, segments = logp.shape[0], torch.repeat_interleave(torch.arange(4, device="cpu"), counts)
        highest, others = self.normal(rows), self.normal(rows).abs() + 0.5
        target, divisor = highest - self.normal(rows).abs(), torch.tensor(2.0, dtype=ref.dtype, device="cpu")
        true = RowScale(RowState(highest, others, target), segments, 0, 0.5, divisor, 3.0)
        state = RowState(self.moved(highest), self.moved(others), self.moved(target))
        ours = RowScale(state, segments.to(self.device), 0, 0.5, divisor.to(self.device), 3.0)
        given = [value.to(self.device) for value in of_tokens]
        got = self.ours.sequence_loss_and_scale(given[0], given[1], given[2], given[3], given[4], loss, ours)
        want = self.truth.sequence_loss_and_scale(logp, weights, counts, ref, nothing, loss, true)
        sums = {"sums": (got[0], want[0]), "losses": (got[1], want[1])}
        yield from self.compare("sequence_loss_and_scale", launch, sums, OF_FLOAT64)
        yield from self.compare("sequence_loss_and_scale", launch, {"factors": (got[2], want[2])}, OF_LOGITS)


def _forms(rich: bool) -> str:
    return ", bias, scale, softcap" if rich else ""


def _as_loss(loss: Sigmoid) -> SequenceLoss:
    """The loss as the interface types it; a backend asks for no more than it has."""
    return loss  # type: ignore[return-value]
