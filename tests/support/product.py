"""Where the product under test lives, in a form that every user in a box can read and run.

A box sees the checkout and its virtual environment at their own paths, whatever directory they are below: the
parents are made anew in the box. Only if the files themselves are closed to others is a readable copy shown instead.
"""

from __future__ import annotations

import atexit
import compileall
import functools
import os
import shutil
import sys
from pathlib import Path

from tests.support import namespaces

ROOT = Path(__file__).resolve().parents[2]
VENV = Path(sys.prefix)
INITD, FWCTL, PYTHON = VENV / "bin" / "initd", VENV / "bin" / "fwctl", VENV / "bin" / "python"
_OPEN_DIRECTORY, _OPEN_FILE = 0o005, 0o004


@functools.cache
def binds() -> list[tuple[str, str]]:
    """(source, target) pairs that a box needs besides /usr."""
    compileall.compile_dir(ROOT / "initd", quiet=2, workers=1)
    pairs = [(ROOT, ROOT)] if _open(ROOT / "initd") else [(_copy(ROOT / "initd"), ROOT / "initd")]
    if not VENV.is_relative_to(ROOT) or not _open(VENV):
        pairs.append((VENV if _open(VENV) else _copy(VENV), VENV))
    base = Path(sys.base_prefix)
    if not base.is_relative_to("/usr"):
        pairs.append((base, base))
    return [(str(source), str(target)) for source, target in pairs]


def _open(tree: Path) -> bool:
    """Whether everybody may read what is in a tree; a look at its top and at one level below is enough for umask."""
    for path in (tree, *tree.iterdir()):
        needed = _OPEN_DIRECTORY if path.is_dir() else _OPEN_FILE
        if not path.is_symlink() and path.stat().st_mode & needed != needed:
            return False
    return tree.is_relative_to(ROOT) is False or ROOT.stat().st_mode & _OPEN_DIRECTORY == _OPEN_DIRECTORY


def _copy(tree: Path) -> Path:
    """A readable copy of a tree that lives as long as this process."""
    target = namespaces.DIRECTORY / namespaces.unique("copy")
    shutil.copytree(tree, target, symlinks=True)
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    for directory, _, files in os.walk(target):
        for path in (Path(directory), *(Path(directory, name) for name in files)):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | (0o555 if path.is_dir() or path.stat().st_mode & 0o100 else 0o444))
    return target
