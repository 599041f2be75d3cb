"""Base class of hooks. Classy Vision requires that a hook defines a method for each event."""

from classy_vision.hooks import ClassyHook


class SilentHook(ClassyHook):
    """A hook whose methods do nothing by default."""

    on_start = ClassyHook._noop
    on_phase_start = ClassyHook._noop
    on_forward = ClassyHook._noop
    on_loss_and_meter = ClassyHook._noop
    on_backward = ClassyHook._noop
    on_update = ClassyHook._noop
    on_step = ClassyHook._noop
    on_phase_end = ClassyHook._noop
    on_end = ClassyHook._noop
    on_exception = ClassyHook._noop
