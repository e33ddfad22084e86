"""What the repository is deployed from, checked as far as that goes without the machines it is for.

The tools' own schemas where they can be had offline, and what these do not look at: that commands have the
flags they are given, that copied files, settings, secrets and volumes exist, that pins and ports agree.
"""

from __future__ import annotations

import configparser
import copy
import importlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start
from ray.serve.schema import ServeDeploySchema

import infinitetalk
from actors import cli
from pipeline.service_settings import ServiceSettings
from pipeline.settings import PREFIX, SERVICE_PREFIX, Settings
from serve_app import FEWER_TURNS
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
UNITS = ("infinitetalk-head", "infinitetalk-worker", "infinitetalk")
FILES = sorted(
    path
    for path in (
        ROOT / "cluster.yaml",
        ROOT / "docs" / "deploy.md",
        *DEPLOY.rglob("*"),
        *(ROOT / ".runpod").iterdir(),
    )
    if path.is_file() and "__pycache__" not in path.parts
)
"""All that is handed to somebody else's program, and the guide."""


def pins() -> dict[str, str]:
    """constraints.txt by name."""
    lines = (ROOT / "constraints.txt").read_text().split()
    return {name.lower(): version for name, version in (line.split("==") for line in lines)}


def commands(text: str) -> list[str]:
    """The text's lines with those that a backslash or ``>-`` continues put together."""
    return re.sub(r"\\\n\s*", " ", text).splitlines()


# ---------------------------------------------------------------------------------------------- all files


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_that_are_named_exist(path: Path) -> None:
    """A variable that we do not have would be an error on the machine, or, of Ray's, do nothing silently."""
    text = path.read_text()
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    known |= {SERVICE_PREFIX + name.upper() for name in ServiceSettings.model_fields}
    assert set(re.findall(rf"\b{PREFIX}[A-Z0-9_]+", text)) - known == set()
    assert set(re.findall(r"\bRAY_[A-Za-z]\w+", text)) - ray_variables() - {"RAY_HEAD_IP"} == set()


@cache
def ray_variables() -> frozenset[str]:
    """Variables that are named in Ray's own programs."""
    folder = Path(importlib.import_module("ray").__file__ or "").parent
    sources = [
        folder / "_raylet.so",
        *(folder / "_common").rglob("*.py"),
        *folder.glob("serve/_private/*.py"),
    ]
    return frozenset(
        word.decode() for path in sources for word in re.findall(rb"RAY_[A-Za-z]\w+", path.read_bytes())
    )


def our_command_lines() -> Iterator[tuple[str, tuple[str, ...], set[str]]]:
    """Where ``infinitetalk`` is called, with which sub-commands, and with which flags."""
    for path in FILES:
        if path.suffix in (".py", ".json"):
            continue
        for line in commands(path.read_text()):
            plain = line.replace("[infinitetalk, models, download]", "infinitetalk models download")
            plain = re.sub(r'[][",`]', " ", plain)
            for call in re.findall(r"(?:^|[\s/'])infinitetalk ((?:[a-z]+ ?){1,2}[^|&;]*)", plain):
                words = call.split()
                if words[0] in ("render", "serve", "doctor", "models", "comfyui", "seams", "redo"):
                    depth = 2 if words[0] in ("models", "comfyui") else 1
                    flags = {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)}
                    yield path.name, tuple(words[:depth]), flags


def test_our_commands_have_the_flags_they_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    """Each ``infinitetalk ...`` of the files against that command's own help."""
    seen = list(our_command_lines())
    assert {"Dockerfile", "cluster.yaml", "docker-compose.yml", "storage.yaml", "deploy.md"} <= {
        name for name, *_ in seen
    }
    for command in sorted({command for _, command, _ in seen}):
        with pytest.raises(SystemExit) as end:
            cli.main([*command, "--help"], more=(infinitetalk,))
        assert end.value.code == 0
        flags = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", capsys.readouterr().out))
        for name, called, given in seen:
            if called == command:
                assert given <= flags, f"{name}: infinitetalk {' '.join(command)}"


