"""The one family of errors. Each message says what, where, expected and got, and what to do."""


class GnsError(Exception):
    """Base of every error raised by gnsfx."""


class OptionError(GnsError, ValueError):
    """A ``gns.*`` option that does not exist, or a value it does not take."""


class NotMeasuredError(GnsError, RuntimeError):
    """A reading was asked for, but no backward pass of a graph compiled with ``backend="gns"`` produced one."""


class RefusedError(GnsError, RuntimeError):
    """``strict=True`` and at least one trainable parameter cannot be measured exactly."""


class StateError(GnsError, ValueError):
    """A state or a log that is not what it should be: of another model, of another version, or damaged."""


class VerificationError(GnsError, AssertionError):
    """``gnsfx.verify`` found a parameter whose norms differ from per-example autograd."""


class RuleError(GnsError, ValueError):
    """A batch-axis rule is registered twice, or returns something that is not a state."""


class GraphError(GnsError, AssertionError):
    """A pass was given, or left behind, a joint graph that breaks its contract. Always a defect in gnsfx."""


class GnsWarning(UserWarning):
    """Training goes on, but something is not measured, or not as asked."""
