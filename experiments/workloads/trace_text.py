"""A trace's figures as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.text import Text


def trace_text(name: str, found: dict[str, Any]) -> Text:
    """A trace's figures (`workloads.describing`) as lines: what it does not have is left out."""
    if "clients" in found:
        return _clients_text(name, found)
    if "counts" in found:
        return _counts_text(name, found)
    return Text("\n").join(
        [
            Text(f"{name}: {_count(found['requests'])} requests ({found['format']})", "bold"),
            *(Text(f"  {label:<22}{text}") for label, text in _trace_lines(found)),
            Text(""),
        ]
    )


def _clients_text(name: str, found: dict[str, Any]) -> Text:
    """Of `client_statistics`: fields in the order of the file."""
    rate = found["rate"]
    lines = [
        ("rate", f"{rate['mean']:.1f} requests/s, {rate['min']:.1f} to {rate['max']:.1f}"),
        ("CV of clients", f"{found['cv']:.2f}" if found["cv"] is not None else "-"),
        ("top clients", ", ".join(f"{top}: {100 * share:.0f} %" for top, share in found["top_shares"].items())),
    ]
    for field, stats in found["fields"].items():
        digits = 2 if stats["max"] <= 1 else 1 if stats["mean"] < 10 else 0
        lines.append((field, " / ".join(f"{stats[each]:.{digits}f}" for each in LENGTHS)))
    head = Text(f"{name}: {_count(found['clients'])} clients ({found['format']})", "bold")
    return Text("\n").join([head, *(Text(f"  {label:<22}{text}") for label, text in lines), Text("")])


def _counts_text(name: str, found: dict[str, Any]) -> Text:
    counts = ", ".join(f"{_count(number)} {what}" for what, number in found["counts"].items())
    return Text(f"{name}: {counts} ({found['format']})\n", "bold")


LENGTHS = ("mean", "p50", "p90", "p99", "max")


def _trace_lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if found["not_servable"]:
        yield "without tokens", f"{_count(found['not_servable'])} requests, which no server can be given"
    tokens = found["tokens"]
    yield "", f"tokens: {' / '.join(LENGTHS)}"
    for which in ("input", "output"):
        yield which, _five(tokens[which])
    if tokens["rank_correlation"] is not None:
        yield "rank correlation", f"{tokens['rank_correlation']:.2f}"
    yield from _arrival_lines(found["arrivals"])
    if found["tenants"]:
        tenants = found["tenants"]
        shares = ", ".join(f"top {top} {100 * share:.1f} %" for top, share in tenants["top_shares"].items())
        yield "tenants", f"{_count(tenants['count'])}; of the requests: {shares}"
    yield from _session_lines(found["sessions"])
    yield from _prefix_lines(found["prefixes"])
    if found.get("chunks"):
        chunks, passages = found["chunks"], found["chunks"]["passages"]
        yield "hit rate, no limit", f"{chunks['prefix']:.3f} by prefix, {chunks['anywhere']:.3f} of chunks anywhere"
        top = ", ".join(f"top {n} % {100 * passages[f'top_{n}_percent']:.1f} %" for n in (1, 10))
        yield "passages", f"{_count(passages['count'])} in {_count(passages['uses'])} uses; of these: {top}"


def _arrival_lines(arrivals: dict[str, float] | None) -> Iterator[tuple[str, str]]:
    if not arrivals:
        yield "arrivals", "none on one clock"
        return
    span = arrivals["span_s"]
    yield "span", f"{span:.0f} s" if span < 2 * 86_400 else f"{span / 86_400:.2f} d"
    yield "rate", f"{arrivals['rate']:.4g} requests/s"
    yield "CV of gaps", f"{arrivals['cv']:.2f}"
    yield "IDC at 1 / 10 / 60 s", " / ".join(f"{arrivals[f'idc_{w}s']:.2f}" for w in (1, 10, 60))
    yield "gaps", f"median {arrivals['median_gap_s']:.3f} s, largest {arrivals['largest_gap_s']:.0f} s"
    yield "requests a minute", f"{_count(arrivals['fewest_a_minute'])} to {_count(arrivals['most_a_minute'])}"
    if arrivals["most_together"] > 1:
        together = f"mean {arrivals['mean_together']:.1f}, most {_count(arrivals['most_together'])}"
        yield "at one instant", f"{together}; {_count(arrivals['instants'])} instants"


def _session_lines(sessions: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if not sessions:
        return
    turns = sessions["turns"]
    nested = f"; {_count(sessions['nested_calls'])} more by sub-agents" if sessions["nested_calls"] else ""
    yield "sessions", f"{_count(sessions['count'])}"
    yield (
        "requests of each",
        (f"mean {turns['mean']:.1f}, p50 {turns['p50']:.0f}, p90 {turns['p90']:.0f}, max {turns['max']:.0f}{nested}"),
    )
    first = sessions["first_input"]
    yield "first input", f"mean {first['mean']:.0f}, p50 {first['p50']:.0f}, p90 {first['p90']:.0f}"
    for key, label in (("gap_s", "from turn to turn"), ("think_s", "think time")):
        if sessions[key]:
            yield label, " ".join(f"{name} {sessions[key][name]:.0f} s" for name in ("mean", "p50", "p90"))


def _prefix_lines(prefixes: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if not prefixes:
        return
    yield (
        "prefix blocks",
        (
            f"of {prefixes['block_tokens']} tokens: {_count(prefixes['distinct_blocks'])} distinct of "
            f"{_count(prefixes['block_references'])}, {100 * prefixes['used_once']:.0f} % used once"
        ),
    )
    yield (
        "hit rate, no limit",
        (
            f"{prefixes['hit_rate']:.3f} of tokens, {prefixes['hit_rate_blocks']:.3f} of blocks, "
            f"{prefixes['hit_rate_mean_request']:.3f} mean of requests"
        ),
    )
    if prefixes["hit_rate_within_session"] is not None:
        yield "within a session", f"{prefixes['hit_rate_within_session']:.3f} of tokens"
    yield "tokens not in cache", _five(prefixes["new_tokens"])
    curve = [(capacity, rate) for capacity, rate in prefixes["lru"].items()]
    yield "LRU, blocks", " ".join(f"{_count(capacity):>7}" for capacity, _ in curve) + "     inf"
    yield "  of tokens", " ".join(f"{rate:7.3f}" for _, rate in curve) + f" {prefixes['hit_rate']:7.3f}"


def _five(stats: dict[str, float]) -> str:
    return " / ".join(f"{stats[name]:.0f}" for name in LENGTHS)


def _count(number: float) -> str:
    return f"{number:,.0f}"
