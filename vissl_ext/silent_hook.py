"""What our hooks begin with: Classy Vision wants every event of a hook defined."""

from classy_vision.hooks import ClassyHook


class SilentHook(ClassyHook):
    """A hook all of whose events do nothing until a child says what."""

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
