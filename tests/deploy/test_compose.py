"""The compose files are valid, and the twins in them differ in nothing but what is compared."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from deploy.make_model import model_config
from service.invocation import read_invocation
from service.loading.planning import LoadOptions, plan_model
from service.loading.progress import LoadProgress
from service.numerics.recipe import parse_recipe
from service.settings import Settings, parse_origins
from tests.deploy.support import DEPLOY, read_compose, read_yaml, seconds
from tests.floors import ROOT
from tests.sparse import write_sparse_checkpoint

COMPOSE = ROOT / "docker-compose.yml"
GPU = DEPLOY / "gpu.yml"
SECRETS = {"api_keys": DEPLOY / "api-keys.yml", "hf_token": DEPLOY / "hub-token.yml"}
TWINS = ["baseline", "quantized"]
SQUEEZED = ["squeeze-baseline", "squeeze-quantized"]
OWN = ["cpuset", "ports", "environment"]
"""What the twins do not share."""


@pytest.fixture(scope="session")
def validator() -> Draft202012Validator:
    """The compose specification's schema, as the package check-jsonschema carries it."""
    schema = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    return Draft202012Validator(json.loads(schema.read_text(encoding="utf-8")))


def services(environment: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read_compose(COMPOSE, environment)["services"]
    return found


def variables(service: Mapping[str, Any]) -> dict[str, str]:
    """What a container gets whose host sets none of the variables: those without a value are left out."""
    return {name: value for name, value in service["environment"].items() if value is not None}


def settings_of(service: Mapping[str, Any]) -> Settings:
    """What the server makes of its variables; raises SettingError if it knows one of them not."""
    passed = {name: "1" for name, value in service["environment"].items() if value is None and "DTYPE" not in name}
    return read_invocation([], passed | variables(service)).settings


@pytest.mark.parametrize("path", [COMPOSE, GPU, *SECRETS.values()], ids=lambda path: path.name)
def test_a_compose_file_follows_the_specification(path: Path, validator: Draft202012Validator) -> None:
    assert [error.message for error in validator.iter_errors(read_compose(path))] == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda service: service.update(memory_limit="4g"),
        lambda service: service.update(read_only=3),
        lambda service: service["healthcheck"].update(startperiod="15m"),
        lambda service: service["deploy"]["resources"]["reservations"]["devices"][0].pop("capabilities"),
    ],
    ids=["unknown key", "wrong type", "unknown key of the health check", "a device without capabilities"],
)
def test_the_schema_finds_a_mistake(spoil: Callable[[dict[str, Any]], Any], validator: Draft202012Validator) -> None:
    compose = read_compose(COMPOSE)
    baseline = compose["services"]["baseline"] | read_compose(GPU)["services"]["baseline"]
    compose["services"]["baseline"] = baseline
    assert validator.is_valid(compose)
    spoil(baseline)
    assert not validator.is_valid(compose)


def test_the_twins_share_everything_but_cores_port_recipe_and_what_makes_them_twins() -> None:
    baseline, quantized = ({key: value for key, value in services()[name].items() if key not in OWN} for name in TWINS)
    assert baseline == quantized
    baseline_settings, quantized_settings = (settings_of(services()[name]).model_dump() for name in TWINS)
    assert {name for name, value in baseline_settings.items() if quantized_settings[name] != value} == {
        "quantize",
        "twin",
        "cors_origin",
    }


@pytest.mark.parametrize("host", ["localhost", "gpu7.example.org"])
@pytest.mark.parametrize(("name", "other"), [TWINS, TWINS[::-1]], ids=TWINS)
def test_the_page_of_a_twin_may_ask_the_other_from_the_browser(name: str, other: str, host: str) -> None:
    environment = {} if host == "localhost" else {"PUBLIC_HOST": host}
    twins = services(environment)
    ports = {twin: twins[twin]["ports"][0].split(":")[1] for twin in TWINS}
    settings = settings_of(twins[name])
    assert settings.twin == f"http://{host}:{ports[other]}"
    assert settings.cors_origin is not None
    assert parse_origins(settings.cors_origin) == (f"http://{host}:{ports[other]}", f"http://127.0.0.1:{ports[other]}")


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_a_file_and_in_no_variable(secret: str) -> None:
    compose = read_compose(SECRETS[secret])
    assert compose["secrets"] == {secret: {"file": f"./deploy/secrets/{secret}"}}
    assert read_compose(SECRETS[secret], {f"{secret.upper()}_FILE": "/srv/it"})["secrets"][secret]["file"] == "/srv/it"
    assert list(compose["services"]) == (TWINS + SQUEEZED if secret == "api_keys" else TWINS)
    for service in compose["services"].values():
        assert service["secrets"] == [secret]
        assert service["environment"] == {f"PENNYWEIGHT_{secret.upper()}_FILE": f"/run/secrets/{secret}"}
        settings = settings_of(service)
        assert str(settings.api_keys_file or settings.hf_token_file) == f"/run/secrets/{secret}"
    for service in services().values():
        assert not [variable for variable in service.get("environment", {}) if "TOKEN" in variable or "KEY" in variable]
    assert (DEPLOY / "secrets" / ".gitignore").read_text(encoding="utf-8").splitlines()[1:] == ["*", "!.gitignore"]


