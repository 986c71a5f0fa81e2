"""A static model of the head on many GPUs: tensor parallelism splits the vocabulary, data parallelism the pairs.

A rank does the chunked step of ``model.py`` with its rows of the head, and waits for every exchange: nothing is taken
to hide behind a GEMM. For each chunk its group gathers three float32 numbers a token from every rank, and one for each
mean over the vocabulary. The gradient of the hidden states is added up over the group once, in float32. The gradient of
the head's rows is averaged over the copies of the model. That is named apart, because it can hide behind the backward
pass of the layers.

A collective is a ring. It takes a start, a latency for each hop, and its bytes at the bandwidth of the slowest link.
Starts and latencies are NCCL's own constants, by which it chooses its protocols. Bandwidths are those of data sheets,
of which large messages are taken to reach 80 %. Inside of a node all links are NVLink. Between nodes a group has one
network adapter for each of its GPUs in a node.

What it does not know: the host's wait in the two exchanges before the first product, hidden states that are gathered
in the call, traffic of other collectives on the same links, switches that add up by themselves, and the layers.
"""

from dataclasses import dataclass, replace

from benchmarks import model
from benchmarks.cases import Case
from dpo_kernels.device_specs import Gpu

LAUNCHES_OF_A_MERGE = 12  # small kernels that make one state of those of all ranks, each of which only has its launch
SUMS = 3  # float32 numbers of a token that travel: the largest logit, a sum of exponentials, the label's logit
AGREEMENTS = 2  # exchanges before the first product: sizes of the shards, and what each rank is about to do
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Protocol:
    """How NCCL moves the bytes of a ring: latencies in seconds, from its ``src/graph/tuning.cc`` at 01afd20."""

    start: float
    nvlink_hop: float
    network_hop: float
    share: float  # of the bandwidth; the rest are flags, or waits for them


SIMPLE = Protocol(8.4e-6, 3.4e-6, 9.6e-6, 1.0)  # for large messages
LOW_LATENCY = Protocol(3.6e-6, 0.47e-6, 2.7e-6, 0.25)  # a flag beside every 4 bytes, for small ones


@dataclass(frozen=True)
class Links:
    """What joins the GPUs. Bandwidths are byte/s of one GPU in one direction."""

    nvlink: float = 450e9  # H100 and H200 SXM data sheets: 900 GB/s in both directions together
    network: float = 50e9  # one adapter of 400 Gbit/s for each GPU, as in DGX H100
    node: int = 8  # GPUs of a node
    reached: float = 0.8  # share of a bandwidth that large messages reach, an assumption and not measured


@dataclass(frozen=True)
class Group:
    """The ranks of a collective, by the nodes that they are on."""

    ranks: int
    nodes: int

    @staticmethod
    def of(ranks: int, links: Links, stride: int = 1) -> "Group":
        """Return the group of every ``stride``-th GPU. It begins with a node."""
        in_a_node = max(1, links.node // stride)
        return Group(ranks, -(-ranks // in_a_node))

    def bandwidth(self, links: Links) -> float:
        """Return the bandwidth of the slowest link of the ring, byte/s."""
        if self.nodes == 1:
            return links.reached * links.nvlink
        return links.reached * min(links.nvlink, links.network * (self.ranks // self.nodes))

    def all_gather(self, given: float, links: Links) -> float:
        """Return the seconds of an all-gather to which each rank gives ``given`` bytes."""
        return self._ring(given * (self.ranks - 1), 1, links)

    def all_reduce(self, size: float, links: Links) -> float:
        """Return the seconds of an all-reduce of ``size`` bytes."""
        return self._ring(2 * size * (self.ranks - 1) / self.ranks, 2, links)

    def _ring(self, moved: float, rounds: int, links: Links) -> float:
        if self.ranks == 1:
            return 0.0
        between_nodes = rounds * (self.nodes - 1)
        hops = rounds * (self.ranks - 1) - between_nodes
        return min(
            each.start
            + hops * each.nvlink_hop
            + between_nodes * each.network_hop
            + moved / (each.share * self.bandwidth(links))
            for each in (SIMPLE, LOW_LATENCY)
        )


@dataclass(frozen=True)
class Step:
    """Of the head on one rank, forward and backward."""

    kernels: float  # seconds of the rank's own kernels, the merges of the states among them
    gathers: float  # seconds of the exchanges for chunks and of those before the first product
    reduction: float  # seconds of adding up the gradient of the hidden states
    averaging: (
        float  # seconds of averaging the gradient of the head's rows over the copies, which is not in ``seconds``
    )
    chunks: int
    given_bytes: int  # what a rank brings into the exchanges of its group
    averaged_bytes: int  # gradient of the head's rows
    memory_bytes: int  # the head's rows and their float32 gradient

    @property
    def seconds(self) -> float:
        """Without the averaging."""
        return self.kernels + self.gathers + self.reduction

    @property
    def collectives(self) -> int:
        """Those of the rank's own group: one a chunk, one of gradients, and the agreements."""
        return self.chunks + 1 + AGREEMENTS if self.given_bytes else 0


def step(case: Case, gpu: Gpu, ranks: int, copies: int = 1, links: Links | None = None, means: int = 0) -> Step:
    """Predict the head's step of one rank.

    Args:
        case: N scored tokens of one copy of the model, H, V, the dtype, and whether the head is trained.
        gpu: every rank's.
        ranks: those that hold a copy of the model together, tensor parallelism.
        copies: copies of the model, data parallelism.
        links: what joins the GPUs.
        means: means over the vocabulary that are asked for as statistics.

    """
    links = links or Links()
    own = replace(case, vocab=-(-case.vocab // ranks))
    work, rows, item = model.ours_chunked(own, gpu), model.chunk_rows(own), 4 if case.dtype == "float32" else 2
    chunks = -(-case.tokens // rows)
    dw_bytes = own.vocab * case.hidden * item if case.trainable else 0
    memory = own.vocab * case.hidden * (item + (FLOAT32 if case.trainable else 0))
    averaging = Group.of(copies, links, ranks).all_reduce(dw_bytes, links)
    if ranks == 1:
        return Step(work.seconds, 0.0, 0.0, averaging, chunks, 0, dw_bytes, memory)
    group, sent = Group.of(ranks, links), FLOAT32 * (SUMS + means)
    gathers = sum(group.all_gather(sent * tokens, links) for tokens in _even(case.tokens, chunks))
    gathers += AGREEMENTS * group.all_gather(FLOAT32, links)
    hidden_bytes = case.tokens * case.hidden * FLOAT32
    kernels = work.seconds + chunks * LAUNCHES_OF_A_MERGE * model.LAUNCH_SECONDS
    given = sent * case.tokens + hidden_bytes
    return Step(kernels, gathers, group.all_reduce(hidden_bytes, links), averaging, chunks, given, dw_bytes, memory)


def efficiency(case: Case, gpu: Gpu, ranks: int, links: Links | None = None) -> float:
    """Return the time of one GPU with the whole head, over the time of all ranks together on the same tokens."""
    split = step(case, gpu, ranks, links=links)
    return step(case, gpu, 1, links=links).seconds / (ranks * split.seconds)


def _even(tokens: int, chunks: int) -> list[int]:
    return [tokens * (at + 1) // chunks - tokens * at // chunks for at in range(chunks)]
