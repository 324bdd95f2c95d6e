"""What a model gave for the examples of a split, kept so that it is computed once.

A file holds the values, labels and indices of one key, which the caller makes of all that decides
them: weights, network, data, pipe and code. Beside it lies a small file with its checksum.
"""

import json
from typing import Any

from absl import logging

from vit_dist.config.errors import DataError
from vit_dist.evaluators.outputs import Arrays
from vit_dist.paths import expand, temporary_name
from vit_dist.storage.errors import only_warn
from vit_dist.storage.files import exists, make_folder, write_whole
from vit_dist.training.state_file import StateFile, Sums, write_state

# What the arrays are called in a file.
_NAMES = ("values", "labels", "indices")


class OutputCache:
    """Values, labels and indices by key: of the newest weights in memory, and of any in a folder.

    Args:
      folder: where they are kept for later, local or in a bucket; made if absent. "" for nowhere.
    """

    def __init__(self, folder: str = ""):
        self._folder = expand(folder) if folder else None
        self._weights = ""
        self._memory: dict[str, Arrays] = {}

    def get(self, weights: str, key: str, *, keep: bool = True) -> Arrays | None:
        """What was put under a key; None if nothing was, or if its file is damaged.

        Args:
          weights: a digest of the weights: what was computed with others is forgotten, as a run
            that trains would otherwise fill its memory.
          key: of letters and digits.
          keep: whether what is read from a file stays in memory.
        """
        if weights != self._weights:
            self._weights, self._memory = weights, {}
        found = self._memory.get(key)
        if found is None and self._folder is not None:
            found = self._read(key)
            if found is not None and keep:
                self._memory[key] = found
        return found

    def put(self, key: str, arrays: Arrays, *, facts: dict[str, Any], keep: bool = True) -> None:
        """Keeps arrays that were computed with the weights that `get` was last told of.

        Args:
          key: as in `get`.
          arrays: values, labels and indices.
          facts: written beside them, for people.
          keep: whether they stay in memory.

        Raises:
          OSError, OpError: the folder cannot be written.
        """
        if keep:
            self._memory[key] = arrays
        if self._folder is None:
            return
        make_folder(self._folder)
        data, facts_file = self._paths(key)
        # Under another name first, so that nobody sees half a file. The facts come last: without
        # them the data does not count.
        temporary = temporary_name(data)
        try:
            sums = write_state(temporary, dict(zip(_NAMES, arrays, strict=True)))
            temporary.replace(data)
        except BaseException:
            # On a full disk half a file takes up the room that a later attempt needs.
            with only_warn(f"removing {temporary}"):
                temporary.unlink(missing_ok=True)
            raise
        noted = {"size": sums.size, "crc32": sums.crc32, **facts}
        # write_whole also makes the names in the folder durable, that of the data included.
        write_whole(facts_file, json.dumps(noted, indent=2, default=str).encode())

    def _paths(self, key: str) -> tuple[Any, Any]:
        assert self._folder is not None, "nothing is kept on disk"
        return self._folder / f"{key}.safetensors", self._folder / f"{key}.json"

    def _read(self, key: str) -> Arrays | None:
        data, facts_file = self._paths(key)
        if not exists(data) or not exists(facts_file):
            return None
        try:
            noted = _parsed(facts_file.read_bytes(), str(facts_file))
            file = StateFile(data, noted)
            try:
                file.check()
                return file["values"], file["labels"], file["indices"]
            finally:
                file.close()
        except DataError as error:
            logging.warning("%s: it is computed and written again", error)
            return None


def _parsed(text: bytes, path: str) -> Sums:
    try:
        noted = json.loads(text)
        return Sums(size=int(noted["size"]), crc32=int(noted["crc32"]), arrays={})
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged: it holds no size and checksum") from None
