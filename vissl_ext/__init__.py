"""VISSL 0.1.6 on today's stack, with the methods of ``plugins``.

Importing anything from here mends what keeps VISSL from being imported; spawned processes that unpickle one of our
functions need that before they import VISSL themselves.
"""

from vissl_ext.compat import activate

activate()
