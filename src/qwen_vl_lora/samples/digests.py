"""Which of millions of texts are equal, in 16 bytes a text."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_BYTES = 16
"""By chance two of 10¹² texts have the same hash with a probability of 10⁻¹⁵."""


class Digests:
    """Hashes of texts, in the order in which they were added."""

    def __init__(self) -> None:
        self._hashes = bytearray()

    def add(self, text: str) -> None:
        self._hashes += hashlib.blake2b(text.encode(), digest_size=_BYTES).digest()

    def __len__(self) -> int:
        return len(self._hashes) // _BYTES

    @property
    def num_different(self) -> int:
        """How many different texts were added."""
        import numpy as np

        return len(np.unique(self._numbers))

    def first_places(self) -> npt.NDArray[np.int64]:
        """Return for each text the place of the first equal one, which is its own if it is new."""
        import numpy as np

        _, first, own = np.unique(self._numbers, return_index=True, return_inverse=True)
        places: npt.NDArray[np.int64] = first[own]
        return places

    @property
    def _numbers(self) -> npt.NDArray[np.bytes_]:
        import numpy as np

        return np.frombuffer(self._hashes, dtype=f"S{_BYTES}")
