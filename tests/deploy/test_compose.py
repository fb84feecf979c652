"""The compose files are valid, and the twins in them differ in nothing but what is compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from service.invocation import read_invocation
from service.settings import Settings
from tests.deploy.support import DEPLOY, read_compose, seconds
from tests.floors import ROOT

COMPOSE = ROOT / "docker-compose.yml"
GPU = DEPLOY / "gpu.yml"
TWINS = ["baseline", "quantized"]
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


@pytest.mark.parametrize("path", [COMPOSE, GPU], ids=lambda path: path.name)
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


def test_the_twins_share_everything_but_cores_port_and_recipe() -> None:
    baseline, quantized = ({key: value for key, value in services()[name].items() if key not in OWN} for name in TWINS)
    assert baseline == quantized
    baseline_settings, quantized_settings = (settings_of(services()[name]).model_dump() for name in TWINS)
    assert {name for name, value in baseline_settings.items() if quantized_settings[name] != value} == {"quantize"}


def test_the_twins_are_an_unquantized_and_a_quantized_server_on_their_ports() -> None:
    baseline, quantized = (services()[name] for name in TWINS)
    assert [settings_of(twin).quantize for twin in (baseline, quantized)] == ["none", "w8a16"]
    assert [baseline["ports"], quantized["ports"]] == [["127.0.0.1:8001:8000"], ["127.0.0.1:8002:8000"]]
    assert baseline["cpuset"] != quantized["cpuset"]
    assert all("profiles" not in service for service in services().values())


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
    assert all(port.startswith("127.0.0.1:") for port in services()[name]["ports"])
    assert all(port.startswith("0.0.0.0:") for port in services({"BIND_ADDRESS": "0.0.0.0"})[name]["ports"])


def test_an_image_of_others_has_a_fixed_version() -> None:
    for service in services().values():
        if "build" not in service:
            _, _, tag = service["image"].partition(":")
            assert tag.count(".") == 2
            assert tag != "latest"


def test_a_mounted_path_exists() -> None:
    mounted = [volume for service in services().values() for volume in service["volumes"] if volume[0] == "."]
    assert mounted
    assert {path for path in mounted if not (ROOT / path.split(":")[0]).is_dir()} == set()


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
