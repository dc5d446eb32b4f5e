"""The chart: what it renders is valid, hangs together, is confined, says what Compose says, and runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from streaming.settings import group_of
from tests.servers import UnavailableError
from tests.servers.compose import Compose, read_compose
from tests.servers.kubernetes import Cluster, Manifest, pod_of
from tests.servers.repository import ROOT

CHART = ROOT / "deploy" / "kubernetes" / "headrace"
PASSWORD = "s3cret-of-the-test"  # noqa: S105
CUSTOM = {"keda.sh/v1alpha1": "keda.v1alpha1", "monitoring.coreos.com/v1": "prometheus_operator.v1"}
"""Where the models of resources are that are not Kubernetes' own."""
VERSIONS = ("1.30", "1.37")
"""The oldest Kubernetes that the chart takes, and the newest that the schemas know."""
BROKER = {"broker": "kafka:19092"}
EVERYTHING = {
    **BROKER,
    "secrets": ["stores"],
    "featureRepository": {"files": {"feature_store.yaml": "project: p\n", "definitions.py": "# none\n"}},
    "ui": {"enabled": True},
    "monitoring": {"enabled": True, "dashboard": {"enabled": True}},
    "serve": {"autoscaling": {"enabled": True}},
}
INSTALLATIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "default": (BROKER, ()),
    "small": (BROKER, ("values-small.yaml",)),
    "large": ({}, ("values-large.yaml",)),
    "everything": (EVERYTHING, ()),
}


def helm(
    *arguments: str | Path, values: dict[str, Any], files: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    program = shutil.which("helm") or pytest.skip("no helm (docs/how-to/kubernetes.md says how to build it)")
    words = [word for file in files for word in ("--values", str(CHART / file))]
    command = [program, *map(str, arguments), *words, "--values", "-"]
    return subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, check=False, timeout=60)


@lru_cache
def _rendered(values: str, files: tuple[str, ...]) -> list[Manifest]:
    done = helm("template", "headrace", CHART, "--namespace", "features", values=json.loads(values), files=files)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def rendered(values: dict[str, Any], files: tuple[str, ...] = ()) -> list[Manifest]:
    """The objects of a release `headrace`."""
    return _rendered(json.dumps(values), files)


