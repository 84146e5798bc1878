"""The second reader: uproot, which must find the same objects at the top level of a file that passed all other checks.

It parses the header, the root directory and its key list by code that is not ours, so that a mistake of ours in reading
names, classes or the number of keys does not pass. What it reads has been checked before, and is in memory in most files:
uproot neither opens the file nor inflates anything.
"""

from __future__ import annotations

from collections.abc import Collection

import uproot
import uproot.source.chunk

from root_keys import WINDOW, InvalidRootFile, Key, Reader, printable


class _UprootChunk(uproot.source.chunk.Chunk):  # type: ignore[misc]
    """Bytes for uproot, cut as a memory view, which takes half the time of its numpy arrays."""

    def __init__(self, source: _UprootSource, start: int, stop: int, data: bytes) -> None:
        super().__init__(source, start, stop, None)
        view = memoryview(data)

        # uproot asks seven times for each key. What is cut short shows itself: as an error, or as a different name.
        def get(begin: int, end: int, cursor: object, context: object) -> memoryview:
            return view[begin - start : end - start]

        # The same for all of the file.
        def get_of_all(begin: int, end: int, cursor: object, context: object) -> memoryview:
            return view[begin:end]

        self.get = get if start else get_of_all


class _UprootSource(uproot.source.chunk.Source):  # type: ignore[misc]
    """How uproot reads the open file: without a thread or a memory map, and a small file, which is in memory, at once."""

    closed = False

    def __init__(self, path: str, *, reader: Reader, **_: object) -> None:
        super().__init__()
        self._file_path = path
        self._reader = reader

    def chunk(self, start: int, stop: int) -> _UprootChunk:
        if self._reader.size <= WINDOW:
            data, _ = self._reader.read(0, self._reader.size)
            return _UprootChunk(self, 0, len(data), data)
        return _UprootChunk(self, start, stop, self._reader.pread(start, stop - start))

    def close(self) -> None:
        """Leave the file open; it is not uproot's."""


def compare_with_uproot(reader: Reader, keys: Collection[Key]) -> None:
    """Have uproot find the same objects at the top level, by name and class, and by cycle where a name has several."""
    try:
        root = uproot.open({"file": None}, handler=_UprootSource, reader=reader, object_cache=None, array_cache=None)
        expected = {key.name: key.class_name for key in keys}
        several_cycles = len(expected) < len(keys)
        found = root.classnames(recursive=False, cycle=several_cycles)
    except MemoryError:  # ours: what the file can ask for is bounded by now
        raise
    except Exception as error:  # whatever uproot stumbles over: ValueError, AssertionError, KeyError, ...
        if isinstance(error, OSError) and error.errno is not None:  # of reading the file; uproot's own have no number
            raise
        raise InvalidRootFile(f"uproot cannot read the file: {error!r}") from error
    # uproot's directory and keys refer to each other: cut, they are gone now and not when the garbage collector comes by.
    vars(root).clear()
    if several_cycles:
        expected = {f"{key.name};{key.cycle}": key.class_name for key in keys}
    if found != expected:
        other = min(dict(found.items() ^ expected.items()))
        raise InvalidRootFile(f"uproot finds other objects: {printable(other)!r}")
