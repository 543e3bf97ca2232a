"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replaces a file by new content, so that a reader, or a run after a kill, sees the old one or the new.

    Raises:
      OSError: its folder is not there or cannot be written, or the disk is full; what was there before stays.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")  # writers do not meet
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
