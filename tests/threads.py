"""Work that is repeated with another number of threads."""

import torch


def threaded(work):
    """The results with one thread, in a tuple, which two and three threads repeat bit by bit."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(work())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))
    return results[0]
