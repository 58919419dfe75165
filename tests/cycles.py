"""No cycles of objects are looked for while modules are imported, for seconds, since modules stay.
Imported before what takes long."""

import gc

gc.disable()


def look() -> None:
    """From here on, among what is made, not among what there is."""
    gc.freeze()
    gc.enable()
