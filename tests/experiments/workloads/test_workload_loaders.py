"""Formats, their traps, and what a malformed line says."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.workloads import FORMATS, TraceError, load
from experiments.workloads.loaders import detect, read_rows

Write = Callable[[str, str | bytes], Path]

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
BLOCKS = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'
CHAT = (
    '{"chat_id": 7, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 20, "output_length": 5, '
    '"type": "text", "turn": 1, "hash_ids": [10, 11]}\n'
    '{"chat_id": 8, "parent_chat_id": 7, "timestamp": 70.5, "input_length": 40, "output_length": 6, '
    '"type": "text", "turn": 2, "hash_ids": [10, 12, 13]}\n'
    '{"chat_id": 9, "parent_chat_id": 3, "timestamp": 71.0, "input_length": 16, "output_length": 1, '
    '"type": "file", "turn": 4, "hash_ids": [14]}\n'
)


def test_azure_2023_is_read_with_crlf_seven_digits_and_no_last_newline(write: Write) -> None:
    path = write(
        "a.csv",
        f"{AZURE}\r\n2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:03.9799601,7,8".encode(),
    )
    workload = load(path)
    assert workload.provenance["format"] == "azure"
    assert workload.arrival_ns.tolist() == [0, 100]  # the seventh digit is 100 ns
    assert workload.prompt_tokens.tolist() == [4808, 7]
    assert workload.output_tokens.tolist() == [10, 8]


def test_azure_2024_is_read_with_zones_and_whole_seconds(write: Write) -> None:
    rows = "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,2399,6\n2024-05-10 02:00:02+02:00,1,1\n"
    workload = load(write("b.csv", f"{AZURE}\n{rows}"))
    assert workload.arrival_ns.tolist() == [0, 990_070_000, 1_990_070_000]


def test_burstgpt_1_is_read_and_failed_requests_are_dropped_and_counted(write: Write) -> None:
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    rows = "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,0,0,0,API log\n118.5,GPT-4,417,276,693,API log\n"
    workload = load(write("burst.csv", header + rows))
    assert workload.arrival_ns.tolist() == [0, 113_500_000_000]
    assert workload.prompt_tokens.tolist() == [472, 417]
    assert workload.session is None
    assert workload.provenance["steps"] == [{"step": "drop_zero_lengths", "no_prompt": 1, "no_output": 0}]


def test_burstgpt_2_is_read_with_its_sessions(write: Write) -> None:
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    rows = "1,abc,0.5,GPT-4,10,20,30,x\n2,def,0.5,GPT-4,11,21,32,x\n3,abc,0.5,GPT-4,12,22,34,x\n"
    workload = load(write("burst2.csv", header + rows))
    assert workload.session is not None
    assert workload.session.tolist() == [0, 1, 0]
    assert workload.output_tokens.tolist() == [20, 21, 22]


def test_bailian_is_read_in_seconds_with_sessions_by_their_root(write: Write) -> None:
    workload = load(write("qwen.jsonl", CHAT))
    assert workload.provenance["format"] == "bailian"
    assert workload.arrival_ns.tolist() == [0, 9_386_000_000, 9_886_000_000]
    assert workload.hash_block == 16
    assert workload.hash_ids == [(10, 11), (10, 12, 13), (14,)]
    assert workload.session is not None
    assert workload.session.tolist() == [7, 7, 9]
    assert workload.turn is not None
    assert workload.turn.tolist() == [0, 1, 3]


def test_mooncake_times_are_milliseconds_and_timed_trace_times_are_seconds(write: Write) -> None:
    line = '{"timestamp": %s, "input_length": 17, "output_length": 2, "hash_ids": [1, 2]}\n'
    mooncake = load(write("m.jsonl", line % "1000" + line % "3000"))
    assert mooncake.provenance["format"] == "mooncake"
    assert mooncake.arrival_ns.tolist() == [0, 2_000_000_000]
    timed = load(write("t.jsonl", line % "27.48" + line % "28"))
    assert timed.provenance["format"] == "timed_trace"
    assert timed.arrival_ns.tolist() == [0, 520_000_000]
    assert timed.hash_block == 16


def test_the_block_size_is_found_from_the_data_and_can_be_named(write: Write) -> None:
    assert load(write("m512.jsonl", BLOCKS)).hash_block == 512
    odd = write("m48.jsonl", '{"timestamp": 0, "input_length": 100, "output_length": 5, "hash_ids": [1, 2, 3]}\n')
    assert load(odd, block_size=48).hash_block == 48
    with pytest.raises(TraceError, match=r"m48.jsonl:1: 3 hash_ids for 100 tokens; expected 1 "):
        load(odd)


def test_a_trace_of_agents_keeps_its_sessions_and_drops_empty_prompts(write: Write) -> None:
    empty = '{"timestamp": 5, "input_length": 0, "output_length": 5, "hash_ids": [], "session_id": 1}\n'
    full = '{"timestamp": 9, "input_length": 20, "output_length": 5, "hash_ids": [4, 5], "session_id": 2}\n'
    workload = load(write("agent.jsonl", empty + full))
    assert workload.session is not None
    assert workload.session.tolist() == [2]
    assert workload.arrival_ns.tolist() == [0]
    assert workload.provenance["steps"] == [{"step": "drop_zero_lengths", "no_prompt": 1, "no_output": 0}]


def test_ragpulse_is_read_with_times_as_text_out_of_order_and_a_blank_last_line(write: Write) -> None:
    line = '{"timestamp": "%s", "input_length": %d, "output_length": 2, "hash_ids": {"web": []}, "session_id": "%s"}\n'
    workload = load(write("rag.jsonl", line % ("93", 1, "x") + line % ("82", 2, "y") + "\n"))
    assert workload.arrival_ns.tolist() == [0, 11_000_000_000]
    assert workload.prompt_tokens.tolist() == [2, 1]
    assert workload.provenance["steps"] == [{"step": "sort_by_arrival", "out_of_order": 1}]


def test_coding_sessions_are_read_with_sub_agents_absent_fields_and_ids_local_to_a_session(write: Write) -> None:
    call = {"t": 1.5, "in": 870_000, "out": 3, "hash_ids": [1, 2], "think_time": 1.0}
    nested = {"type": "subagent", "t": 2.0, "requests": [{"t": 2.5, "in": 130, "out": 4, "hash_ids": [1, 3]}]}
    failed = {"t": 3.0, "in": 130, "out": 0, "hash_ids": [1]}
    session = {"id": "a", "block_size": 64, "hash_id_scope": "local", "requests": [call, nested, failed]}
    workload = load(write("code.jsonl", json.dumps(session) + "\n" + json.dumps(session | {"id": "b"}) + "\n"))
    assert workload.prompt_tokens.tolist() == [870_000, 870_000, 130, 130]
    assert workload.arrival_ns.tolist() == [0, 0, 1_000_000_000, 1_000_000_000]
    assert workload.hash_ids is not None
    assert set(workload.hash_ids[0]).isdisjoint(workload.hash_ids[1])
    assert workload.hash_ids[0][0] == workload.hash_ids[2][0]
    assert workload.provenance["steps"][0] == {"step": "drop_zero_lengths", "no_prompt": 0, "no_output": 2}


@pytest.mark.parametrize(
    ("header", "row", "unit_ns"),
    [
        ("StartTimeOffset,ContextTokens,GeneratedTokens", "{t},3,4", 1),
        ("req_id,adapter_dir,prompt_len,output_len,req_time", "0,me,3,4,{t}", 10**9),
        ("timestamp_s,client_id,input_tokens,output_tokens,reason_tokens", "{t},c,3,4,1", 10**9),
    ],
)
def test_a_time_column_is_read_in_its_own_unit(write: Write, header: str, row: str, unit_ns: int) -> None:
    content = "\n".join([header, row.format(t=10), row.format(t=12)])
    assert load(write("u.csv", content)).arrival_ns.tolist() == [0, 2 * unit_ns]


def test_times_keep_every_digit_that_the_file_has(write: Write) -> None:
    path = write("s.csv", "timestamp_s,client_id,input_tokens,output_tokens\n0,a,1,1\n1700000000.123456789,a,1,1\n")
    assert load(path).arrival_ns.tolist() == [0, 1_700_000_000_123_456_789]


def test_lengths_without_times_all_arrive_at_zero_and_say_so(write: Write) -> None:
    workload = load(
        write("l.csv", "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3,4,7,.75\n5,6,11,1\n")
    )
    assert workload.arrival_ns.tolist() == [0, 0]
    assert workload.provenance["steps"][-1]["step"] == "all_at_zero"
    assert workload.poisson_arrivals(2.0, seed=0).span_s > 0


def test_turns_of_conversations_are_read_with_the_whole_context_as_the_prompt(write: Write) -> None:
    workload = load(
        write("c.csv", "conv,turn,new_prompt_tokens,context_tokens,output_tokens\n4,1,0,314,9\n4,2,7,330,0\n")
    )
    assert workload.prompt_tokens.tolist() == [314]  # the second row has no output
    assert workload.session is not None
    assert workload.session.tolist() == [4]


def test_gzip_is_found_by_content_not_by_name(write: Write) -> None:
    assert len(load(write("plain_name.jsonl", gzip.compress(BLOCKS.encode())))) == 1


def test_a_byte_order_mark_is_skipped(write: Write) -> None:
    assert detect(write("bom.csv", b"\xef\xbb\xbf" + AZURE.encode() + b"\n2023-11-16 18:17:03,1,1")) == "azure"


MALFORMED = [
    ("x.csv", f"{AZURE}\n2023-11-16 18:17:03.9,1\n", 2, "2 cells; expected 3"),
    ("x.csv", f"{AZURE}\n2023-11-16 18:17:03.9,1,1\nyesterday,1,1\n", 3, "expected YYYY-MM-DD"),
    ("x.csv", f"{AZURE}\n2023-13-16 18:17:03.9,1,1\n", 2, "expected YYYY-MM-DD"),
    ("x.csv", f"{AZURE}\n2023-11-16 18:17:03.9,-1,1\n", 2, "ContextTokens is '-1'; expected a whole number"),
    ("x.csv", f"{AZURE}\n2023-11-16 18:17:03.9,1,1.5\n", 2, "GeneratedTokens is '1.5'"),
    ("x.csv", f"{AZURE}\n2023-11-16 18:17:03.9,1,99999999999\n", 2, "GeneratedTokens is '99999999999'"),
    ("x.csv", "StartTimeOffset,ContextTokens,GeneratedTokens\nnan,1,1\n", 2, "is 'nan'; expected a time"),
    ("x.csv", "StartTimeOffset,ContextTokens,GeneratedTokens\n1e25,1,1\n", 2, "out of range"),
    ("x.csv", "a,b,c\n1,2,3\n", 1, "no known trace has the columns a, b, c"),
    ("x.csv", b"StartTimeOffset,ContextTokens,GeneratedTokens\n1,1,1\n2,\xff,1\n", None, "unreadable"),
    ("x.csv", gzip.compress(BLOCKS.encode() * 99, mtime=0)[:-30], None, "unreadable"),
    ("x.jsonl", BLOCKS + "{oops\n", 2, "not JSON"),
    ("x.jsonl", BLOCKS + "\n[1]\n", 3, "a JSON list; expected an object"),
    ("x.jsonl", BLOCKS + '{"timestamp": 0, "input_length": 600}\n', 2, "no field 'output_length'"),
    ("x.jsonl", BLOCKS + BLOCKS.replace("600", "NaN"), 2, "NaN is not a number"),
    ("x.jsonl", BLOCKS + BLOCKS.replace("600", "true"), 2, "input_length is 'True'"),
    ("x.jsonl", BLOCKS + BLOCKS.replace("[1, 2]", '["a"]'), 2, "expected a list of whole numbers"),
    ("x.jsonl", BLOCKS + BLOCKS.replace("[1, 2]", "[1]"), 2, "1 hash_ids for 600 tokens; expected 2"),
    ("x.jsonl", BLOCKS + BLOCKS.replace('"timestamp": 0', '"timestamp": 1.5'), 2, "expected whole milliseconds"),
    ("x.jsonl", '{"a": 1}\n', 1, "no known trace has the fields a"),
    ("x.jsonl", CHAT + CHAT.splitlines()[0] + "\n", 4, "chat_id 7 a second time"),
    ("x.jsonl", CHAT.replace('"turn": 1', '"turn": 0'), 1, "turn is 0; expected 1"),
    ("x.jsonl", '{"arrival_ns": -1, "prompt_tokens": 1, "output_tokens": 1}', 1, "arrival_ns is -1"),
    ("x.jsonl", '{"arrival_ns": 0, "prompt_tokens": 1}', 1, "no field 'output_tokens'"),
    ("x.jsonl", '{"arrival_ns": 0, "prompt_tokens": 1, "output_tokens": 5, "max_tokens": 4}', 1, "below output_tokens"),
    ("x.jsonl", '{"arrival_ns": 0, "prompt_tokens": 1, "output_tokens": 1, "hash_ids": [1, 2]}', 1, "at most 1"),
    ("x.jsonl", '{"diptych_workload": 2}\n', 1, "version 2"),
    ("x.jsonl", '{"diptych_workload": 1}\n', None, "has no request"),
    ("x.jsonl", "", None, "is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "line", "message"), MALFORMED)
def test_a_malformed_line_is_named_with_what_was_expected(
    write: Write, name: str, content: str | bytes, line: int | None, message: str
) -> None:
    path = write(name, content)
    with pytest.raises(TraceError) as caught:
        load(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}:{line}: " if line else f"{path}:")
    assert "\n" not in str(caught.value)


def test_a_trace_without_one_servable_request_is_refused(write: Write) -> None:
    with pytest.raises(TraceError, match="no request with prompt and output tokens"):
        load(write("z.csv", "num_prefill_tokens,num_decode_tokens\n0,4\n"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"gone.csv: cannot be read"):
        load(tmp_path / "gone.csv")


def test_an_unknown_format_name_lists_the_known_ones(write: Write) -> None:
    with pytest.raises(ValueError, match=r"unknown trace format 'nope'; expected auto or one of diptych, azure"):
        load(write("m.jsonl", BLOCKS), format="nope")


def test_a_named_format_is_used_even_where_another_would_be_found(write: Write) -> None:
    path = write("m.jsonl", BLOCKS + BLOCKS.replace('"timestamp": 0', '"timestamp": 2'))
    assert detect(path) == "mooncake"
    assert load(path, "timed_trace").arrival_ns.tolist() == [0, 2_000_000_000]
    assert read_rows(path, "timed_trace").format == "timed_trace"
    assert {"mooncake", "timed_trace"} <= set(FORMATS)