@pytest.fixture(params=INSTALLATIONS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    """Of each kind of installation."""
    values, files = INSTALLATIONS[request.param]
    return rendered(values, files)


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Pod specs, by the name of what makes them."""
    makers = {"Deployment", "Job", "CronJob"}
    return {m["metadata"]["name"]: pod_of(m) for m in manifests if m["kind"] in makers}


def of(manifests: list[Manifest], kind: str, name: str = "") -> Manifest:
    (found,) = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == (name or m["metadata"]["name"])]
    return found


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_the_chart_passes_its_own_linter(name: str) -> None:
    values, files = INSTALLATIONS[name]
    done = helm("lint", "--strict", CHART, values=values, files=files)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_object_is_one_that_kubernetes_knows(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if manifest["apiVersion"] in CUSTOM:
            # Only now: they take seconds, which every run of any test would wait for.
            models = import_module(f"cloudcoil.models.{CUSTOM[manifest['apiVersion']]}")
            model: Any = getattr(models, manifest["kind"])
            # The models leave out what they do not know.
            known = model.model_validate(manifest).model_dump(mode="json", by_alias=True, exclude_unset=True)
            assert known == manifest
            continue
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_what_is_named_is_there(manifests: list[Manifest]) -> None:
    names = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    assert len(names) == len(manifests)
    labels = [m["spec"]["template"]["metadata"]["labels"] for m in manifests if m["kind"] == "Deployment"]
    labels += [m["spec"]["template"]["metadata"]["labels"] for m in manifests if m["kind"] == "Job"]
    labels += [
        m["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"] for m in manifests if m["kind"] == "CronJob"
    ]
    for name, pod in pods(manifests).items():
        for volume in pod["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names, name
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in names or claim == "headrace-work", name
        (container,) = pod["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}, name
    for manifest in manifests:
        kind, spec = manifest["kind"], manifest.get("spec", {})
        selector = {
            "Service": lambda spec: spec["selector"],
            "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
            "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
            "PodMonitor": lambda spec: spec["selector"]["matchLabels"],
        }.get(kind)
        if selector is not None:
            assert [one for one in labels if selector(spec).items() <= one.items()], f"{kind}: no such pod"
        if kind == "ServiceMonitor":
            services = [m for m in manifests if m["kind"] == "Service"]
            wanted = spec["selector"]["matchLabels"].items()
            (service,) = [m for m in services if wanted <= m["metadata"]["labels"].items()]
            assert spec["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
        if "scaleTargetRef" in spec:
            target = spec["scaleTargetRef"]["name"]
            assert "replicas" not in of(manifests, "Deployment", target)["spec"], (
                f"{kind} and {target} both say how many"
            )


def test_policies_let_in_what_is_served_and_no_more(manifests: list[Manifest]) -> None:
    policies = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"}
    for manifest in manifests:
        name = manifest["metadata"]["name"]
        if manifest["kind"] == "Deployment":
            (container,) = pod_of(manifest)["containers"]
            opened = [port["port"] for rule in policies[name].get("ingress", []) for port in rule["ports"]]
            served = [port["containerPort"] for port in container["ports"]]
            assert opened in (served, []), name
            if name != "headrace-ui":
                assert opened, name
    assert {"headrace-apply", "headrace-batch"} <= policies.keys()
    assert "ingress" not in policies["headrace-batch"]


def test_every_pod_is_confined(manifests: list[Manifest]) -> None:
    """As Kubernetes' Pod Security Standard `restricted` wants it, and a read-only root."""
    for name, pod in pods(manifests).items():
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, f"{name}: variables of services would be settings"
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] == 10001, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & pod.keys(), name
        assert {kind for volume in pod["volumes"] for kind in volume} - {"name"} <= {
            "emptyDir",
            "configMap",
            "projected",
            "persistentVolumeClaim",
        }, name
        (container,) = pod["containers"]
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False, name
        assert security["readOnlyRootFilesystem"] is True, name
        assert security["capabilities"]["drop"] == ["ALL"], name
        added = security["capabilities"].get("add", [])
        assert added == (["NET_BIND_SERVICE"] if name.endswith("-reports") else []), name
        assert {"requests", "limits"} <= container["resources"].keys(), name
        assert "memory" in container["resources"]["limits"], name
        assert ":latest" not in container["image"], name
        assert container["image"].rpartition(":")[2], name


def test_no_secret_is_a_variable_or_an_argument(manifests: list[Manifest]) -> None:
    for name, pod in pods(manifests).items():
        (container,) = pod["containers"]
        assert "envFrom" not in container, name
        assert [v for v in container.get("env", []) if "valueFrom" in v or "PASSWORD" in v["name"]] == [], name
    assert [m for m in manifests if m["kind"] == "Secret"] == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "expected host:port of Kafka"),
        ({"broker": "kafka"}, "broker"),
        ({"broker": "user@kafka:9092"}, "broker"),
        ({**BROKER, "settings": {"HEADRACE_SASL_PASSWORD": "x"}}, "HEADRACE_SASL_PASSWORD"),
        ({**BROKER, "settings": {"HEADRACE_BROKER": "x:1"}}, "HEADRACE_BROKER"),
        ({**BROKER, "settings": {"PATH": "/"}}, "PATH"),
        ({**BROKER, "sourceUrl": "postgresql://headrace:secret@db/x"}, "sourceUrl"),
        ({**BROKER, "reports": {"url": "https://user:secret@h"}}, "url"),
        ({**BROKER, "worker": {"autoscaling": {"enabled": True}}}, "consumerGroup"),
        ({**BROKER, "worker": {"replica": 3}}, "replica"),
        ({**BROKER, "batch": {"jobs": {"compact": {"schedule": "daily"}}}}, "schedule"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], message: str) -> None:
    done = helm("template", "headrace", CHART, values=values)
    assert done.returncode != 0
    assert message in done.stderr


