"""The bodies of requests: OpenAI's completions and chat, SGLang's /generate, and the tokenizer's endpoints.

A field that we know is checked; one that we do not support is refused by name, unless its value says nothing (null, or
what it would be anyway) or it is one that clients send by habit and that changes no output (`IGNORED`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from policies.request import Slo
from runtime.sampling.params import SamplingParams
from runtime.sequence import Details

Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
TokenIds = list[Annotated[int, Field(ge=0)]]


class Body(BaseModel):
    """A JSON object. `NEUTRAL` has, for fields that we do not support, the values that say nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    IGNORED: ClassVar[frozenset[str]] = frozenset()
    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_what_says_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if not cls._says_nothing(name, value)}

    @classmethod
    def _says_nothing(cls, name: str, value: object) -> bool:
        if value is None or name in cls.IGNORED:
            return True
        return any(type(value) is type(neutral) and value == neutral for neutral in cls.NEUTRAL.get(name, ()))


class StreamOptions(Body):
    """`include_usage`: a last chunk with the usage and no choices; `continuous_usage_stats`: usage in every chunk."""

    IGNORED = frozenset({"include_obfuscation"})

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SloBody(Body):
    """Objectives of this request, in milliseconds. `droppable`: it may be shed once they cannot be met."""

    ttft_ms: Annotated[float, Field(gt=0, le=1e9)] | None = None
    tpot_ms: Annotated[float, Field(gt=0, le=1e9)] | None = None
    e2e_ms: Annotated[float, Field(gt=0, le=1e9)] | None = None
    value: Annotated[float, Field(ge=0, le=1e9)] = 1.0
    droppable: bool = False

    def slo(self) -> Slo:
        """As policies see it."""
        ttft, tpot, e2e = (None if ms is None else round(ms * 1e6) for ms in (self.ttft_ms, self.tpot_ms, self.e2e_ms))
        return Slo(ttft, tpot, e2e, value=self.value, droppable=self.droppable)


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


Stops = Annotated[
    list[str],
    BeforeValidator(_as_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


class ForPolicies(Body):
    """What a request tells the policies of itself."""

    priority: Int32 = 0
    slo: SloBody | None = None

    def details(self, tenant: str) -> Details:
        """As the engine takes it. Raises ValueError for what no record can keep."""
        return Details(tenant=tenant, priority=self.priority, slo=None if self.slo is None else self.slo.slo())


class Sampling(ForPolicies):
    """What completions and chat have in common. Ranges are `SamplingParams`'."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    min_tokens: int = 0
    stop: Annotated[Stops, Field(max_length=64)] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    session: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None

    def details(self, tenant: str) -> Details:
        return replace(super().details(tenant), session=self.session)

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    def sampling_params(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises InvalidSamplingParams, which names the field."""
        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            skip_special_tokens=self.skip_special_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
        )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk for the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_usage_throughout(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


def _check_prompt(prompt: Any) -> Any:
    """Text, texts, token ids, or lists of them. By hand: a union would try every item against every alternative."""
    if isinstance(prompt, str):
        return _checked_text(prompt)
    if isinstance(prompt, list) and prompt:
        if _are_ids(prompt):
            return prompt
        if all(isinstance(item, str) for item in prompt):
            return [_checked_text(item) for item in prompt]
        if all(isinstance(item, list) and item and _are_ids(item) for item in prompt):
            return prompt
    raise ValueError("give a text, a list of texts, token ids, or a list of lists of token ids")


def _checked_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text has half a character (a lone surrogate) in it") from None
    return text


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


_TEXTS = {"type": "array", "minItems": 1, "items": {"type": "string"}}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer"}}
PromptField = Annotated[
    Any,
    BeforeValidator(_check_prompt),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "minItems": 1, "items": _IDS}]}),
]


