"""Settings of the service: the only list of them. Flags, variables, help and checks are made from it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from service.api.limits import MAX_RATE, parse_rates
from service.errors import SettingError
from service.loading.artifact import is_artifact, read_manifest

SECRETS = frozenset({"api_keys", "metrics_key"})
"""Names that only variables have, and nothing prints; a file may hold the same."""

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.-]+(:[0-9]{1,5})?|[a-z][a-z0-9+.-]*://\[[0-9a-f:]+\](:[0-9]{1,5})?")
_TWIN = re.compile(r"https?://[a-z0-9.-]{1,253}(?::([0-9]{1,5}))?")
_DEMO_NAME = "pennyweight-demo"
_MAX_TOKEN_BYTES = 4096
_SIZE = re.compile(r"(\d{1,18})\s*([KMGT]i?B|B)?", re.ASCII)
_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def parse_size(value: object) -> object:
    """Bytes of a text such as `64MiB`, `2GB` or `1000`; anything else is left to the type check."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise PydanticCustomError("size", "must be a number of bytes, alone or with a unit such as KB, MiB or GiB")
    return int(match[1]) * _UNITS[match[2] or ""]


def parse_origins(text: str) -> tuple[str, ...]:
    """Origins with commas between them, each `scheme://host[:port]` as browsers write it, or `*` alone.

    Raises:
        ValueError: there is something else.
    """
    origins = tuple(word.strip() for word in text.split(","))
    if origins != ("*",) and not all(map(_ORIGIN.fullmatch, origins)):
        raise ValueError
    return origins


def _check_rates(value: str | None) -> str | None:
    try:
        parse_rates(value or "1/second")
    except ValueError as error:
        raise PydanticCustomError(
            "rate", f"must be rates of 1 to {MAX_RATE} requests, such as 60/minute or 5/second;1000/day"
        ) from error
    return value


def _check_origins(value: str | None) -> str | None:
    try:
        parse_origins(value or "*")
    except ValueError as error:
        raise PydanticCustomError(
            "origins", "must be origins such as https://example.org or http://localhost:3000, or *"
        ) from error
    return value


def _check_twin(value: str | None) -> str | None:
    match = _TWIN.fullmatch(value or "http://none")
    if match is not None and 1 <= int(match[1] or 80) <= 65535:
        return value
    raise PydanticCustomError(
        "twin",
        "must be an origin such as http://127.0.0.1:8001, in small letters and without a path; "
        "a page's security policy can name no IPv6 address",
    )


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=1, le=2**50)]


