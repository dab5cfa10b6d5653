"""Generators against the figures they carry, and specifications."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from experiments.workloads import GENERATORS, Workload, WorkloadSpec, make_workload
from experiments.workloads.generators import arrivals
from experiments.workloads.generators.lengths import GRID, MIXTURES, TABLES, QuantileTable
from experiments.workloads.generators.streams import stream
from experiments.workloads.stats import arrival_stats


def make(name: str, **fields: Any) -> Workload:
    return make_workload(WorkloadSpec(name=name, **fields))


@pytest.mark.parametrize("name", GENERATORS)
def test_the_same_seed_gives_the_same_workload_and_another_seed_another(name: str) -> None:
    first, again, other = (make(name, n=200, rate=5.0, seed=seed) for seed in (7, 7, 8))
    assert len(first) == 200
    assert first == again
    assert not np.array_equal(first.arrival_ns, other.arrival_ns)
    assert name == "fixed" or not np.array_equal(first.prompt_tokens, other.prompt_tokens)
    assert first.arrival_ns[0] == 0


@pytest.mark.parametrize("name", GENERATORS)
def test_more_requests_begin_with_the_same_requests(name: str) -> None:
    few, many = make(name, n=100, rate=5.0), make(name, n=3000, rate=5.0)
    assert np.array_equal(few.arrival_ns, many.arrival_ns[:100])


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("chat", 20_000), ("code", 20_000), ("multi-tenant", 20_000), ("reasoning", 20_000), ("prefix-chat", 3537)],
)
def test_a_duration_ends_the_arrivals_and_the_rate_holds_on_average(name: str, seconds: int) -> None:
    workload = make(name, duration_s=seconds, rate=2.0)
    assert workload.arrival_ns[-1] < seconds * 10**9
    assert len(workload) == pytest.approx(2 * seconds, rel=0.1)
    assert len(make(name, duration_s=seconds, n=50, rate=2.0)) == 50


@pytest.mark.parametrize(
    ("name", "table"),
    [("chat", "azure_conv"), ("code", "azure_code"), ("multi-tenant", "vtc_arena"), ("reasoning", "deepseek_r1")],
)
def test_lengths_follow_their_table(name: str, table: str) -> None:
    workload = make(name, n=40_000)
    for drawn, wanted in zip((workload.prompt_tokens, workload.output_tokens), TABLES[table], strict=True):
        # Share of draws up to each entry against the entry's probability (the largest, where entries repeat).
        for value in set(wanted.values[1:-1]):
            at = [p for p, entry in zip(GRID, wanted.values, strict=True) if entry == value]
            share, below = np.mean(drawn <= value), np.mean(drawn < value)
            assert below - 0.01 <= at[0]
            assert share + 0.01 >= at[-1]
        assert drawn.min() >= wanted.values[0]
        assert drawn.max() <= wanted.values[-1]


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_mixtures_of_lognormals_agree_with_the_tables_of_the_same_data(name: str) -> None:
    for part, (mixture, table) in enumerate(zip(MIXTURES[name], TABLES[name], strict=True)):
        drawn = mixture.draw(40_000, stream(0, "test", part))
        shares = np.array([np.mean(drawn <= value) for value in table.values[2:-2]])
        assert np.max(np.abs(shares - GRID[2:-2])) < 0.07
        assert drawn.min() >= max(mixture.low, 1)
        assert drawn.max() <= mixture.high


@pytest.mark.parametrize(
    ("process", "rate", "cv", "idc"),
    [  # the fitted chains' own figures: CV, IDC at 1/10/60 s
        (arrivals.AZURE_CONV, 5.53, 1.06, (1.27, 3.53, 12.13)),
        (arrivals.AZURE_CODE, 2.49, 11.841, (12.07, 65.39, 140.47)),
    ],
)
def test_a_modulated_process_has_the_burstiness_of_its_fit(
    process: arrivals.Mmpp, rate: float, cv: float, idc: tuple[float, ...]
) -> None:
    times = process.arrivals(100_000, seed=0)
    found = arrival_stats(arrivals.to_ns(times))
    assert process.mean_rate() == pytest.approx(rate, rel=0.03)  # its matrix is printed rounded
    assert found["rate"] == pytest.approx(rate, rel=0.05)
    assert found["cv"] == pytest.approx(cv, rel=0.1)
    for window, wanted in zip((1, 10, 60), idc, strict=True):
        assert found[f"idc_{window}s"] == pytest.approx(wanted, rel=0.15)


def test_the_code_process_spends_its_time_as_fitted() -> None:
    assert arrivals.AZURE_CODE.stationary() == pytest.approx([0.698, 0.046, 0.21, 0.047], abs=0.01)
    assert arrivals.AZURE_CONV.stationary() == pytest.approx([0.03, 0.634, 0.336], abs=0.01)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_gaps_have_the_wanted_rate_and_cv(cv: float) -> None:
    found = arrival_stats(arrivals.to_ns(arrivals.gamma(4.0, cv, 60_000, stream(1, "test"))))
    assert found["rate"] == pytest.approx(4.0, rel=0.05)
    assert found["cv"] == pytest.approx(cv, rel=0.05)


def test_poisson_arrivals_are_neither_regular_nor_bursty() -> None:
    found = arrival_stats(arrivals.to_ns(arrivals.poisson(3.0, 60_000, stream(1, "test"))))
    assert found["rate"] == pytest.approx(3.0, rel=0.02)
    for figure in ("cv", "idc_1s", "idc_10s", "idc_60s"):
        assert found[figure] == pytest.approx(1.0, rel=0.15)


def test_tenants_send_their_published_shares() -> None:
    workload = make("multi-tenant", n=40_000)
    assert workload.tenant is not None
    names, counts = np.unique(workload.tenant, return_counts=True)
    shares = dict(zip(names.tolist(), (counts / 40_000).tolist(), strict=True))
    assert len(shares) == 27
    for client, share in enumerate((0.197, 0.175, 0.133, 0.080)):
        assert shares[f"client-{client}"] == pytest.approx(share, abs=0.01)


def test_reasoning_clients_are_bursty_together() -> None:
    workload = make("reasoning", duration_s=3600.0)
    assert workload.tenant is not None
    assert 50 <= len(set(workload.tenant)) <= 73
    found = workload.describe()
    assert 1.2 < found["cv"] < 1.8
    assert 3 < found["idc_1s"] < 12


def test_uniform_is_the_known_offline_job() -> None:
    workload = make("uniform", n=256)
    rng = random.Random(0)
    pairs = [(rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(256)]
    assert list(zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True)) == pairs
    assert workload.output_tokens.sum() == 140_797
    assert not workload.arrival_ns.any()


def test_prefix_chat_keeps_the_beginning_of_a_session_and_one_head_for_all() -> None:
    workload = make("prefix-chat", n=2000)
    assert workload.hash_ids is not None
    assert workload.session is not None
    assert workload.turn is not None
    last: dict[int, tuple[int, ...]] = {}
    rows = zip(workload.session.tolist(), workload.turn.tolist(), workload.hash_ids, strict=True)
    for row, (session, turn, ids) in enumerate(rows):
        assert len(ids) == -(-int(workload.prompt_tokens[row]) // 512)
        assert ids[0] == 0
        assert (turn == 0) == (session not in last)
        shared = len(set(ids) & set(last.get(session, ())))
        assert ids[:shared] == last.get(session, ())[:shared]
        last[session] = ids
    everyone = [block for ids in workload.hash_ids for block in set(ids)]
    assert everyone.count(0) == 2000


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rate": float("nan")}, "rate"),
        ({"rate": float("inf")}, "rate"),
        ({"rate": -1}, "rate"),
        ({"rate": 0}, "rate"),
        ({"time_scale": float("nan")}, "time_scale"),
        ({"length_scale": 0}, "length_scale"),
        ({"n": 0}, "n"),
        ({"seed": -1}, "seed"),
        ({"duration_s": float("inf")}, "duration_s"),
        ({"tenants": {"a": -1.0}}, "tenants"),
        ({"cap": 0}, "cap"),
        ({"arrivals": "hourly"}, "arrivals"),
        ({"speed": 3}, "speed"),
        ({"max_model_len": 1}, "max_model_len"),
    ],
)
def test_a_specification_refuses_bad_values_by_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        WorkloadSpec(**({"name": "chat", "n": 5} | fields))
    assert {error["loc"][0] for error in caught.value.errors()} == {named}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "chat"}, r"give n \(requests\) or duration_s"),
        ({"name": "chat", "n": 5, "low": 3}, "low is only for the workload 'uniform'"),
        ({"name": "chat", "n": 5, "cv": 3}, "cv is only for arrivals 'gamma'"),
        ({"name": "chat", "n": 5, "arrivals": "gamma"}, "arrivals 'gamma' need cv"),
        ({"name": "chat", "n": 5, "arrivals": "at-once", "rate": 2}, "rate has no meaning"),
        ({"name": "uniform", "n": 5, "low": 9, "high": 8}, "low 9 is above high 8"),
        ({"name": "chat", "n": 5, "format": "azure"}, "format and block_size are for trace files"),
        ({"name": "prefix-chat", "n": 5, "arrivals": "poisson"}, "arrivals of its own"),
    ],
)
def test_a_specification_refuses_fields_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        WorkloadSpec(**fields)


@pytest.mark.parametrize("process", ["poisson", "mmpp-code", "mmpp-conv", "at-once"])
def test_the_arrivals_of_a_generator_can_be_chosen_without_changing_its_lengths(process: Any) -> None:
    plain, other = make("chat", n=300), make("chat", n=300, arrivals=process)
    assert np.array_equal(plain.prompt_tokens, other.prompt_tokens)
    assert np.array_equal(plain.output_tokens, other.output_tokens)
    assert process == "mmpp-conv" or not np.array_equal(plain.arrival_ns, other.arrival_ns)


def test_a_specification_cuts_scales_and_caps() -> None:
    fields = {"length_scale": 0.5, "max_input": 300, "max_output": 100, "max_model_len": 350, "cap": 80}
    workload = make("chat", n=500, time_scale=2.0, tenants=3, declared_sigma=0.0, **fields)
    assert workload.prompt_tokens.max() == 300
    assert workload.output_tokens.max() == 80
    assert (workload.prompt_tokens + workload.max_tokens).max() <= 350
    assert workload.tenant is not None
    assert set(workload.tenant) == {"tenant-0", "tenant-1", "tenant-2"}
    assert workload.declared_output is not None
    assert np.array_equal(workload.declared_output, workload.output_tokens)
    assert np.array_equal(workload.arrival_ns, make("chat", n=500).arrival_ns * 2)
    steps = [step["step"] for step in workload.provenance["steps"]]
    assert steps == [
        *("scale_lengths", "cut_prompts", "cut_outputs", "scale_time", "tenants", "with_cap", "clip"),
        "with_declared_output",
    ]


def test_a_trace_can_be_cut_short_sped_up_or_given_new_arrivals(tmp_path: Path) -> None:
    source = make("chat", n=400, rate=2.0, cap="exact")
    path = tmp_path / "trace.jsonl"
    source.to_jsonl(path)
    assert make(str(path)) == source  # its own caps are kept
    assert np.array_equal(make(str(path), n=10).prompt_tokens, source.prompt_tokens[:10])
    assert make(str(path), rate=8.0).rate == pytest.approx(8.0)
    assert make(str(path), rate=8.0).describe()["cv"] == pytest.approx(source.describe()["cv"])
    assert make(str(path), arrivals="poisson").rate == pytest.approx(source.rate, rel=0.2)
    assert not make(str(path), arrivals="at-once").arrival_ns.any()
    assert make(str(path), duration_s=20.0).arrival_ns[-1] < 20 * 10**9


def test_lengths_without_times_become_poisson_at_the_wanted_rate(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n" + "5,6\n" * 2000)
    assert not make(str(path)).arrival_ns.any()
    assert make(str(path), rate=3.0).rate == pytest.approx(3.0, rel=0.1)


def test_every_workload_can_be_written_with_its_provenance(tmp_path: Path) -> None:
    for name in GENERATORS:
        workload = make(name, n=20, rate=1.0, max_model_len=4096)
        assert workload.provenance["source"] == f"generator:{name}"
        workload.to_jsonl(tmp_path / "w.jsonl.gz")
        assert Workload.from_jsonl(tmp_path / "w.jsonl.gz") == workload


def test_a_name_that_is_neither_file_nor_generator_lists_the_generators() -> None:
    with pytest.raises(
        ValueError, match=r"'chatt' is neither a file nor a generator; did you mean 'chat'\? known: chat"
    ):
        make("chatt", n=5)


def test_a_quantile_table_that_decreases_is_refused() -> None:
    with pytest.raises(ValueError, match="must not decrease"):
        QuantileTable((2, 1), grid=(0, 1))
