"""Containers of rendered Kubernetes manifests as local processes: their very commands, variables, files and probes.

There is no cluster here: each pod's container runs in a `Sandbox` that has of the pod what its manifest gives it.
Claims are folders that all pods share, Services are names of the sandbox's one host. What only a cluster does, to
schedule, to restart, to enforce policies, is not tried.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.servers.process import ServerError
from tests.servers.repository import ROOT
from tests.servers.sandbox import Container, Mount, Sandbox, image_environment

READY_TIMEOUT_S = 60.0
ASK = (
    "import sys, urllib.request as u; body = sys.argv[2].encode() or None; "
    "r = u.Request(sys.argv[1], body, {'Content-Type': 'application/json'}); "
    "sys.stdout.write(u.urlopen(r, timeout=20).read().decode())"
)
Manifest = dict[str, Any]


def pod_of(manifest: Manifest) -> Manifest:
    """The pod's spec in a Deployment, a Job or a CronJob."""
    spec = manifest["spec"]
    found: Manifest = spec.get("jobTemplate", {"spec": spec})["spec"]["template"]["spec"]
    return found


class Cluster:
    """The objects of a release, whose pods run in a sandbox.

    Args:
        sandbox: where; it must know the names of the Services.
        manifests: the objects.
        secrets: the files of each Secret, by its name.
    """

    def __init__(self, sandbox: Sandbox, manifests: list[Manifest], secrets: Mapping[str, Mapping[str, str]]) -> None:
        self._sandbox = sandbox
        self._files = {
            **{("Secret", name): files for name, files in secrets.items()},
            **{("ConfigMap", m["metadata"]["name"]): m["data"] for m in manifests if m["kind"] == "ConfigMap"},
        }
        self.objects = {(m["kind"], m["metadata"]["name"]): m for m in manifests}

    def run(self, kind: str, name: str, *, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run the container of a Job or CronJob to its end."""
        pod = pod_of(self.objects[kind, name])
        return self._sandbox.run(self._container(name, pod), _command(pod), timeout_s=timeout_s)

    def begin(self, name: str) -> subprocess.Popen[bytes]:
        """Start the container of a Deployment."""
        pod = pod_of(self.objects["Deployment", name])
        return self._sandbox.begin(name, self._container(name, pod), _command(pod))

    def await_probes(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Return when every probe of a Deployment's container succeeds.

        Raises:
            ServerError: It ended, or one did not in time; with the end of its log.
        """
        container = pod_of(self.objects["Deployment", name])["containers"][0]
        found = [container.get(f"{kind}Probe", {}) for kind in ("startup", "readiness", "liveness")]
        handlers = [{kind: probe[kind] for kind in ("httpGet", "tcpSocket") if kind in probe} for probe in found]
        probes = [probe for place, probe in enumerate(handlers) if probe and probe not in handlers[:place]]
        deadline = time.monotonic() + READY_TIMEOUT_S
        for probe in probes:
            while not self._succeeds(container, probe):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ServerError(f"{name} ended with {process.poll()}: {self._sandbox.log(name)[-3000:]}")
                time.sleep(0.1)

    def ask(self, url: str, question: object = None) -> subprocess.CompletedProcess[str]:
        """Get a page, or what is answered to a question in JSON, as another pod does."""
        body = "" if question is None else json.dumps(question)
        return self._sandbox.run(Container([], image_environment()), ["python", "-c", ASK, url, body])

    def _succeeds(self, container: Manifest, probe: Manifest) -> bool:
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        if "tcpSocket" in probe:
            connect = f"import socket; socket.create_connection(('127.0.0.1', {ports[probe['tcpSocket']['port']]}), 5)"
            return self._sandbox.run(Container([], image_environment()), ["python", "-c", connect]).returncode == 0
        get = probe["httpGet"]
        return self.ask(f"http://127.0.0.1:{ports[get['port']]}{get['path']}").returncode == 0

    def _container(self, name: str, pod: Manifest) -> Container:
        """What the one container of a pod sees."""
        (container,) = pod["containers"]
        sources = {volume["name"]: self._volume(name, volume) for volume in pod["volumes"]}
        mounts = [
            Mount(sources[mount["name"]] / mount.get("subPath", ""), mount["mountPath"], mount.get("readOnly", False))
            for mount in container["volumeMounts"]
        ]
        security = pod["securityContext"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        variables = {variable["name"]: variable["value"] for variable in container.get("env", [])}
        user = str(security["runAsUser"]), str(security["runAsGroup"])
        image = [Mount(ROOT / "luigi.cfg", "/srv/luigi.cfg", is_read_only=True)]
        return Container([*image, *mounts], {**image_environment(), **variables}, user)

    def _volume(self, pod: str, volume: Manifest) -> Path:
        if "persistentVolumeClaim" in volume:
            return self._sandbox.volume(volume["persistentVolumeClaim"]["claimName"])
        path = self._sandbox.volume(f"{pod}-{volume['name']}")
        if "configMap" in volume:
            self._fill(path, "ConfigMap", volume["configMap"]["name"])
        for source in volume.get("projected", {}).get("sources", []):
            self._fill(path, "Secret", source["secret"]["name"])
        return path

    def _fill(self, folder: Path, kind: str, name: str) -> None:
        for file, content in self._files[kind, name].items():
            (folder / file).write_text(content, encoding="utf-8")


def _command(pod: Manifest) -> list[str]:
    (container,) = pod["containers"]
    return [*container["command"], *container.get("args", [])]
