from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest

from evaluation.rows import Row, table_of
from qwen_vl_lora.parameters import ScoringParameters


@pytest.fixture
def make_predictions() -> Callable[[list[Row]], pd.DataFrame]:
    return table_of


@pytest.fixture
def scoring() -> ScoringParameters:
    return ScoringParameters(tokenizer="ptb", bootstrap_samples=200, seed=7, settings_from="parameters")