def ray_starts() -> dict[str, list[str]]:
    """The arguments of every ``ray start`` by file and number."""
    found: dict[str, list[str]] = {}
    for path in FILES:
        text = path.read_text()
        if path.name == "cluster.yaml":
            config = yaml.safe_load(text)
            text = "\n".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
        for line in commands(text):
            for call in re.findall(r"(?:^|/)ray start (-.*)", line.replace("ExecStart=", "").strip()):
                found[f"{path.name} {len(found)}"] = shlex.split(call)
            for call in re.findall(r"/bin/ray start (-.*)", line) if "&&" in line else ():
                found[f"{path.name} {len(found)}"] = shlex.split(call)
    return found


def test_ray_is_started_alike_everywhere() -> None:
    """Flags that Ray has, no port twice, the same ports in the guide, in cluster.yaml and in the units."""
    known = {
        option for parameter in ray_start.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    starts = ray_starts()
    assert {where.split()[0] for where in starts} >= {
        "cluster.yaml",
        "deploy.md",
        *(f"{u}.service" for u in UNITS[:2]),
    }
    ports = set()
    for where, words in starts.items():
        given = dict(word.partition("=")[::2] for word in words)
        assert set(given) <= known, where
        mine = {
            name: int(value) for name, value in given.items() if name.endswith("-port") and name != "--port"
        }
        assert len(set(mine.values())) == len(mine) == 8, where
        assert "--head" in given or "--address" in given, where
        if "--head" in given:
            assert given["--port"] == "6379" and given["--dashboard-host"] == "127.0.0.1", where
        ports.add(tuple(sorted(mine.items())))
    assert len(ports) == 1
    table = (ROOT / "docs" / "deploy.md").read_text()
    assert all(
        str(port) in table.partition("## What listens where")[2] for port in dict(ports.pop()).values()
    )


def test_the_guide_leads_to_files_that_exist() -> None:
    """Links of docs/deploy.md."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    anchors = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines()
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


# ------------------------------------------------------------------------------------------- cluster.yaml


def variant(name: str) -> dict[str, Any]:
    """cluster.yaml with another provider's block taken out of its comments, and the local one left out."""
    text = (ROOT / "cluster.yaml").read_text()
    if name != "local":
        text = re.sub(r"^# --- local:.*?^# --- end of local$", "", text, flags=re.DOTALL | re.MULTILINE)
        block = re.search(
            rf"^# --- {name}:[^\n]*\n(.*?)^# --- end of {name}$", text, re.DOTALL | re.MULTILINE
        )
        assert block is not None
        text = text.replace(block[1], re.sub(r"^# ", "", block[1], flags=re.MULTILINE))
    config: dict[str, Any] = yaml.safe_load(text)
    assert config["provider"]["type"] == name
    return config


@pytest.mark.parametrize("name", ["local", "aws", "gcp"])
def test_cluster_yaml_is_valid_for_ray(name: str) -> None:
    """Ray's own schema and checks accept every variant, and refuse one with a key that there is not."""
    config = variant(name)
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(Exception, match="unheard_of"):
        validate_config(prepare_config({**copy.deepcopy(config), "unheard_of": 1}))


def test_cluster_yaml_has_gpu_nodes_in_clouds() -> None:
    """What the schema leaves open: machine types with as many GPUs as are told, of which clouds ask more."""
    for name, key in (("aws", "InstanceType"), ("gcp", "machineType")):
        types = variant(name)["available_node_types"]
        assert types["head"]["resources"]["GPU"] == 0
        gpu = types["gpu"]
        assert key in gpu["node_config"] and key in types["head"]["node_config"]
        assert gpu["resources"]["GPU"] >= 1 and gpu["min_workers"] <= gpu["max_workers"]
    node = variant("gcp")["available_node_types"]["gpu"]
    assert node["node_config"]["guestAccelerators"][0]["acceleratorCount"] == node["resources"]["GPU"]
    assert node["node_config"]["scheduling"] == [{"onHostMaintenance": "TERMINATE"}]


def test_cluster_yaml_installs_all_of_it_pinned() -> None:
    """ComfyUI, weights and us on every node; the environment of deploy/ray.env before each start."""
    config = variant("local")
    setup = "\n".join(config["setup_commands"])
    for wanted in ("comfyui install ~/ComfyUI --yes", "models download", "-c constraints.txt"):
        assert wanted in setup
    for line in (config["head_start_ray_commands"][1], config["worker_start_ray_commands"][1]):
        assert line.index("deploy/ray.env") < line.index("ray start")
    for line in (*config["setup_commands"], *config["head_start_ray_commands"]):
        subprocess.run(["bash", "-nc", line], check=True)  # it is shell


def test_ray_env_is_read_by_shell_and_systemd_alike() -> None:
    """Plain NAME=value lines; tokens are asked for, and workers run at normal priority."""
    lines = (DEPLOY / "ray.env").read_text().splitlines()
    values = dict(line.split("=") for line in lines if line and not line.startswith("#"))
    assert all(re.fullmatch(r"\w+", text) for pair in values.items() for text in pair)
    assert values["RAY_AUTH_MODE"] == "token"
    assert values["RAY_worker_niceness"] == "0"


def test_serve_hands_requests_on_the_same_way_everywhere() -> None:
    """On Ray's own nodes, in the image, on Kubernetes: as in a Ray that `infinitetalk serve` starts."""
    env, image = (DEPLOY / "ray.env").read_text(), (DEPLOY / "Dockerfile").read_text()
    kuberay = (DEPLOY / "kuberay" / "rayservice.yaml").read_text()
    for name, value in FEWER_TURNS.items():
        assert f"\n{name}={value}\n" in env
        assert f" {name}={value}" in image
        assert f'{{name: {name}, value: "{value}"}}' in kuberay


# ------------------------------------------------------------------------------------------- Serve, KubeRay


def check_serve_config(config: dict[str, Any]) -> None:
    """Ray's schema, and the two things that it lets pass: unknown keys and a prefix without a slash."""
    ServeDeploySchema.model_validate(copy.deepcopy(config))
    unknown_keys(config, ServeDeploySchema, "")
    for app in config["applications"]:
        assert app["route_prefix"].startswith("/")
        module, _, name = app["import_path"].partition(":")
        names = {getattr(importlib.import_module(module), name)._bound_deployment.name}
        assert {deployment["name"] for deployment in app["deployments"]} == names


def unknown_keys(given: Any, schema: Any, where: str) -> None:
    """Fails for a key that the pydantic model does not have."""
    for name, value in given.items():
        assert name in schema.model_fields, f"{where}{name}"
        inner = schema.model_fields[name].annotation
        for kind in (inner, *getattr(inner, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
                for item in value if isinstance(value, list) else [value]:
                    if isinstance(item, dict):
                        unknown_keys(item, kind, f"{where}{name}.")


def test_serve_yaml_is_valid_for_ray_serve() -> None:
    """And the check can fail."""
    config = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    check_serve_config(config)
    broken = copy.deepcopy(config)
    broken["applications"][0]["deployments"][0]["num_replica"] = 2
    with pytest.raises((AssertionError, ValueError)):
        check_serve_config(broken)
    broken = copy.deepcopy(config)
    broken["applications"][0]["route_prefix"] = "x"
    with pytest.raises((AssertionError, ValueError)):
        check_serve_config(broken)


def kubernetes(name: str) -> list[dict[str, Any]]:
    """The objects of a file."""
    return list(yaml.safe_load_all((DEPLOY / "kuberay" / name).read_text()))


def test_the_rayservice_has_what_kuberay_needs() -> None:
    """Required fields, string parameters, GPUs, probes, autoscaling, token, fault tolerance.

    The CRD's schema itself is KubeRay's; it was used by hand (docs/deploy.md).
    """
    (service,) = kubernetes("rayservice.yaml")
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    spec = service["spec"]
    cluster = spec["rayClusterConfig"]
    assert cluster["rayVersion"] == pins()["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"]
    config = yaml.safe_load(spec["serveConfigV2"])
    check_serve_config(config)
    plain = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    for app in (*config["applications"], *plain["applications"]):
        del app["runtime_env"]  # paths of the image
    assert config == plain
    (group,) = cluster["workerGroupSpecs"]
    assert group["groupName"] and 0 <= group["minReplicas"] <= group["maxReplicas"]
    for part in (cluster["headGroupSpec"], group):
        assert all(isinstance(value, str) for value in part["rayStartParams"].values())
        known = {name for parameter in ray_start.params for name in parameter.opts}
        assert {f"--{name}" for name in part["rayStartParams"]} <= known
        pod = part["template"]["spec"]
        assert "restartPolicy" not in pod  # KubeRay's autoscaler v2 asks for Never or nothing
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
        assert mounted["shm"] == "/dev/shm"
        limits = container["resources"]["limits"]
        assert limits.get("nvidia.com/gpu", "0") == part["rayStartParams"]["num-gpus"]


def test_kubernetes_objects_refer_to_each_other() -> None:
    """Claims, secrets' keys, services and the image of the RayService are those of storage.yaml."""
    storage = kubernetes("storage.yaml")
    names = {(found["kind"], found["metadata"]["name"]) for found in storage}
    text = "".join((DEPLOY / "kuberay" / name).read_text() for name in ("rayservice.yaml", "storage.yaml"))
    for claim in re.findall(r"claimName: ([\w-]+)", text):
        assert ("PersistentVolumeClaim", claim) in names
    redis = re.search(r"redisAddress: ([\w-]+):(\d+)", text)
    assert redis is not None and ("Service", redis[1]) in names
    made = set(re.findall(r"--from-literal=([\w-]+)=", text))
    used = set(re.findall(r"secretKeyRef: \{name: infinitetalk, key: ([\w-]+)\}", text))
    assert used | {"tokens"} == made
    ours = set(re.findall(r"image: (infinitetalk-ray\S*)", text))
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None and ours == {f"infinitetalk-ray:{version[1]}"}


# ---------------------------------------------------------------------------------------- Docker, Compose


def dockerfile() -> dict[str, list[tuple[str, str]]]:
    """Instructions of each stage, continued lines put together."""
    stages: dict[str, list[tuple[str, str]]] = {}
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in re.sub(r"\\\n", "", text).splitlines():
        if not line.strip():
            continue
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stages[rest.split(" AS ")[1]] = [(word, rest)]
        else:
            assert word.isupper(), line
            next(reversed(stages.values())).append((word, rest.strip()))
    return stages


def copied(path: str) -> bool:
    """Whether .dockerignore lets it through; ours says ``*`` and then what is not meant."""
    lines = (ROOT / ".dockerignore").read_text().split()
    return f"!{Path(path).parts[0]}" in lines


def test_the_dockerfile_holds_together() -> None:
    """CUDA 12.8, copied files that exist, pins, no root at the end, a health check, weights in a volume."""
    stages = dockerfile()
    assert list(stages) == ["service", "runpod"]  # RunPod builds the last one
    assert stages["service"][0][1].startswith("nvidia/cuda:12.8.")
    assert "-runtime-" in stages["service"][0][1]
    assert stages["runpod"][0][1] == "service AS runpod"
    for instructions in stages.values():
        assert [rest for word, rest in instructions if word == "USER"][-1] == "10001"
        for word, rest in instructions:
            if word == "COPY":
                for source in rest.split()[:-1]:
                    assert (ROOT / source).exists() and copied(source), source
            if word == "RUN":
                subprocess.run(["bash", "-nc", rest], check=True)
                for install in re.findall(r"pip install ([^&]*)", rest):
                    assert "--constraint constraints.txt" in install or "--no-deps" in install
            if word in ("CMD", "ENTRYPOINT"):
                assert all(isinstance(part, str) for part in json.loads(rest))
    service = dict(stages["service"])
    assert "/health" in service["HEALTHCHECK"]
    assert json.loads(service["VOLUME"]) == ["/models", "/data"]
    assert "models download" not in " ".join(rest for word, rest in stages["service"] if word == "RUN")
    assert "runpod" in pins()
    packaged = re.search(r"^packages = (.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert packaged is not None
    folders = {rest.split()[0] for word, rest in stages["service"] if word == "COPY"}
    assert {name.split(".")[0] for name in json.loads(packaged[1])} <= folders


def test_links_lead_where_runpod_and_people_look() -> None:
    """One Dockerfile and one folder of RunPod's, each under both of its names."""
    assert (ROOT / "Dockerfile").resolve() == DEPLOY / "Dockerfile"
    assert (DEPLOY / "runpod").resolve() == ROOT / ".runpod"


def test_compose_holds_together() -> None:
    """Services, volumes, secrets and the stage exist; all GPUs; nobody but this machine reaches it."""
    config = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
    assert set(config) == {"name", "services", "volumes", "secrets"}
    for service in config["services"].values():
        assert service["build"]["target"] in dockerfile()
        build = DEPLOY / service["build"]["context"]
        assert (build / service["build"]["dockerfile"]).is_file()
        assert {volume.split(":")[0] for volume in service["volumes"]} <= set(config["volumes"])
        assert set(service.get("secrets", [])) <= set(config["secrets"])
    service = config["services"]["service"]
    devices = service["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    mounted = {volume.split(":")[1] for volume in service["volumes"]}
    assert mounted == set(json.loads(dict(dockerfile()["service"])["VOLUME"]))


# ------------------------------------------------------------------------------------------------ RunPod


def test_hub_json_is_as_runpod_reads_it() -> None:
    """Required fields of RunPod's publishing guide, the source document's numbers, inputs with defaults."""
    hub = json.loads((ROOT / ".runpod" / "hub.json").read_text())
    assert set(hub) == {"title", "description", "type", "category", "config"}
    assert (hub["type"], hub["category"]) == ("serverless", "video")
    config = hub["config"]
    assert config["runsOn"] == "GPU"
    assert config["gpuCount"] == 2
    assert config["gpuIds"] == "ADA_24,ADA_32_PRO,RTX_4090,RTX_6000"
    assert config["containerDiskInGb"] == 320
    assert min(config["allowedCudaVersions"]) == "12.8"
    for entry in config["env"]:
        given = entry["input"]
        assert {"name", "type", "description", "default"} <= set(given)
        assert given["type"] in ("string", "number", "boolean", "huggingface")
        values = [option["value"] for option in given.get("options", [])]
        assert not values or given["default"] in values
        for value in values or [given.get("trueValue", given["default"])]:
            if entry["key"].startswith(SERVICE_PREFIX):
                ServiceSettings.from_env({entry["key"]: value})
            elif entry["key"].startswith(PREFIX):
                Settings.from_env({entry["key"]: value})
    tests = json.loads((ROOT / ".runpod" / "tests.json").read_text())
    assert tests["config"]["gpuCount"] == config["gpuCount"]
    assert {"name", "input", "timeout"} == set(tests["tests"][0])


# ----------------------------------------------------------------------------------------------- systemd


def unit(name: str) -> configparser.RawConfigParser:
    """A unit; of settings that are given twice, the last."""
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string("\n".join(commands((DEPLOY / "systemd" / f"{name}.service").read_text())))
    return parser


@pytest.mark.parametrize("name", UNITS)
def test_units_hold_together(name: str) -> None:
    """They are started again, end with all they started, read ray.env, and name variables that are set."""
    service = unit(name)["Service"]
    text = (DEPLOY / "systemd" / f"{name}.service").read_text()
    assert service["Restart"] == "always"
    assert service["KillMode"] in ("control-group", "mixed")
    assert service["User"] == "infinitetalk"
    assert "EnvironmentFile=/opt/infinitetalk/deploy/ray.env\n" in text
    example = (DEPLOY / "systemd" / "infinitetalk.env.example").read_text()
    for variable in re.findall(r"\$\{(\w+)\}", service["ExecStart"]):
        assert f"\n{variable}=" in example
    assert unit(name)["Install"]["WantedBy"] == "multi-user.target"


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """``systemd-analyze verify``, with a program that exists in the place of ours."""
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("no systemd-analyze here")
    for name in UNITS:
        text = (DEPLOY / "systemd" / f"{name}.service").read_text()
        text, replaced = re.subn(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE)
        assert replaced == 1
        (tmp_path / f"{name}.service").write_text(text)
    paths = [str(tmp_path / f"{name}.service") for name in UNITS]
    reply = subprocess.run([verify, "verify", *paths], capture_output=True, text=True, check=False)
    said = [line for line in reply.stderr.splitlines() if str(tmp_path) in line or "infinitetalk" in line]
    assert said == []
