"""What clients may send, field by field. A field that is not listed is refused by name; so is a value out of range.

The names are OpenAI's; `top_k`, `min_p`, `repetition_penalty` and `structured_outputs` are vLLM's. Fields of the type
None exist so that a client may send them empty: what they ask for is not supported.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tinylm.generation.sampling import SamplingSettings

DEFAULTS = SamplingSettings()
MAX_LOGPROBS = 20
NUMBERS = 2**63
Each = TypeVar("Each")
Many = Annotated[list[Each], Field(fail_fast=True)]
"""A list, of which the first wrong entry is reported."""


def at_most(number: int) -> BeforeValidator:
    """A dictionary of this many entries: they are counted before they are looked at."""

    def check(given: Any) -> Any:
        if isinstance(given, dict) and len(given) > number:
            raise ValueError(f"{len(given)} entries; expected at most {number}")
        return given

    return BeforeValidator(check)


class Fields(BaseModel):
    """Fields of a request: nothing else may be sent, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _with_one_unknown(cls, given: Any) -> Any:
        """Of unknown fields one is left, to be refused: a hundred thousand errors would take time and memory."""
        if not isinstance(given, dict):
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = [name for name in given if name not in known]
        return {name: value for name, value in given.items() if name in known or name == unknown[0]}


class TextPart(Fields):
    """A part of a message that is text; there are no others."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: Many[None] | None = None
    logprobs: Many[None] | None = None


class ChatMessage(Fields):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Many[TextPart]
    refusal: None = None
    annotations: Many[None] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Many[None] | None = None
    name: None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def plain(self) -> dict[str, str]:
        """As the chat template takes it: a developer is who was once called system."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}


class StreamOptions(Fields):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Fields):
    """A JSON schema, with a name that changes nothing."""

    name: Annotated[str, Field(max_length=64)] = ""
    description: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = Field(None, description="true or false: an answer always follows the schema")


class TextFormat(Fields):
    """No constraint."""

    type: Literal["text"]


class JsonFormat(Fields):
    """The answer is a JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Fields):
    """The answer is JSON that a schema accepts."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class StructuredOutputs(Fields):
    """vLLM's constraints: one of the three."""

    json_schema: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[Many[str], Field(min_length=1, max_length=1000)] | None = None


Number = Annotated[int, Field(ge=-NUMBERS, lt=NUMBERS)]
Count = Annotated[int, Field(ge=1, lt=NUMBERS)]
Stop = str | Many[str] | None


class Sampling(Fields):
    """How tokens are drawn. What is left out, or null, has the default of `tinylm chat`."""

    model: str | None = Field(None, description="a name from /v1/models; without it the server's first model")
    temperature: Annotated[float, Field(ge=0)] | None = Field(
        None, description=f"0 always takes the likeliest token; default {DEFAULTS.temperature}"
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description=f"default {DEFAULTS.top_p}")
    user: str | None = Field(None, description="changes nothing")
    safety_identifier: str | None = Field(None, description="changes nothing")
    prompt_cache_key: str | None = Field(None, description="changes nothing: every prompt's start is reused")
    metadata: Annotated[dict[str, str], at_most(16)] | None = Field(None, description="changes nothing")
    service_tier: Literal["auto", "default"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def num_answers(self) -> int:
        """Answers to each prompt."""
        return getattr(self, "n", None) or 1

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        stop = getattr(self, "stop", None)
        return [stop] if isinstance(stop, str) else list(stop or ())


class Generation(Sampling):
    """What the two routes of completions have in common."""

    n: Annotated[int, Field(ge=1, lt=NUMBERS)] | None = Field(None, description="answers to each prompt; default 1")
    stop: Stop = Field(None, description="texts that end an answer without being shown")
    seed: Number | None = None
    top_k: Annotated[int, Field(ge=-1, lt=NUMBERS)] | None = Field(None, description="0 or -1: off")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], Annotated[float, Field(ge=-100, le=100)]],
            at_most(1024),
        ]
        | None
    ) = None
    response_format: Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None = None
    structured_outputs: StructuredOutputs | None = None


class ChatRequest(Generation):
    """The body of /v1/chat/completions."""

    messages: Annotated[Many[ChatMessage], Field(min_length=1)]
    max_tokens: Count | None = Field(None, description="most tokens of an answer; default: what the context leaves")
    max_completion_tokens: Count | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    modalities: Many[Literal["text"]] | None = None
    store: Literal[False] | None = None
    parallel_tool_calls: bool | None = Field(None, description="changes nothing: there are no tools")
    tools: Annotated[Many[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None


Prompt = str | Many[str] | Many[int] | Many[Many[int]]


class CompletionRequest(Generation):
    """The body of /v1/completions."""

    prompt: Prompt = Field(description="a text or its token ids, or a list of them")
    max_tokens: Annotated[int, Field(ge=0, lt=NUMBERS)] | None = Field(
        None, description="most tokens of an answer; default 16; 0 with echo only scores the prompt"
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, lt=NUMBERS)] | None = Field(None, description="must equal n")
    suffix: Literal[""] | None = None


class InputMessage(ChatMessage):
    """A message of /v1/responses; the answers of earlier ones may be sent as they came."""

    type: Literal["message"] | None = None
    id: str | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None
    phase: None = None


class NamedSchemaFormat(JsonSchema):
    """A JSON schema, as /v1/responses has it."""

    type: Literal["json_schema"]


class TextOptions(Fields):
    """What the text of a response must be."""

    format: Annotated[TextFormat | JsonFormat | NamedSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(Sampling):
    """The body of /v1/responses."""

    input: str | Annotated[Many[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    store: Literal[False] | None = Field(None, description="nothing is stored")
    background: Literal[False] | None = None
    include: Annotated[Many[Any], Field(max_length=0)] | None = None
    tools: Annotated[Many[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="changes nothing: there are no tools")
    previous_response_id: None = None
    conversation: None = None
    reasoning: None = None


class TokenizeRequest(Fields):
    """The body of /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Many[ChatMessage], Field(min_length=1)] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = Field(True, description="begin a text as documents began in training")
    return_token_strs: bool | None = None


class DetokenizeRequest(Fields):
    """The body of /detokenize."""

    model: str | None = None
    tokens: Many[int]
