"""How a replica of a simulation sends KV cache to another one, as a specification has it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

_UNITS = {"B/s": 1.0, "KB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12, "Gbit/s": 1e9 / 8}


class LinkSpec(BaseModel):
    """How a replica of a simulation sends KV cache to another one.

    Attributes:
        bandwidth: bytes a second in one direction, as 50e9, `50GB/s` or `400Gbit/s`; `inf`: no time at all. None: the
            roofline's device's to another one of its machine (NVLink, else its host link).
        latency_us: from the last byte's leaving to the KV's being usable.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bandwidth: float | None = None
    latency_us: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 10.0

    @field_validator("bandwidth", mode="before")
    @classmethod
    def _as_bytes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        unit = next((u for u in sorted(_UNITS, key=len, reverse=True) if value.strip().endswith(u)), "")
        try:
            return float(value.strip().removesuffix(unit)) * _UNITS.get(unit, 1.0)
        except ValueError:
            raise ValueError(f"write a bandwidth as 50GB/s or 400Gbit/s; units: {', '.join(_UNITS)}") from None

    @field_validator("bandwidth")
    @classmethod
    def _above_zero(cls, value: float | None) -> float | None:
        if value is not None and not value > 0:
            raise ValueError("a bandwidth must be above 0")
        return value

    @model_serializer(mode="wrap")
    def _infinity_as_text(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = handler(self)
        return {**fields, "bandwidth": "inf"} if self.bandwidth == float("inf") else dict(fields)
