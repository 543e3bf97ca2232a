"""Training states on disk: written by orbax, complete once a note with the digest of every file lies beside them."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sparseflax.cost.atomic import write_atomically

KEEP = 2  # checkpoints: the newest, and the one before it in case the newest turns out to be damaged


def save(folder: Path, step: int, state: Any, note: dict[str, Any]) -> None:
    """Write a state and a JSON-able note about it, atomically: a kill at any moment leaves the previous ones usable.

    Args:
      folder: of this training, holds its newest checkpoints; of many processes, one that all see.
      step: updates done so far.
      state: pytree of arrays.
      note: comes back from `restore` as it is.

    Raises:
      OSError: the folder cannot be written, or the disk is full; what was there before stays.
    """
    path, first = folder / f"{step:06d}", jax.process_index() == 0
    try:
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
        with ocp.StandardCheckpointer() as checkpointer:  # of many processes, all call this, and wait for each other
            checkpointer.save(path.absolute(), state)
        if not first:
            return
        files = {str(file.relative_to(path)): _digest(file) for file in sorted(path.rglob("*")) if file.is_file()}
        content = {"step": step, "note": note, "files": files, "arrays": _arrays(state)}
        write_atomically(path.with_suffix(".json"), json.dumps(content))
    except (OSError, ValueError) as error:  # tensorstore raises the latter when the disk is full
        if first and folder.is_dir():
            _sweep(folder)
        raise OSError(f"the checkpoint of step {step} cannot be written to {folder}: {error}. Free space there or make it "
                      "writable, and give the same command again: it goes on from the checkpoint before") from error
    keep = [note.stem for note in _notes(folder)[-KEEP:]]
    for entry in folder.iterdir():
        # Notes first: a folder without a note is nothing, a note without a folder is a damaged checkpoint.
        if entry.suffix == ".json" and entry.stem not in keep:
            entry.unlink()
    _sweep(folder)


def restore(folder: Path, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """The newest checkpoint as (step, state, note), None if there is none yet.

    Args:
      folder: given to `save`.
      like: pytree of arrays of the state's structure, shapes and dtypes.

    Raises:
      ValueError: a file is missing, cut short or changed, or the checkpoint is of another state; names it and the remedy.
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
    wanted = _arrays(like)
    arrays = saved.get("arrays", wanted)  # older ones do not say
    different = [f"{name} is {arrays.get(name, 'missing')}, wanted {wanted.get(name, 'nothing of that name')}"
                 for name in arrays | wanted if arrays.get(name) != wanted.get(name)]
    if different:
        more = f" and {len(different) - 5} more" if different[5:] else ""
        raise ValueError(f"{path} is a checkpoint of another network, optimizer or version: {'; '.join(different[:5])}{more}. "
                         f"Choose another out, or delete {folder}.")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            state = checkpointer.restore(path.absolute(), jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is a checkpoint of another state or version ({error}). {remedy}") from error
    return step, state, note


def _sweep(folder: Path) -> None:
    """Removes what has no note: of a run that was killed, or found the disk full, before its note was written."""
    notes = {note.stem for note in _notes(folder)}
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name not in notes:
            shutil.rmtree(entry, ignore_errors=True)


def _arrays(state: Any) -> dict[str, str]:
    """{path: dtype and shape}"""
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _notes(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.json"))


def _digest(file: Path) -> str:
    content = file.read_bytes()
    return f"{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()[:16]}"
