"""Training states on disk: written by orbax, complete once a note with the digest of every file lies beside them."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

KEEP = 2  # checkpoints: the newest, and the one before it in case the newest turns out to be damaged


def save(folder: Path, step: int, state: Any, note: dict[str, Any]) -> None:
    """Write a state and a JSON-able note about it, atomically: a kill at any moment leaves the previous ones usable.

    Args:
      folder: of this training, holds its newest checkpoints.
      step: updates done so far.
      state: pytree of arrays.
      note: comes back from `restore` as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{step:06d}"
    shutil.rmtree(path, ignore_errors=True)  # from a run that was killed before its note was written
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), state)
    files = {str(file.relative_to(path)): _digest(file) for file in sorted(path.rglob("*")) if file.is_file()}
    write_atomically(path.with_suffix(".json"), json.dumps({"step": step, "note": note, "files": files}))
    keep = [note.stem for note in _notes(folder)[-KEEP:]]
    for entry in folder.iterdir():
        # Notes first: a folder without a note is nothing, a note without a folder is a damaged checkpoint.
        if entry.suffix == ".json" and entry.stem not in keep:
            entry.unlink()
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name not in keep:
            shutil.rmtree(entry)


def restore(folder: Path, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """The newest checkpoint as (step, state, note), None if there is none yet.

    Args:
      folder: given to `save`.
      like: pytree of arrays of the state's structure, shapes and dtypes.

    Raises:
      ValueError: a file is missing, cut short or changed; names it and the remedy.
    """
    notes = _notes(folder)
    if not notes:
        return None
    path = notes[-1].with_suffix("")
    then = f"training then goes on from step {int(notes[-2].stem)}" if notes[1:] else "training then starts over"
    remedy = f"Delete {notes[-1]} and run the same command again: {then}."
    try:
        saved = json.loads(notes[-1].read_text())
        step, note, files = saved["step"], saved["note"], saved["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the note of a checkpoint, {notes[-1]}, is damaged: {error}. {remedy}") from None
    for name, digest in files.items():
        file = path / name
        found = _digest(file) if file.is_file() else "missing"
        if found != digest:
            raise ValueError(f"a file of a checkpoint, {file}, is damaged: it is {found}, wanted {digest}. {remedy}")
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(path.absolute(), jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
    return step, state, note


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by new text so that a reader, or a run after a kill, sees the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _notes(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.json"))


def _digest(file: Path) -> str:
    content = file.read_bytes()
    return f"{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()[:16]}"