class Settings(BaseModel):
    """Everything that can be set; None means that a value is worked out when the service starts."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Annotated[
        str | None,
        Field(min_length=1, max_length=4096, description="hub id or local directory; the demo model if none"),
    ] = None
    revision: Annotated[
        str | None, Field(min_length=1, max_length=256, description="branch, tag or commit of a hub model")
    ] = None
    served_model_name: Annotated[
        str | None, Field(min_length=1, max_length=256, description="name for clients; default: the model's own")
    ] = None
    quantize: Annotated[
        str, Field(min_length=1, max_length=4096, description="recipe, such as w8a16, w4a16-g64 or none")
    ] = "w8a16"
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(description="where the model runs")] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"], Field(description="of activations and unquantized weights")
    ] = "auto"
    threads: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1, le=1024)],
        Field(description="CPU threads of the engine, 1 to 1024; auto: what affinity, quota and cores allow"),
    ] = "auto"
    kernel_isa: Annotated[
        Literal["auto", "torch", "baseline", "avx2", "avx512", "amx"],
        Field(description="instruction set of the CPU kernels; auto: the best there is; torch: none of them"),
    ] = "auto"
    fidelity: Annotated[
        Literal["off", "background", "before-ready"],
        Field(description="compare with the unquantized model: beside the first requests, or before any is taken"),
    ] = "background"
    max_kl: Annotated[
        float | None,
        Field(
            ge=0,
            le=100,
            allow_inf_nan=False,
            description="nats by which quantization may move the next token, in the mean; compares before-ready",
        ),
    ] = None
    host: Annotated[str, Field(min_length=1, max_length=253, description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="port to listen on; 0: any free one")] = 8000
    max_model_len: Annotated[
        int | None, Field(ge=1, le=2**31 - 1, description="tokens of prompt and answer; default: the model's context")
    ] = None
    max_num_seqs: Annotated[int, Field(ge=1, le=4096, description="sequences computed together")] = 64
    max_num_batched_tokens: Annotated[int, Field(ge=1, le=2**20, description="tokens of one step")] = 512
    step_budget_ms: Annotated[
        int, Field(ge=1, le=60000, description="milliseconds that prompts may add to a step that decodes")
    ] = 50
    memory: Annotated[
        Size | None,
        Field(description="memory that the process may take, such as 2GiB; more is refused; default: what there is"),
    ] = None
    kv_memory: Annotated[
        Size | None, Field(description="memory for keys and values, such as 64MiB; default: worked out")
    ] = None
    kv_cache: Annotated[
        Literal["auto", "int8"],
        Field(description="how keys and values are stored; auto: in the dtype of activations; int8: in half of 16 bit"),
    ] = "auto"
    prefix_cache: Annotated[
        Literal["on", "off"], Field(description="keep what prompts left in the KV memory, for others that begin alike")
    ] = "on"
    deterministic: Annotated[
        bool,
        Field(description="the same bits whatever runs beside a request: each computed alone, no prefix cache; slow"),
    ] = False
    max_queue: Annotated[int, Field(ge=1, le=2**20, description="sequences that may wait")] = 256
    queue_timeout: Annotated[
        float, Field(ge=0.1, le=86400, allow_inf_nan=False, description="seconds that a request may wait for its start")
    ] = 60.0
    request_timeout: Annotated[
        float, Field(ge=0.1, le=86400, allow_inf_nan=False, description="seconds that a request may take in all")
    ] = 600.0
    receive_timeout: Annotated[
        float, Field(ge=0.1, le=86400, allow_inf_nan=False, description="seconds in which a request must have arrived")
    ] = 30.0
    send_timeout: Annotated[
        float, Field(ge=0.1, le=86400, allow_inf_nan=False, description="seconds that a client may leave data unread")
    ] = 60.0
    drain_timeout: Annotated[
        float, Field(ge=0, le=86400, allow_inf_nan=False, description="seconds for running requests at the end")
    ] = 30.0
    api_keys_file: Annotated[
        Path | None,
        Field(description="file with [NAME:]KEY in each line; default: PENNYWEIGHT_API_KEYS, else no key is needed"),
    ] = None
    rate_limit: Annotated[
        str | None,
        Field(min_length=1, max_length=256, description="requests of one client, such as 60/minute or 5/second;99/day"),
        AfterValidator(_check_rates),
    ] = None
    max_concurrent_requests: Annotated[
        int | None, Field(ge=1, le=2**20, description="requests of one client at the same time")
    ] = None
    metrics_key_file: Annotated[
        Path | None, Field(description="file with a key for /metrics; default: PENNYWEIGHT_METRICS_KEY, else none")
    ] = None
    cors_origin: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=4096,
            description="origins of web pages that may use the service, commas between them; with keys * is all",
        ),
        AfterValidator(_check_origins),
    ] = None
    twin: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=300,
            description="origin of another service to show beside this one on the page; its --cors-origin names this",
        ),
        AfterValidator(_check_twin),
    ] = None
    docs: Annotated[
        Literal["on", "off"], Field(description="serve /docs, a page whose scripts come from cdn.jsdelivr.net")
    ] = "off"
    max_body_bytes: Annotated[Size, Field(ge=1024, le=2**30, description="longest request body")] = 4194304
    failed_linger: Annotated[
        float, Field(ge=0, le=86400, allow_inf_nan=False, description="seconds that /readyz tells of a failed load")
    ] = 0.0
    log_format: Annotated[Literal["text", "json"], Field(description="form of the log on stderr")] = "text"
    log_prompts: Annotated[bool, Field(description="write into the log what clients send to the model")] = False
    cache_dir: Annotated[
        Path | None,
        Field(description="where hub models are kept, quantized ones below; default: HF_HOME and XDG_CACHE_HOME"),
    ] = None
    cache_limit: Annotated[
        int,
        BeforeValidator(parse_size),
        Field(ge=0, le=2**50, description="bytes of quantized models kept for the next start, such as 20GiB; 0: none"),
    ] = 32 * 2**30
    verify: Annotated[
        Literal["block", "full"],
        Field(description="of a quantized model that is read again: the checksum of each block, or a sha256 too"),
    ] = "block"
    hf_token_file: Annotated[
        Path | None, Field(description="file that holds the token for the hub; default: the variable HF_TOKEN")
    ] = None
    trust_remote_code: Annotated[bool, Field(description="run the Python code that a model brings along")] = False


def model_name(settings: Settings) -> str:
    """What clients call the model, before it is loaded."""
    if settings.served_model_name is not None:
        return settings.served_model_name
    if settings.model is None:
        return _DEMO_NAME
    folder = os.path.expanduser(settings.model)
    return Path(folder).resolve().name if os.path.isdir(folder) else settings.model


def as_quantized(settings: Settings) -> Settings:
    """Settings in which an artifact that is to be served decides on recipe and dtype, unless others are given.

    Raises:
        ArtifactError: it is damaged or of another version.
    """
    if settings.model is None:
        return settings
    folder = Path(os.path.expanduser(settings.model))
    if not is_artifact(folder):
        return settings
    manifest = read_manifest(folder)
    own = {"quantize": manifest.recipe, "dtype": manifest.dtype}
    return settings.model_copy(update={name: own[name] for name in own.keys() - settings.model_fields_set})


def as_toml(settings: Settings) -> str:
    """Settings as a file for `--config`; those that are not set stand in comments."""
    lines = []
    for name, value in settings.model_dump(mode="json").items():
        lines.append(f"# {name} =" if value is None else f"{name} = {json.dumps(value)}")
    return "\n".join(lines)


def read_hub_token(path: Path) -> str:
    """The token in `--hf-token-file`.

    Raises:
        SettingError: the file cannot be read, or holds something else than one token.
    """
    try:
        with path.expanduser().open("rb") as file:
            words = file.read(_MAX_TOKEN_BYTES).split()
    except OSError as error:
        raise SettingError(
            f"--hf-token-file {path}: cannot be read ({error.strerror}); give a file that can be"
        ) from error
    if len(words) != 1 or not words[0].isascii():
        raise SettingError(f"--hf-token-file {path}: must hold one token and nothing else; correct the file")
    return words[0].decode("ascii")
