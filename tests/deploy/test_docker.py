"""The files of docker/: linted by the tools of their formats, and in agreement with one another, the package and the server's metrics."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion.cli.serve import parser_of
from fusion.deploy.serve.metrics import Metrics

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
DASHBOARD = json.loads((DOCKER / "grafana/dashboards/fusion.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
OF_PROMETHEUS = {"job", "instance", "le", "quantile"}  # labels of every series, and those of histograms and summaries


def tool(name: str) -> str:
    """The path of a linter beside this Python; skips where it isn't installed."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not installed")
    return str(path)


def instructions(file: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments."""
    text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], " ".join(line.split(maxsplit=1)[1:])) for line in text.splitlines() if line.strip()]


def last_stage(file: Path) -> dict[str, str]:
    found = instructions(file)
    start = max(i for i, (name, _) in enumerate(found) if name == "FROM")
    return dict(found[start:])


def compose(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "MODEL"} | variables
    words = [tool("docker-compose"), "-f", str(DOCKER / "compose.yaml"), "config", "--format", "json"]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env=environment)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_dockerfiles_have_no_lint(file: Path) -> None:
    done = subprocess.run([tool("hadolint"), str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_images_run_as_an_ordinary_user_from_a_built_environment(file: Path) -> None:
    found, last = instructions(file), last_stage(file)
    assert last["USER"] == "10001:10001"
    assert last["COPY"] == "--from=build /venv /venv"
    assert "PYTHONDONTWRITEBYTECODE=1" in last["ENV"]
    assert json.loads(last["ENTRYPOINT"])  # a list: no shell stands between a signal and the process
    assert json.loads(last["CMD"])
    assert any("--no-compile" in words for name, words in found if name == "RUN")
    extras = re.findall(r'"\.\[(.*?)\]"', file.read_text())[0].replace(
        "${EXTRAS}", dict(w.split("=") for n, w in found if n == "ARG").get("EXTRAS", "")
    )
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= known.keys()


def test_the_images_copy_what_the_build_needs_and_the_context_has_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {
        "pyproject.toml",
        project["project"]["readme"],
        *project["project"]["license-files"],
        *wheel["packages"],
        *wheel["force-include"],
    }
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == needed
    for file in DOCKERFILES:
        copied = {
            word for name, words in instructions(file) if name == "COPY" and "--from" not in words for word in shlex.split(words)[:-1]
        }
        assert copied == needed


def test_the_server_is_started_asked_and_stopped_as_it_expects() -> None:
    last = last_stage(DOCKER / "server.Dockerfile")
    assert json.loads(last["ENTRYPOINT"]) == ["fusion", "serve"]
    assert json.loads(last["CMD"]) == ["/model", "--host", "0.0.0.0", "--port", last["EXPOSE"]]
    assert f"http://127.0.0.1:{last['EXPOSE']}/healthz" in last["HEALTHCHECK"]
    assert last["STOPSIGNAL"] == "SIGTERM"
    options = parser_of().parse_args(json.loads(last["CMD"]))
    assert (options.words, options.host, options.port) == (["/model"], "0.0.0.0", 8000)


def test_the_code_in_the_commands_of_the_images_compiles() -> None:
    health = json.loads(last_stage(DOCKER / "server.Dockerfile")["HEALTHCHECK"].partition("CMD ")[2])
    edge = json.loads(last_stage(DOCKER / "edge.Dockerfile")["CMD"])
    for words in (health[1:], edge):
        assert words[0] == "-c"
        compile(words[1], "command", "exec")


def test_the_compose_file_is_valid_and_needs_a_model() -> None:
    services = json.loads(compose(MODEL="/package").stdout)["services"]
    server = services["server"]
    assert (ROOT / server["build"]["dockerfile"]).is_file()
    assert Path(server["build"]["context"]) == ROOT
    assert {"type": "bind", "source": "/package", "target": "/model", "read_only": True}.items() <= server["volumes"][0].items()
    assert server["init"]
    assert {port["host_ip"] for name in ("prometheus", "grafana") for port in services[name]["ports"]} == {"127.0.0.1"}
    for service in services.values():
        for volume in service["volumes"]:
            assert volume["type"] == "volume" or volume["target"] == "/model" or Path(volume["source"]).exists(), volume
    without = compose()
    assert without.returncode != 0
    assert "set MODEL to the folder of an exported package" in without.stderr


def test_prometheus_grafana_and_the_server_find_one_another() -> None:
    services = json.loads(compose(MODEL="/package").stdout)["services"]
    ports = {name: [port["target"] for port in service["ports"]] for name, service in services.items()}
    (job,) = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert int(port) in ports[host]
    (source,) = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert int(port) in ports[host]
    used = {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]}
    assert used == {source["uid"]}
    (provider,) = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/fusion.yaml").read_text())["providers"]
    mounted = {volume["target"]: volume["source"] for volume in services["grafana"]["volumes"]}
    assert Path(mounted[provider["options"]["path"]]) == DOCKER / "grafana/dashboards"
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].startswith(provider["options"]["path"])


def test_the_panels_of_the_dashboard_are_apart_and_described() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["title"] and panel["description"].endswith(".") for panel in panels)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23


def parsed(query: str) -> Any:
    promql = pytest.importorskip("promql_parser")
    return promql.parse(query.replace("$__rate_interval", "1m"))


def parts(query: Any) -> Iterator[Any]:
    """All expressions in a query."""
    yield query
    for name in ("lhs", "rhs", "expr", "vector_selector", "args"):
        inner = getattr(query, name, None)
        for one in inner if isinstance(inner, list) else [] if inner is None else [inner]:
            yield from parts(one)


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_every_query_of_the_dashboard_is_promql(title: str, query: str) -> None:
    found = [part.name for part in parts(parsed(query)) if hasattr(part, "matchers")]
    assert found, title
    assert all(name.startswith("fusion_") for name in found)


def test_the_dashboard_shows_every_metric_of_the_request_that_it_serves() -> None:
    shown = {part.name for _, query in QUERIES for part in parts(parsed(query)) if hasattr(part, "matchers")}
    counters = {"requests", "rejections", "missing_inputs", "answers"}
    assert {f"fusion_{name}_total" for name in counters} <= shown
    assert {"fusion_request_seconds_bucket", "fusion_batch_size_bucket", "fusion_queue_depth", "fusion_confidence_sum"} <= shown


def test_the_server_defines_every_metric_and_label_of_the_dashboard() -> None:
    metrics = Metrics()
    suffixes = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_bucket", "_sum", "_count"], "Summary": ["_sum", "_count"]}
    defined: dict[str, set[str]] = {}
    for metric in vars(metrics).values():
        for suffix in suffixes.get(type(metric).__name__, []):
            defined[f"{metric._name}{suffix}"] = set(metric._labelnames)
    for title, query in QUERIES:
        found = list(parts(parsed(query)))
        selectors = [part for part in found if hasattr(part, "matchers")]
        assert {part.name for part in selectors} <= defined.keys(), title
        known = set.union(OF_PROMETHEUS, *(defined[part.name] for part in selectors))
        grouped = {label for part in found for label in getattr(getattr(part, "modifier", None), "labels", None) or []}
        matched = {matcher.name for part in selectors for matcher in part.matchers.matchers}
        assert grouped | matched <= known, title
