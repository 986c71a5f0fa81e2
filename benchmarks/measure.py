"""One case: tensors, checks, peak memory, then times round by round, each told to ``tell`` as soon as it is known.

Everything that fails becomes a row with a reason. Only a broken device ends the process (``Broken``): the caller starts
another one, which goes on from what was told.
"""

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import data as tensors
from benchmarks import truth
from benchmarks.cases import Case, reduced
from benchmarks.devices import Broken, Device, OutOfMemory, guarded
from benchmarks.providers import Outputs, Provider, Step, Unavailable
from benchmarks.store import Event

Tell = Callable[[Event], None]
FAILED = object()  # what an attempt that became a reason returns
GPU_REPEATS = 3  # of one provider within a round on a GPU, where a call takes milliseconds


@dataclass(frozen=True)
class Effort:
    """How long a case may take."""

    budget_seconds: float = 60.0  # of timed rounds, if that many rounds are enough
    least_rounds: int = 3
    most_rounds: int = 15

    def rounds(self, seconds_per_round: float) -> int:
        """Rounds that fit the budget, within the limits."""
        fit = math.floor(self.budget_seconds / max(seconds_per_round, 1e-9))
        return min(self.most_rounds, max(self.least_rounds, fit))


class Measurement:
    """A case on a device. ``had`` is what an earlier process measured of it and is not measured again."""

    def __init__(
        self, case: Case, device: Device, providers: dict[str, Provider], had: dict[str, Any], tell: Tell
    ) -> None:
        self.case, self.device, self.had, self.tell = case, device, had, tell
        self.providers = {name: p for name, p in providers.items() if p.runs_in(case)}
        self.steps: dict[str, Step] = {}
        self.sketches: dict[str, truth.Sketch] = {}
        self.reduced: truth.Reduced | None = None

    def run(self, effort: Effort) -> None:
        """Everything that is not there yet."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a peer's deprecations are no news here
            self.tell({"event": "start", "provider": None, "what": "tensors"})
            self.data = tensors.make(self.case, self.device.torch_device)
            if self.had["data"] is None:
                self.tell({"event": "data", "data": tensors.statistics(self.data)})
            if any(self._row(name).get("reason") is None for name in self.providers):
                self._check()
                self._prepare()
                self._time(effort)
            self.tell({"event": "done"})

    # --- before any time ---

    def _check(self) -> None:
        """Errors against float64 on a reduced copy; whoever is red or cannot run gets a reason and no time."""
        waiting = [n for n, p in self.providers.items() if not {"gate", "reason"} & self._row(n).keys()]
        self._sizes = reduced(self.case, self.device.gate_tokens)
        if not waiting and all("memory" in self._row(n) or self._row(n).get("reason") for n in self.providers):
            return
        small = tensors.make(self._sizes, self.device.torch_device, seed=1, weight=self.data.weight)
        self.reduced = reference = truth.Reduced(small)
        for name in waiting:
            provider = self.providers[name]
            self._start(name, "check")
            if not provider.gated:
                self._put(name, {"gate": None})
                continue
            small.clear()
            outputs = self._attempt(name, self._first, provider, small)
            if outputs is FAILED:
                continue
            objective = provider.objective(self._sizes)
            errors = reference.errors(objective, outputs.loss, outputs.logps)
            bounds = truth.allowed(reference.plain, small, small, objective)
            self._judge(name, "gate", errors, bounds)
            if provider.token_logps is not None:
                logps = self._attempt(name, provider.token_logps, small)
                if logps is not FAILED:
                    self._put(name, {"token_error": _finite(reference.token_error(logps))})
        small.clear()

    def _first(self, provider: Provider, data: tensors.Data) -> Outputs | None:
        return provider.build(data, provider.variants(data.case)[0])()

    def _prepare(self) -> None:
        """Build each step at full size; choose its variant; check and weigh one call, which also warms it up."""
        for name, provider in self.providers.items():
            if self._row(name).get("reason"):
                continue
            self._start(name, "memory")
            if "variant" not in self._row(name) and self._attempt(name, self._tune, name) is FAILED:
                continue
            step = self._attempt(name, provider.build, self.data, self._row(name)["variant"])
            if step is FAILED:
                continue
            self._attempt(name, *((self._fresh, step) if "memory" in self._row(name) else (self._weigh, name, step)))
            if not self._row(name).get("reason"):
                self.steps[name] = step
        self.sketches.clear()
        self.reduced = None  # gigabytes of float64, which would keep a large case's providers from their memory
        self.data.clear()
        self.device.release()

    def _tune(self, name: str) -> None:
        """One call of each variant, after another where it compiles; the fastest is the provider's."""
        provider = self.providers[name]
        variants = provider.variants(self.case)
        sweep: list[dict[str, Any]] = []
        for variant in variants if len(variants) > 1 else []:
            self._start(name, f"variant {variant}")
            try:
                step = provider.build(self.data, variant)
                if self.device.kind in provider.compiles:
                    self._fresh(step)
                self.data.clear()
                seconds = self.device.seconds(partial(guarded, step))
            except OutOfMemory:
                continue
            sweep.append({"variant": variant, "seconds": _round(seconds)})
        if len(variants) > 1 and not sweep:
            raise OutOfMemory("no variant fits")
        best = min(sweep, key=_seconds)["variant"] if sweep else variants[0]
        self._put(name, {"variant": best, "sweep": sweep})

    def _weigh(self, name: str, step: Step) -> None:
        """Peak memory of one call at full size without the gradients it leaves, and those gradients' sketches."""
        provider = self.providers[name]
        if self.device.kind in provider.compiles:
            self._fresh(step)
        self.data.clear()
        peak, outputs = self.device.peak_bytes(partial(guarded, step))
        extra = None if peak is None else max(0, peak - self.data.output_bytes)
        if not provider.gated:
            self._put(name, {"memory": {"extra_bytes": None}})
            return
        assert isinstance(outputs, Outputs)
        objective = provider.objective(self.case)
        if objective not in self.sketches:
            self._start(name, "full-size truth")
            self.sketches[objective] = truth.sketch(self.data, objective)
        assert self.reduced is not None, "checked before anything is weighed"
        errors = self.sketches[objective].errors(self.data, outputs.loss, outputs.logps)
        bounds = truth.allowed(self.reduced.plain, self.data, self.reduced.data, objective)
        self._judge(name, "full_size", errors, bounds)
        self._put(name, {"memory": {"extra_bytes": extra, "output_bytes": self.data.output_bytes}})

    def _judge(self, name: str, what: str, errors: dict[str, float], bounds: dict[str, float]) -> None:
        green = truth.is_green(errors, bounds)
        found = {key: [_finite(error), _finite(bounds[key])] for key, error in errors.items()}
        self._put(name, {what: {"green": green, "errors": found}})
        if not green:
            worst = ", ".join(
                f"{key} {error:.1e} (allowed {bounds[key]:.1e})"
                for key, error in errors.items()
                if not error <= bounds[key]
            )
            self._put(name, {"reason": f"wrong: {worst}"})

    # --- times ---

    def _time(self, effort: Effort) -> None:
        """Everyone once per round, starting with another each round, until the budget is used."""
        number, cost = 0, None
        while cost is None or number < effort.rounds(cost):
            began, measured = time.perf_counter(), False
            for name in self._order(number):
                if self._row(name).get("reason") or any(at == number for at, _ in self._row(name)["rounds"]):
                    continue
                measured = True
                self._start(name, f"round {number + 1}")
                times = self._attempt(name, self._sample, name)
                if times is not FAILED:
                    self._remember(name, number, times)
                    self.tell({"event": "time", "provider": name, "round": number, "seconds": times})
            if not self.steps:
                return
            spent = time.perf_counter() - began if measured else self._cost(number)
            cost = spent if cost is None else cost
            number += 1

    def _order(self, number: int) -> Iterator[str]:
        names = list(self.steps)
        for at in range(len(names)):
            yield names[(at + number) % len(names)]

    def _sample(self, name: str) -> list[float]:
        times = []
        if self.device.kind == "cuda":
            # Blocks that another provider left in the caching allocator may be of no use to this one, and getting new
            # ones is slow: a call that is not timed gets them.
            self.device.release()
            self._fresh(self.steps[name])
        for _ in range(GPU_REPEATS if self.device.kind == "cuda" else 1):
            self.data.clear()
            times.append(_round(self.device.seconds(partial(guarded, self.steps[name]))))
        self.data.clear()
        return times

    def _cost(self, number: int) -> float:
        """Seconds of a round that an earlier process measured."""
        return sum(sum(times) for name in self.steps for at, times in self._row(name)["rounds"] if at == number)

    # --- bookkeeping ---

    def _attempt(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """The call's result, or FAILED with a reason in the row."""
        try:
            return guarded(partial(call, *arguments))
        except Unavailable as error:
            reason = str(error)
        except OutOfMemory as error:
            reason = f"out of memory: {error}"
        except Broken as error:
            self._put(name, {"reason": f"crashed: {error}"})
            raise
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its row, not our end
            reason = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error) else ''}"
        self._put(name, {"reason": reason})
        self.data.clear()
        gc.collect()  # the exception's frames may hold tensors
        self.device.release()
        return FAILED

    def _fresh(self, step: Step) -> None:
        self.data.clear()
        guarded(step)

    def _row(self, name: str) -> dict[str, Any]:
        row: dict[str, Any] = self.had["rows"].setdefault(name, {"rounds": []})
        return row

    def _remember(self, name: str, number: int, times: list[float]) -> None:
        rounds = self._row(name)["rounds"]
        if all(at != number for at, _ in rounds):
            rounds.append([number, times])

    def _put(self, name: str, row: dict[str, Any]) -> None:
        row = {"family": self.providers[name].family, **row}
        self._row(name).update(row)
        self.tell({"event": "row", "provider": name, "row": row})

    def _start(self, name: str, what: str) -> None:
        self.tell({"event": "start", "provider": name, "what": what})


def _seconds(tried: dict[str, Any]) -> float:
    seconds: float = tried["seconds"]
    return seconds


def _round(seconds: float) -> float:
    return float(f"{seconds:.6g}")


def _finite(value: float) -> float | str:
    """JSON has no infinities."""
    return float(f"{value:.3g}") if math.isfinite(value) else str(value)
