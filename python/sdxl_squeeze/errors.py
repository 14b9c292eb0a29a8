"""The errors of this package."""

from __future__ import annotations

import os


class ContainerError(ValueError):
    """A file that is not a container, or is a damaged one. The message names the file, the tensor and the cause."""

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        super().__init__(f"{os.fspath(path)}: {problem}")
        self.path = path
        self.problem = problem

    def __reduce__(self) -> tuple[type[ContainerError], tuple[str | os.PathLike[str], str]]:
        # Errors cross from worker processes by pickle, which would call the class with the message alone.
        return type(self), (self.path, self.problem)