def test_the_values_of_the_page_are_taken() -> None:
    page = (ROOT / "docs" / "how-to" / "kubernetes.md").read_text(encoding="utf-8")
    (values,) = re.findall(r"^```yaml\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    store = of(rendered(yaml.safe_load(values)), "ConfigMap", "headrace-repository")["data"]["feature_store.yaml"]
    assert {"registry", "offline_store", "online_store", "batch_engine"} <= yaml.safe_load(store).keys()


def test_a_job_may_be_left_out_and_another_added() -> None:
    jobs = {"retain": None, "compact": {"schedule": "0 5 * * *"}}
    found = {
        m["metadata"]["name"]: m["spec"]["schedule"]
        for m in rendered({**BROKER, "batch": {"jobs": jobs}})
        if m["kind"] == "CronJob"
    }
    assert found["headrace-compact"] == "0 5 * * *"
    assert "headrace-retain" not in found


def test_every_container_runs_what_compose_runs(manifests: list[Manifest]) -> None:
    services = read_compose()["services"]
    for name, pod in pods(manifests).items():
        service = services.get(name.removeprefix("headrace-"))
        if service is None or name == "headrace-reports":
            continue
        (container,) = pod["containers"]
        assert [word.replace("/srv/repository", "/srv/feature_repo") for word in container["command"]] == service[
            "command"
        ]


def test_the_schedule_is_that_of_the_crontab() -> None:
    lines = [
        line
        for line in (ROOT / "deploy" / "crontab").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    expected = sorted((line.split(maxsplit=5)[:5], line.split()[10:]) for line in lines)
    jobs = [m["spec"] for m in rendered(BROKER) if m["kind"] == "CronJob"]
    found = sorted((job["schedule"].split(), pod_of({"spec": job})["containers"][0]["args"]) for job in jobs)
    assert found == expected
    for job in jobs:
        assert (job["timeZone"], job["concurrencyPolicy"]) == ("Etc/UTC", "Forbid")


def test_probes_are_the_right_way_round() -> None:
    (worker,) = pods(rendered(BROKER))["headrace-worker"]["containers"]
    paths = {kind: worker[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}


def test_alerts_dashboard_and_caddyfile_are_those_of_compose() -> None:
    objects = rendered(EVERYTHING)
    monitoring = ROOT / "deploy" / "monitoring"
    rules = yaml.safe_load((monitoring / "rules.yml").read_text(encoding="utf-8"))
    assert of(objects, "PrometheusRule")["spec"] == rules
    dashboard = of(objects, "ConfigMap", "headrace-dashboard")["data"]["headrace.json"]
    text = (monitoring / "grafana" / "dashboards" / "headrace.json").read_text(encoding="utf-8")
    assert json.loads(dashboard) == json.loads(text.replace("headrace-prometheus", "prometheus"))
    caddyfile = of(objects, "ConfigMap", "headrace-reports")["data"]["Caddyfile"]
    assert caddyfile.strip() == (ROOT / "deploy" / "Caddyfile").read_text(encoding="utf-8").strip()


def test_jobs_are_called_as_the_alerts_call_them() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "monitoring" / "prometheus.yml").read_text(encoding="utf-8"))
    monitors = [m["spec"] for m in rendered(EVERYTHING) if m["kind"] in {"PodMonitor", "ServiceMonitor"}]
    endpoints = [spec.get("podMetricsEndpoints", spec.get("endpoints"))[0] for spec in monitors]
    jobs = {rule["replacement"] for one in endpoints for rule in one["relabelings"] if rule["targetLabel"] == "job"}
    assert jobs == {scrape["job_name"] for scrape in config["scrape_configs"]}


def test_the_scaler_asks_for_the_group_of_the_example() -> None:
    trigger = of(rendered({}, ("values-large.yaml",)), "ScaledObject")["spec"]["triggers"][0]["metadata"]
    assert trigger["consumerGroup"] == group_of("headrace_demo", ["driver_stats"])


def test_the_chart_has_the_version_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert (chart["version"], chart["appVersion"]) == (package, package)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A release of the chart beside a real Kafka, Valkey and PostgreSQL, after its hook."""
    store = (ROOT / "deploy" / "feature_store.yaml").read_text(encoding="utf-8")
    definitions = (ROOT / "feature_repo" / "definitions.py").read_text(encoding="utf-8")
    source_url = read_compose()["x-headrace"]["environment"]["HEADRACE_SOURCE_URL"]
    values = {
        "broker": "kafka:19092",
        "sourceUrl": source_url,
        "secrets": ["stores"],
        "featureRepository": {"files": {"feature_store.yaml": store, "definitions.py": definitions}},
    }
    manifests = rendered(values)
    secrets = dict.fromkeys(("postgres_password", "valkey_password"), PASSWORD)
    services = [m["metadata"]["name"] for m in manifests if m["kind"] == "Service"]
    try:
        with Compose([], secrets, services) as compose:
            for name in ("kafka", "valkey", "postgres"):
                compose.spawn(name)
            found = Cluster(compose, manifests, {"stores": secrets})
            done(compose.exec("worker", [sys.executable, "-c", ROWS, day_before()]))
            # The hook needs no Kafka, which takes longest to start.
            topics = compose.spawn("topics", [sys.executable, "-c", TOPICS])
            done(found.run("Job", "headrace-apply"))
            assert topics.wait(60) == 0, compose.log("topics")
            yield found
    except UnavailableError as exc:
        pytest.skip(str(exc))


WAIT = """
import socket, sys, time
from pathlib import Path

def wait_for(port):
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
"""
ROWS = f"""{WAIT}
import psycopg

def connect():
    # The port is open before the database takes anybody.
    while True:
        try:
            return psycopg.connect(host="postgres", user="headrace", password=password)
        except psycopg.OperationalError:
            time.sleep(0.1)

password = Path("/run/secrets/postgres_password").read_text()
day = sys.argv[1]
rows = f"SELECT n, 0.5, 0.5, n, '{{day}} 12:00Z', '{{day}} 13:00Z' FROM generate_series(1, 50) n"
with connect() as database:
    database.execute(f"INSERT INTO driver_stats {{rows}}")
wait_for(6379)
"""
TOPICS = f"""{WAIT}
from confluent_kafka.admin import AdminClient, NewTopic

wait_for(19092)
topics = [NewTopic(name, 4, 1) for name in ("drivers", "drivers.dlq")]
admin = AdminClient({{"bootstrap.servers": "kafka:19092"}})
for made in admin.create_topics(topics, request_timeout=60).values():
    made.result()
"""


def day_before() -> str:
    return str(datetime.now(UTC).date() - timedelta(days=1))


def done(ran: subprocess.CompletedProcess[str]) -> str:
    assert ran.returncode == 0, f"{ran.stdout[-1500:]}{ran.stderr[-1500:]}"
    assert PASSWORD not in ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_the_pods_of_a_release_work_together(cluster: Cluster) -> None:
    """Each container's own command, variables, files and probes: no more of a cluster than its network."""
    names = [f"headrace-{name}" for name in ("luigid", "worker", "serve", "reports")]
    processes = {name: cluster.begin(name) for name in names}
    cluster.await_probes("headrace-luigid", processes["headrace-luigid"])
    done(cluster.run("CronJob", "headrace-materialize"))
    for name, process in processes.items():
        cluster.await_probes(name, process)
    question = {"features": ["driver_stats:avg_daily_trips"], "entities": {"driver_id": [7, 99_999]}}
    answer = json.loads(done(cluster.ask("http://headrace-serve:6566/get-online-features", question)))
    assert [column["values"] for column in answer["results"]] == [[7, 99_999], [7, None]]
    assert 'task="Materialize",view="driver_stats"' in done(cluster.ask("http://headrace-reports:8083/metrics"))
    assert "headrace_ledger_end_offset" in done(cluster.ask("http://headrace-worker:6066/metrics"))
