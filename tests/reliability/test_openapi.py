"""schemathesis against our own schema: all its checks on all routes, with data that fits and data that does not.

Data that fits may still be refused, for reasons that no schema can tell: a rule between two fields, or what the model
is. `REASONS` has all of these; a refusal for any other reason means that the schema promises too much.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from pydantic.json_schema import models_json_schema
from schemathesis import Case, CheckContext
from schemathesis.config import SchemathesisConfig
from schemathesis.core.transport import Response
from schemathesis.engine import events, from_schema
from schemathesis.openapi import from_dict

from service.api.chat_schemas import ChatRequest, DetokenizeRequest, TokenizeRequest
from service.api.schemas import CompletionRequest, GenerateRequest
from tests.api.support import RunningService
from tests.reliability.conftest import KEY

pytestmark = pytest.mark.reliability

SEED = 20
NUM_EXAMPLES, NUM_NIGHTLY_EXAMPLES = 5, 1000
REQUESTS = (ChatRequest, CompletionRequest, DetokenizeRequest, GenerateRequest, TokenizeRequest)
PHASES = {"coverage", "fuzzing", "stateful"}
"""The others have nothing to do: the schema has no examples."""
REASONS = (
    # the model
    r"\d+ prompt tokens and \d+ new ones make \d+; the context is",
    r" characters; (\d+ tokens, the context, hold|the context holds) at most ",
    r"^\d+ tokens; the context is \d+ tokens",
    r"the vocabulary (is 0\.\.|has )\d+",
    r"token id \d+ is outside the vocabulary",
    # two fields
    r"^(no prompt|\w+ and \w+( and \w+)?) given; send exactly one of prompt, prompts and token_ids$",
    r"^(neither|both) of prompt and messages given",
    r"^stream_options: .*is allowed with a stream only",
    r"^top_logprobs: .*is allowed with logprobs only",
    r"^max_completion_tokens: .*differs from max_tokens",
    r"^min_tokens is \d+; the request ends after \d+ new tokens",
    r"^max_tokens is 0; then only the prompt can be told",
    r"^(regex|grammar): .*comes with another field that says what the text must follow",
    r"^response_format\.json_schema: .*(is missing; type json_schema needs it|goes with type json_schema only)",
    r"^n is \d+ and there are \d+ prompts",
    r"add_special_tokens is true; the chat template writes",
    # languages of their own
    r"^the (schema|expression|grammar|JSON schema|regular expression) cannot be compiled: ",
    r"^the messages hold a control token|the model.s chat template does not take these messages",
)


@schemathesis.check
def refusal_beyond_the_schema(ctx: CheckContext, response: Response, case: Case[Any]) -> None:
    """What fits the schema is refused for one of `REASONS` only, or as it has a number such as 1.0 for an integer."""
    if response.status_code == 400 and case.meta is not None and case.meta.generation.mode.is_positive:
        message = response.json()["error"]["message"]
        assert has_whole_float(case.body) or any(re.search(reason, message) for reason in REASONS), message


def has_whole_float(value: Any) -> bool:
    """Whether a number is an integer to JSON schema and none to this service."""
    if isinstance(value, dict | list):
        return any(map(has_whole_float, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and value.is_integer()


def run(service: RunningService, *, num_examples: int) -> Iterator[Any]:
    """Everything that schemathesis tells while it runs."""
    config = SchemathesisConfig.from_dict(
        {
            "seed": SEED,
            "base-url": service.url,
            "headers": {"Authorization": f"Bearer {KEY}"},
            "generation": {"mode": "all", "max-examples": num_examples, "database": "none", "no-shrink": True},
            "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "400", "404"]}},
        }
    )
    yield from from_schema(from_dict(service.client.get("/openapi.json").json(), config=config)).execute()


def check(service: RunningService, *, num_examples: int, least: int) -> None:
    canary = service.canary()
    cases: Counter[str] = Counter()
    failures = []
    for event in run(service, num_examples=num_examples):
        if isinstance(event, events.NonFatalError | events.FatalError):
            failures.append(str(event))
        if isinstance(event, events.ScenarioFinished):
            cases[event.phase.value] += len(event.recorder.interactions)
            failures += [
                f"{event.recorder.label}: {node.failure_info.failure}\n{node.failure_info.code_sample[:500]}"
                for nodes in event.recorder.checks.values()
                for node in nodes
                if node.failure_info is not None
            ]
    assert not failures, "\n\n".join(failures[:5])
    assert cases.keys() >= PHASES
    assert cases.total() >= least
    assert service.canary() == canary


def test_what_is_shown_is_what_is_done(keyed: RunningService) -> None:
    check(keyed, num_examples=NUM_EXAMPLES, least=1500)


@pytest.mark.nightly
def test_what_is_shown_is_what_is_done_at_length(keyed: RunningService) -> None:
    check(keyed, num_examples=NUM_NIGHTLY_EXAMPLES, least=10_000)


def test_bounds_are_shown_exactly(keyed: RunningService) -> None:
    shown = keyed.client.get("/openapi.json").json()["components"]["schemas"]
    template = "#/components/schemas/{model}"
    _, own = models_json_schema([(request, "validation") for request in REQUESTS], ref_template=template)
    assert shown | own["$defs"] == shown
    assert shown["ChatRequest"]["properties"]["seed"]["anyOf"][0]["maximum"] == 2**63 - 1


def test_every_request_and_no_answer_that_is_never_given_is_shown(keyed: RunningService) -> None:
    document = keyed.client.get("/openapi.json").json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    bodies = [operation["requestBody"] for operation in operations if "requestBody" in operation]
    shown = {body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2] for body in bodies}
    assert shown == {request.__name__ for request in REQUESTS}
    assert not any("422" in operation["responses"] for operation in operations)
    assert "HTTPValidationError" not in document["components"]["schemas"]
