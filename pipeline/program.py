"""The name that a job is started by here, for messages that say what to type."""

import sys
from pathlib import Path


def name_program(job: str) -> str:
    """Return what to type for a job: ``python jobs/<job>.py`` in a program started so.

    Elsewhere, in Python and where the package is installed, it is ``image-<job>``.
    """
    typed = Path(sys.argv[0] if sys.argv else "")
    if typed.parent.name != "jobs" or typed.suffix != ".py":
        return f"image-{job}"
    folder = typed.parent
    if folder.is_absolute() and folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    return f"python {folder / job}.py"