def test_models_of_the_hub_and_what_is_made_of_them_have_a_volume_each() -> None:
    compose = read_compose(COMPOSE)
    assert {"hub", "artifacts", "squeeze", "prometheus"} == compose["volumes"].keys()
    (volumes,) = re.findall(r"^VOLUME (.*)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    for name in TWINS:
        mounts = dict(volume.split(":")[:2] for volume in compose["services"][name]["volumes"])
        assert [mounts["hub"], mounts["artifacts"]] == volumes.split()


def test_prometheus_finds_rules_and_alerts_where_they_are_mounted() -> None:
    service = services()["prometheus"]
    mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
    folder = mounts["./deploy/prometheus"]
    assert f"--config.file={folder}/prometheus.yml" in service["command"]
    names = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")["rule_files"]
    assert names == ["rules.yml", "alerts.yml"], "beside the configuration"
    assert all((DEPLOY / "prometheus" / name).is_file() for name in names)


def test_the_twins_are_an_unquantized_and_a_quantized_server_on_their_ports() -> None:
    baseline, quantized = (services()[name] for name in TWINS)
    assert [settings_of(twin).quantize for twin in (baseline, quantized)] == ["none", "w8a16"]
    assert [baseline["ports"], quantized["ports"]] == [["127.0.0.1:8001:8000"], ["127.0.0.1:8002:8000"]]
    assert baseline["cpuset"] != quantized["cpuset"]
    assert {name for name, service in services().items() if "profiles" in service} == {"squeeze-model", *SQUEEZED}


def test_a_twin_has_as_much_memory_as_the_other_and_no_swap() -> None:
    limits = {services({"TWIN_MEMORY": "7g"})[name][key] for name in TWINS for key in ("mem_limit", "memswap_limit")}
    assert limits == {"7g"}


def test_a_model_of_the_user_needs_one_variable() -> None:
    for name in TWINS:
        service = services()[name]
        assert service["environment"]["PENNYWEIGHT_MODEL"] is None
        assert "PENNYWEIGHT_MODEL" not in variables(service)
        assert "./deploy/models:/models:ro" in service["volumes"]
        assert "/srv/models:/models:ro" in services({"MODELS_DIR": "/srv/models"})[name]["volumes"]
    assert (DEPLOY / "models").is_dir()


def test_a_twin_may_finish_its_requests_before_it_is_killed() -> None:
    for name in TWINS:
        service = services()[name]
        assert seconds(service["stop_grace_period"]) > settings_of(service).drain_timeout


def test_a_model_that_never_loads_is_not_started_for_ever() -> None:
    assert {services()[name]["restart"] for name in TWINS} == {"on-failure:3"}


@pytest.mark.parametrize("name", services())
def test_a_container_can_change_nothing_but_its_volumes(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    mounts = [volume.split(":") for volume in service["volumes"]]
    assert all(mount[0][0] != "." or mount[-1] == "ro" for mount in mounts), "a folder of the host can be written"


@pytest.mark.parametrize("name", services())
def test_a_port_is_open_on_this_machine_only_unless_asked(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in services()[name].get("ports", []))
    assert all(port.startswith("0.0.0.0:") for port in services({"BIND_ADDRESS": "0.0.0.0"})[name].get("ports", []))


def test_an_image_of_others_has_a_fixed_version() -> None:
    for service in services().values():
        if "build" not in service:
            _, _, tag = service["image"].partition(":")
            assert tag.count(".") == 2
            assert tag != "latest"


def test_a_mounted_path_exists() -> None:
    mounted = [volume for service in services().values() for volume in service["volumes"] if volume[0] == "."]
    assert mounted
    assert {path for path in mounted if not (ROOT / path.split(":")[0]).exists()} == set()


def test_the_squeezed_twins_share_everything_but_cores_port_and_recipe() -> None:
    baseline, quantized = (services()[name] for name in SQUEEZED)
    assert {key for key in baseline if baseline[key] != quantized[key]} == set(OWN)
    settings = [settings_of(service).model_dump() for service in (baseline, quantized)]
    assert [name for name, value in settings[0].items() if settings[1][name] != value] == ["quantize"]
    assert [values["quantize"] for values in settings] == ["none", "w8a16"]
    assert baseline["restart"] == "no"


def test_the_squeezed_twins_wait_for_their_model_and_find_it() -> None:
    made = services()["squeeze-model"]
    (script,) = made["command"]
    shape = Path(settings_of(services()[SQUEEZED[0]]).model or "").name
    assert f"python /make_model.py --shape {shape} {shape}\n" in script
    assert made["entrypoint"][0] == "sh"
    assert [volume.split(":")[0] for volume in made["volumes"]] == ["squeeze", "./deploy/make_model.py"]
    for name in SQUEEZED:
        assert services()[name]["volumes"] == ["squeeze:/models:ro"]
        assert services()[name]["depends_on"] == {"squeeze-model": {"condition": "service_completed_successfully"}}


@pytest.mark.parametrize("base_mb", [300, 700], ids=["small process", "large process"])
def test_the_limit_of_the_squeeze_lies_between_both_plans(base_mb: int, tmp_path: Path) -> None:
    folder = write_sparse_checkpoint(tmp_path / "model", model_config("llama-800m"))
    limits = {services()[name][key] for name in SQUEEZED for key in ("mem_limit", "memswap_limit")}
    (limit,) = (int(text.removesuffix("m")) * 2**20 for text in limits)
    needs = []
    for name in SQUEEZED:
        settings = settings_of(services()[name])
        options = LoadOptions(
            model=str(folder), recipe=parse_recipe(settings.quantize), device=settings.device, dtype=settings.dtype
        )
        plan = plan_model(options, LoadProgress())
        needs.append(plan.peak_bytes - plan.base_bytes + base_mb * 10**6)
    assert needs[1] < limit < needs[0]


def test_the_gpu_file_changes_image_and_device_of_both_twins_alike() -> None:
    override = read_compose(GPU)["services"]
    assert list(override) == TWINS
    assert override["baseline"] == override["quantized"]
    twin = override["baseline"]
    assert twin["build"] == {"target": "gpu"}
    assert twin["image"] != services()["baseline"]["image"]
    assert settings_of(twin).device == "cuda"
    (device,) = twin["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