class CompletionBody(Sampling):
    """`POST /v1/completions`. `logprobs`: how many alternatives to report beside each sampled token."""

    IGNORED = frozenset({"user", "request_id"})
    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {
        "best_of": (1,), "suffix": ("",), "logit_bias": ({},), "use_beam_search": (False,), "length_penalty": (1, 1.0),
        "lora_path": ("",), "add_special_tokens": (True,), "spaces_between_special_tokens": (True,),
        "truncate_prompt_tokens": (-1,), "response_format": ({"type": "text"},),
    }  # fmt: skip

    prompt: PromptField
    max_tokens: int = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=100)] | None = None


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation."""

    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {"tool_calls": ([],), "annotations": ([],), "refusal": ("",)}

    role: str
    content: str | list[TextPart] = ""
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": "".join(parts), **named}


class ChatBody(Sampling):
    """`POST /v1/chat/completions`. Without a limit the answer goes on to the end of the context."""

    IGNORED = frozenset(
        {"user", "request_id", "store", "metadata", "service_tier", "prompt_cache_key", "safety_identifier"}
    )
    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {
        "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
        "logit_bias": ({},), "response_format": ({"type": "text"},), "modalities": (["text"],), "best_of": (1,),
        "chat_template_kwargs": ({},), "add_special_tokens": (False,), "continue_final_message": (False,),
        "use_beam_search": (False,), "lora_path": ("",),
    }  # fmt: skip

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=100)] | None = None
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _logprobs_first(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        return self


class NativeSampling(Body):
    """`sampling_params` of /generate."""

    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {
        "json_schema": ("",), "regex": ("",), "spaces_between_special_tokens": (True,), "no_stop_trim": (False,),
    }  # fmt: skip

    max_new_tokens: int = 128
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_new_tokens: int = 0
    stop: Annotated[Stops, Field(max_length=64)] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    sampling_seed: int | None = None


class NativeBody(ForPolicies):
    """`POST /generate`, in SGLang's form: `text` or `input_ids`, one prompt."""

    IGNORED = frozenset({"rid", "log_metrics", "session_params"})
    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {
        "lora_path": ("",), "image_data": ("", []), "logprob_start_len": (-1,), "return_text_in_logprobs": (False,),
        "return_hidden_states": (False,), "return_routed_experts": (False,), "token_ids_logprob": ([],),
    }  # fmt: skip

    text: str | None = None
    input_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    sampling_params: NativeSampling = NativeSampling()
    stream: bool = False
    return_logprob: bool = False
    top_logprobs_num: Annotated[int, Field(ge=0, le=100)] = 0

    @model_validator(mode="after")
    def _one_prompt(self) -> NativeBody:
        if (self.text is None) == (self.input_ids is None):
            raise ValueError("give text or input_ids, one of them")
        return self

    def params(self) -> SamplingParams:
        """Raises InvalidSamplingParams, which names the field."""
        s = self.sampling_params
        return SamplingParams(
            n=s.n,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            repetition_penalty=s.repetition_penalty,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
            seed=s.sampling_seed,
            max_tokens=s.max_new_tokens,
            min_tokens=s.min_new_tokens,
            stop=tuple(s.stop),
            stop_token_ids=tuple(s.stop_token_ids),
            ignore_eos=s.ignore_eos,
            logprobs=self.top_logprobs_num if self.return_logprob else None,
            skip_special_tokens=s.skip_special_tokens,
        )


class TokenizeBody(Body):
    """`POST /tokenize`: a prompt, or messages that go through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_text(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")
        return self


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool = False


class PoliciesBody(Body):
    """`POST /admin/policies`: the roles that get another policy, each as `name,knob=value,...`."""

    scheduler: str | None = None
    queue: str | None = None
    admission: str | None = None
    preemption: str | None = None
    eviction: str | None = None
    offload: str | None = None
    router: str | None = None

    @model_validator(mode="after")
    def _some_role(self) -> PoliciesBody:
        if not self.changes:
            raise ValueError(f"name at least one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def changes(self) -> dict[str, str]:
        """Role -> policy."""
        return {role: policy for role, policy in self.model_dump().items() if policy is not None}
