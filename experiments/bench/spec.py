"""What is sent where, and how: a benchmark as a specification, stored whole in run.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from experiments.spec import SpecError
from experiments.workloads.spec import Count, Positive, Seed, WorkloadSpec
from runtime.openai_wire import CHAT, COMPLETIONS, root_url


class BenchSpec(BaseModel):
    """A workload against a server.

    Attributes:
        base_url: the server's address, with or without `/v1`.
        model: as the server names it.
        workload: which requests, and when each is due.
        seed: of the prompts' content.
        api: which endpoint is asked.
        prompts: `ids` sends token ids, `text` sends text; the chat API takes text alone, and is sent it by default.
        concurrency: closed loop: so many clients, each sending its next request when its last one has ended; the
            workload's arrival times are left out. None: open loop, each request at its time.
        ignore_eos: every answer is as long as the workload says: `ignore_eos` with the true output length as the cap,
            as `vllm bench serve --ignore-eos` sends it. Otherwise the cap is the workload's and the model ends itself.
        temperature: None: the server's default.
        extra_body: further fields of every request.
        warm_up: requests sent, and awaited, before the first one that counts.
        timeout_s: seconds after which a request without a whole answer has failed.
        tokenizer: a folder with tokenizer.json, for the prompts; None: the server's own.
        vocab_size: token ids are random ones below it, without a tokenizer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    base_url: str
    model: Annotated[str, Field(min_length=1)]
    workload: WorkloadSpec
    seed: Seed = 0
    api: Literal["completions", "chat"] = "completions"
    prompts: Literal["ids", "text"] = Field(default_factory=lambda fields: "text" if fields["api"] == "chat" else "ids")
    concurrency: Count | None = None
    ignore_eos: bool = True
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    extra_body: dict[str, Any] = {}
    warm_up: Annotated[int, Field(strict=True, ge=0)] = 1
    timeout_s: Positive = 3600.0
    tokenizer: str | None = None
    vocab_size: Annotated[int, Field(strict=True, ge=2)] | None = None

    @field_validator("base_url")
    @classmethod
    def _an_address(cls, value: str) -> str:
        return root_url(value)

    @model_validator(mode="after")
    def _fitting(self) -> BenchSpec:
        if self.api == "chat" and self.prompts == "ids":
            raise ValueError("the chat API takes no token ids; send prompts 'text', or use api 'completions'")
        if self.vocab_size is not None and (self.prompts, self.tokenizer) != ("ids", None):
            raise ValueError("vocab_size is for random token ids: prompts 'ids' and no tokenizer")
        return self

    @property
    def path(self) -> str:
        """The endpoint on the server."""
        return CHAT if self.api == "chat" else COMPLETIONS


def check_bench(**fields: Any) -> BenchSpec:
    """A specification from plain values. Raises SpecError with the first field that is wrong."""
    try:
        return BenchSpec(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise SpecError(f"{field}: {message}" if field else message) from error
