"""The files of launch/serving agree with each other, with the settings and with docs/serving.md.

tools/check_serving.py has the programs that read them look at them.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmnorm.config.file import sections
from llmnorm.config.serving import ServingSettings
from llmnorm.config.yaml_text import read_yaml
from tests.running import ROOT
from tools.check_serving import Behind, metrics_of

FILES = ROOT / "launch" / "serving"
DOCS = (ROOT / "docs/serving.md").read_text(encoding="utf-8")


def settings() -> ServingSettings:
    """Those of the service."""
    _, found = sections(("generation", "serving"), [], file=FILES / "serve.yaml")
    assert isinstance(found, ServingSettings)
    return found


def number(pattern: str, file: str) -> float:
    """The only number that a pattern finds in a file."""
    (found,) = re.findall(pattern, (FILES / file).read_text(), re.M)
    return float(found)


def test_every_limit_around_the_server_is_wider_than_its_own() -> None:
    """Oracle: serve.yaml, whose limits the others must let through."""
    ours = settings()
    assert ours.request_timeout is not None
    assert number(r"proxy_read_timeout (\d+)s;", "nginx.conf") > ours.request_timeout
    assert number(r"client_max_body_size (\d+)m;", "nginx.conf") * 2**20 == ours.body_limit
    assert number(r"^TimeoutStopSec=(\d+)$", "llmnorm.service") > ours.shutdown_timeout + 10
    (patience,) = re.findall(r"--stop-timeout (\d+)", DOCS)
    assert float(patience) > ours.shutdown_timeout + 10
    site = (FILES / "nginx.conf").read_text()
    assert f"location {ours.root_path}/ {{" in site
    assert f"server {ours.host}:{ours.port} " in site
    scraped = read_yaml(FILES / "prometheus.yml")["scrape_configs"][0]["static_configs"]
    assert scraped == [{"targets": [f"{ours.host}:{ours.port}"]}]


def test_each_alert_is_explained() -> None:
    """Oracle: the headings of docs/serving.md."""
    (group,) = read_yaml(FILES / "alerts.yml")["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert names == re.findall(r"^### (Llmnorm\w+)$", DOCS, re.M) and len(names) == 4
    for rule in group["rules"]:
        name = rule["alert"].lower()
        assert rule["annotations"]["runbook"] == f"docs/serving.md#{name}"
        assert rule["for"] and rule["annotations"]["summary"] and rule["labels"]["severity"]


def test_a_histograms_series_are_its_own_metric() -> None:
    """Oracle: by hand."""
    query = "rate(llmnorm_a_seconds_bucket[5m]) / llmnorm_b_total + my_llmnorm_c"
    assert metrics_of(query) == {"llmnorm_a_seconds", "llmnorm_b_total"}


def test_the_dashboards_panels_do_not_overlap() -> None:
    """Oracle: the cells of Grafana's grid, 24 wide."""
    board: dict[str, Any] = json.loads((FILES / "grafana.json").read_text())
    cells: list[tuple[int, int]] = []
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells += [(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])]
        assert panel["targets"] and panel["description"]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_the_unit_has_no_root() -> None:
    """Oracle: the unit's own lines; tests/test_container.py has the image's."""
    unit = (FILES / "llmnorm.service").read_text().splitlines()
    assert {"User=llmnorm", "NoNewPrivileges=yes", "CapabilityBoundingSet="} <= set(unit)


@pytest.mark.skipif(
    shutil.which("nginx") is None or shutil.which("openssl") is None,
    reason="needs nginx and openssl",
)
def test_nginx_says_in_openais_shape_that_there_is_no_server(tmp_path: Path) -> None:
    """Oracle: a real nginx with the site, and nothing behind it."""
    behind = Behind(tmp_path / "nothing", tmp_path)
    try:
        got = behind.ask("/llm/v1/models")
        assert (got.status, got.headers["retry-after"]) == (503, "5")
        assert got.json()["error"]["code"] == "loading"
        got = behind.ask("/llm/v1/completions", b" " * 10_000_000)
        assert (got.status, got.json()["error"]["code"]) == (413, "request_too_large")
        assert behind.ask("/llm/metrics").status == 404
    finally:
        behind.close()
