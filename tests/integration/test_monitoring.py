"""Rules, dashboard and runbook: every query means something at the real ``/metrics``, and every alert has its page."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import promql_parser as promql
import pytest
import yaml

from support.api import LIKE
from support.collector import Scrape
from support.telemetry import watched
from tidings.telemetry.catalogue import CATALOGUE, LATENCY_S, Kind
from tidings.wire import subject

ROOT: Final = Path(__file__).parents[2]
RULES: Final = yaml.safe_load((ROOT / "infra/prometheus/rules.yml").read_text())
OPERATIONS: Final = (ROOT / "docs/operations.md").read_text()
SCRAPED_BY: Final = {"instance", "job"}
"""Labels that Prometheus itself adds."""


def rules(kind: str) -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"] if kind in rule]


def dashboard_module() -> Any:
    spec = importlib.util.spec_from_file_location("dashboard_build", ROOT / "infra/grafana/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def queries() -> Iterator[tuple[str, str]]:
    """Every PromQL expression that is shipped, with where it is."""
    for rule in [*rules("record"), *rules("alert")]:
        yield rule.get("record") or rule["alert"], rule["expr"]
    for panel in dashboard_module().dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", target["expr"].replace("$__rate_interval", "1m")


def walk(node: Any, grouped: frozenset[str] = frozenset()) -> Iterator[tuple[promql.VectorSelector, frozenset[str]]]:
    """The selectors of an expression, each with the labels that it is grouped by."""
    if isinstance(node, promql.VectorSelector):
        yield node, grouped
    elif isinstance(node, promql.MatrixSelector):
        yield node.vector_selector, grouped
    elif isinstance(node, promql.AggregateExpr):
        by = frozenset() if node.modifier is None else frozenset(node.modifier.labels)
        yield from walk(node.expr, grouped | by)
    elif isinstance(node, promql.Call):
        for argument in node.args:
            yield from walk(argument, grouped)
    elif isinstance(node, promql.BinaryExpr):
        yield from walk(node.lhs, grouped)
        yield from walk(node.rhs, grouped)
    elif isinstance(node, promql.ParenExpr | promql.UnaryExpr | promql.SubqueryExpr):
        yield from walk(node.expr, grouped)
    else:
        assert isinstance(node, promql.NumberLiteral | promql.StringLiteral), node


def selected(scrapes: Iterable[Scrape], selector: promql.VectorSelector) -> list[dict[str, str]]:
    """The labels of the series of real agents that a selector finds."""
    series = [
        one.labels
        for text in scrapes
        for family in text.families.values()
        for one in family.samples
        if one.name == selector.name
    ]
    for matcher in selector.matchers.matchers:
        pattern = matcher.value if matcher.op == promql.MatchOp.Re else re.escape(matcher.value)
        assert matcher.op in (promql.MatchOp.Re, promql.MatchOp.Equal), matcher
        for alternative in pattern.split("|"):
            assert any(re.fullmatch(alternative, labels.get(matcher.name, "")) for labels in series), (
                f"{selector}: no series has {matcher.name}={alternative!r}"
            )
        series = [labels for labels in series if re.fullmatch(pattern, labels.get(matcher.name, ""))]
    return series


async def test_every_query_finds_series(tmp_path: Path) -> None:
    """Of a mesh with traffic, each selector of rules and dashboard finds series with the labels it is grouped by."""
    async with watched(tmp_path) as world:
        phone = await world.mesh.online(world.agents["gateway"], "alice")
        await phone.ask("sub", topics=["post.1"])
        await world.post({"user": "alice", "event": LIKE})
        await world.post({"topic": "post.1", "event": LIKE})
        await phone.until(lambda: len(phone.items) == 2, "both")
        await world.mesh.connection.store(subject.notify_user("alice"), b"no event")
        scrapes: list[Scrape] = []
        async with asyncio.timeout(20):
            # How far each consumer is behind is said when it was asked for the first time.
            while {"inbox", "broadcasts", "fanout"} - lagging(scrapes):
                scrapes = list((await world.scraped()).values())
                await asyncio.sleep(0.1)
    recorded = {rule["record"] for rule in rules("record")}
    used: set[str] = set()
    for where, query in queries():
        for selector, grouped in walk(promql.parse(query)):
            if selector.name in recorded:
                continue
            assert selector.name is not None, where
            found = selected(scrapes, selector)
            assert found, f"{where}: {selector} finds nothing"
            missing = {label for label in grouped - SCRAPED_BY if not any(label in labels for labels in found)}
            assert not missing, f"{where}: {selector} is grouped by {missing}, which it has not"
            used.add(selector.name)
    shown = {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in used}
    assert shown == {one.prometheus for one in CATALOGUE.values()}, "each metric is somewhere on the dashboard"


def lagging(scrapes: Iterable[Scrape]) -> set[str]:
    """Of which consumers it is known how far they are behind."""
    found = [one.families["tidings_stream_lag"] for one in scrapes if "tidings_stream_lag" in one.families]
    return {sample.labels["consumer"] for family in found for sample in family.samples}


def test_rules_are_whole() -> None:
    """Names are unique, each alert is complete, and each has its section in the runbook."""
    names = [rule.get("record") or rule["alert"] for rule in [*rules("record"), *rules("alert")]]
    assert len(names) == len(set(names))
    recorded = set(names)
    sections = {heading.lower() for heading in re.findall(r"^### (\w+)$", OPERATIONS, re.MULTILINE)}
    for rule in rules("alert"):
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert re.fullmatch(r"\d+[smhd]", rule["for"])
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["alert"].lower() in sections, f"{rule['alert']} has no section"
        for selector, _ in walk(promql.parse(rule["expr"])):
            assert ":" not in str(selector.name) or selector.name in recorded, f"{selector.name} is not recorded"
    assert sections == {rule["alert"].lower() for rule in rules("alert")}, "a section is of no alert"


def test_objectives_are_those_that_are_promised() -> None:
    """99.95 %, and 99 % within 200 ms, in the windows and at the burn rates of multi-window alerts."""
    text = "".join(rule["expr"] for rule in rules("alert") if "Burns" in rule["alert"])
    for errors, budget in (("availability_errors", "0.0005"), ("latency_errors", "0.01")):
        for long, short, factor in (("1h", "5m", "14.4"), ("6h", "30m", "6"), ("1d", "2h", "3"), ("3d", "6h", "1")):
            for window in (long, short):
                assert f"tidings:{errors}:ratio_rate{window} > {factor} * {budget}" in text
    assert 0.2 in LATENCY_S


def test_the_dashboard_is_what_it_is_made_from() -> None:
    """``python infra/grafana/build.py`` was run after the last change."""
    module = dashboard_module()
    assert json.loads(module.DASHBOARD.read_text()) == module.dashboard()


def test_the_catalogue_of_the_docs() -> None:
    """docs/operations.md lists each metric with its kind, unit, meaning and labels, and no other."""
    table = OPERATIONS.partition("<!-- catalogue")[2].partition("<!-- end of catalogue")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line.startswith("| `")
    ]
    wanted = [
        [
            f"`{one.prometheus}{'_total' if one.kind is Kind.COUNTER else ''}`",
            one.kind.value,
            f"`{one.unit}`",
            one.text,
            " ".join(f"`{label}`: {', '.join(values)}." for label, values in one.labels.items()),
        ]
        for one in CATALOGUE.values()
    ]
    assert rows == wanted


@pytest.mark.parametrize("broken", ["sum(rate(x[5m])", "rate(x)", "nothing{"])
def test_the_parser_refuses(broken: str) -> None:
    """What is checked with is no rubber stamp: it knows syntax and types."""
    with pytest.raises(ValueError):
        promql.parse(broken)
