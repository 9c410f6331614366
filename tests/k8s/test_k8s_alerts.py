"""The alerts and dashboards: their language, and when the alerts fire."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import k8s_metrics
import promql_parser
import pytest
import yaml

pytestmark = pytest.mark.slow  # programs run

CASES = Path(__file__).with_name("alerts.yaml")


def test_every_expression_is_valid_promql_over_existing_metrics() -> None:
    """What a live cluster exports of them is compared in the tests that have one."""
    for expression in [
        *k8s_metrics.rules(),
        *(each for name in ("serving", "engine", "training") for each in k8s_metrics.panels(name)),
    ]:
        promql_parser.parse(expression.text.replace("$__rate_interval", "5m"))
        assert expression.metrics(), expression
        for metric in expression.metrics():
            ours = metric.startswith(("ray_gptj_", "ray_serve_", "ray_node_"))
            assert ours or metric in k8s_metrics.OF_OPERATORS, expression
        if not expression.metrics() - k8s_metrics.OF_OPERATORS.keys():
            assert k8s_metrics.missing({}, [expression]) == []


def test_missing_metrics_are_found() -> None:
    export = {"ray_gptj_training_step": {"run"}}
    wrong = k8s_metrics.Expression("here", "max by (rum) (ray_gptj_training_step)")
    assert k8s_metrics.missing(export, [wrong]) == ["here: none of its metrics has a label rum"]
    gone = k8s_metrics.Expression("here", 'sum(rate(ray_gptj_x_total{run="a"}[5m]))')
    assert "here: no ray_gptj_x_total is exported" in k8s_metrics.missing(export, [gone])
    assert k8s_metrics.missing(export, [gone], uncounted=["ray_gptj_x_total"]) == []


def test_each_alert_fires_only_when_it_should(tmp_path: Path) -> None:
    """By Prometheus' own evaluation."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool; remedy: apt-get install prometheus")
    rules = yaml.safe_load((k8s_metrics.MONITORING / "rules.yaml").read_text())
    alerts = {rule["alert"] for group in rules["spec"]["groups"] for rule in group["rules"]}
    bad, well, *_ = yaml.safe_load(CASES.read_text())["tests"]
    for case in (bad, well):
        assert {each["alertname"] for each in case["alert_rule_test"]} == alerts
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules["spec"]))
    shutil.copy(CASES, tmp_path)
    command = [promtool, "test", "rules", str(tmp_path / CASES.name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
