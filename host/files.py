"""Files that a workflow names: found on every system by the name it stores, with near matches offered where there is none."""

from __future__ import annotations

import difflib
from pathlib import Path

import folder_paths


class MissingFile(ValueError):
    """No such file in the host's model folders."""


def names(folder: str) -> list[str]:
    """Files of one of the host's model folders, as a workflow stores them: relative, with "/" on every system."""
    return [name.replace("\\", "/") for name in folder_paths.get_filename_list(folder)]


def resolve(folder: str, name: str) -> Path:
    """The path of a file named in a workflow, saved on whatever system. Raises MissingFile with near matches."""
    for candidate in (name, name.replace("\\", "/")):
        path = folder_paths.get_full_path(folder, candidate)
        # The host's own list decides: it does not lead out of its folders.
        if path is not None and candidate.replace("\\", "/") in names(folder):
            return Path(path)
    raise MissingFile(missing(folder, name))


def missing(folder: str, name: str) -> str:
    """What to tell about a name that is not there."""
    near = near_matches(name.replace("\\", "/"), names(folder))
    offer = f" Did you mean {' or '.join(repr(match) for match in near)}?" if near else ""
    return f"There is no file '{name}' in the {folder} folders.{offer} Put it into models/{folder} and refresh, or choose another file."


def near_matches(name: str, known: list[str], limit: int = 3) -> list[str]:
    """Names like `name`: first the same file in another folder, then similar spellings of the file's own name."""

    def stem(path: str) -> str:
        return path.rsplit("/", 1)[-1].rsplit(".", 1)[0].lower()

    close = difflib.get_close_matches(stem(name), {stem(other) for other in known}, n=limit, cutoff=0.6)
    return [other for match in close for other in known if stem(other) == match][:limit]


def fingerprint(folder: str, name: str) -> str:
    """Changes when the file does, so that a retrained file of the same name is seen."""
    try:
        stat = resolve(folder, name).stat()
    except MissingFile:
        return f"{name}: missing"
    return f"{name}: {stat.st_size} bytes, {stat.st_mtime_ns}"
