"""A sample of tools/campaigns/serving.py."""

import asyncio
from pathlib import Path

from tests.serving.load import load
from tests.serving.served import save_model, serving


def test_many_clients_get_the_offline_engines_texts(tmp_path: Path) -> None:
    """Oracle: the offline engine; no request is lost, and no row is left behind."""
    with serving(save_model(tmp_path), slots=4, serving={"queue": 12}) as served:
        outcome = asyncio.run(load(served, 12, 4, seed=1))
        served.idle()
        assert outcome.wrong == []
        assert outcome.equal + outcome.left == 12 * 4
        assert outcome.left > 0 and min(outcome.kinds.values()) > 5
        assert served.engine.running == served.engine.waiting == 0
        assert served.service.open_tickets == 0
