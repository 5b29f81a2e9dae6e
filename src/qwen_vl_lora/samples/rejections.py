"""The table of rejected rows: `rejected_samples`, and `left_out_samples` of training in the same form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qwen_vl_lora.samples.records import Rejection
from qwen_vl_lora.samples.texts import printable

if TYPE_CHECKING:
    import pandas as pd

MAX_DETAIL_CHARACTERS = 500


def rejection_table(rejections: Sequence[Rejection]) -> pd.DataFrame:
    """Return a table with the columns `row`, `image_id`, `reason` and `detail`, in the order of the rejections."""
    import pandas as pd

    return pd.DataFrame(
        {
            "row": pd.Series([bad.row for bad in rejections], dtype="int64"),
            "image_id": text_column(printable(bad.image_id) for bad in rejections),
            "reason": text_column(bad.reason for bad in rejections),
            "detail": text_column(printable(bad.detail, MAX_DETAIL_CHARACTERS) for bad in rejections),
        }
    )


def text_column(texts: Iterable[str]) -> pd.Series[str]:
    """Return a column that shares the given texts; pandas' own string type would copy them."""
    import pandas as pd

    return pd.Series(list(texts), dtype="object")
