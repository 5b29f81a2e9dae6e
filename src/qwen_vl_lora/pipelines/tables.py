"""pandas' table by name, without pandas.

Kedro resolves every annotation of a node to find its parameters, so each name must be there when
pipelines are listed; importing pandas for a name would cost a third of that time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame as Table
else:
    Table = Any

__all__ = ["Table"]
