"""What the interpreter finds in a kernel, one exception for each kind of bug."""


class Finding(AssertionError):
    """A bug in a kernel; the message names kernel, program and tensor."""


class OutOfBounds(Finding):
    """An active lane reads or writes outside the tensor that its pointer was made from."""


class Race(Finding):
    """Two programs, or two lanes of one store, meet at one location, at least one writing, not all atomically."""


class UninitialisedLanes(Finding):
    """What a masked load without ``other`` left undefined decides what is stored, addressed or branched on."""


class OrderDependence(Finding):
    """Results that depend on the order in which programs run."""


class AssertionFired(Finding):
    """``tl.device_assert`` or ``tl.assume`` does not hold."""


class IntegerOverflow(AssertionFired):
    """A sum, difference or product does not fit its integer type of 32 bits or fewer."""
