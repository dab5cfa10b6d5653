"""Devices by name, by file, and this machine's own."""

import json
from pathlib import Path

import pytest

from simulator.devices import DEVICES, Device, DeviceError, device_like, load_device, measured_cpu


def test_an_h100_reaches_what_was_measured_on_one() -> None:
    device = load_device("h100-sxm")
    assert device.reached_flops("bf16") == pytest.approx(789e12, rel=0.01)
    assert device.reached_bandwidth == pytest.approx(3.11e12, rel=0.01)
    assert 52e9 < device.reached_host_link < 54e9


def test_an_h200_is_an_h100_with_more_and_faster_memory() -> None:
    h100, h200 = load_device("h100-sxm"), load_device("h200")
    assert h200.bf16_flops == h100.bf16_flops
    assert h200.memory_bandwidth > 1.4 * h100.memory_bandwidth
    assert h200.memory_bytes == 141e9


def test_devices_without_a_link_of_their_own_reach_each_other_by_the_host() -> None:
    alone = Device("d", 1e14, 1e13, 1e12, 10**10, 3e10, host_link_efficiency=0.5)
    assert (alone.peer_bandwidth, alone.reached_peer_link) == (3e10, 1.5e10)
    linked = Device("d", 1e14, 1e13, 1e12, 10**10, 3e10, host_link_efficiency=0.5, peer_link_bandwidth=4e11)
    assert (linked.peer_bandwidth, linked.reached_peer_link) == (4e11, 2e11)


def test_a_device_is_known_by_what_its_driver_calls_it() -> None:
    assert device_like("NVIDIA H100 80GB HBM3") is DEVICES["h100-sxm"]
    assert device_like("NVIDIA A100-SXM4-80GB") is DEVICES["a100-80gb"]
    assert device_like("NVIDIA H100 PCIe") is None  # which has other limits
    assert device_like("Radeon") is None


def test_energy_rises_from_idle_to_full_power_with_the_time_that_it_is_busy() -> None:
    sheet = Device("d", 1e14, 1e13, 1e12, 10**10, 3e10, idle_w=100, tdp_w=500)
    assert [sheet.energy_j(10, busy) for busy in (0, 4, 10)] == [1_000, 2_600, 5_000]
    assert Device("d", 1e14, 1e13, 1e12, 10**10, 3e10).energy_j(10, 4) is None


def test_every_device_names_its_source_and_is_slower_in_fp32() -> None:
    for device in DEVICES.values():
        assert "NVIDIA" in device.source
        assert device.reached_flops("fp32") < device.reached_flops("bf16")
        assert device.reached_attention_flops("bf16") < device.reached_flops("bf16")


def test_an_unknown_device_is_refused_with_the_known_names() -> None:
    with pytest.raises(
        DeviceError, match=r"no device 'tpu'; there are: h100-sxm, h200, a100-80gb, l4, cpu, or a .yaml"
    ):
        load_device("tpu")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(DeviceError, match="no dtype 'fp4'; there are: bf16"):
        load_device("l4").reached_flops("fp4")


def test_a_device_of_the_users_loads_from_json_and_from_yaml(tmp_path: Path) -> None:
    as_json, as_yaml = tmp_path / "mine.json", tmp_path / "mine.yaml"
    as_json.write_text(json.dumps(DEVICES["l4"].to_dict()))
    assert load_device(str(as_json)) == DEVICES["l4"]
    as_yaml.write_text(
        "name: mine\nbf16_flops: 2.0e+14\nfp32_flops: 2.0e+13\nmemory_bandwidth: 1.0e+12\n"
        "memory_bytes: 48000000000\nhost_link_bandwidth: 3.2e+10\nmatmul_efficiency: 0.5\n"
    )
    assert load_device(str(as_yaml)).reached_flops("bf16") == 1e14


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "a.json is not valid json"),
        ("a.yaml", "a: [", "a.yaml is not valid yaml"),
        ("a.yaml", "- 1", "a.yaml must hold the fields of one device by name"),
        ("a.json", '{"name": "x", "colour": 1}', "a.json: a device has no 'colour'; it has name, bf16_flops"),
        ("a.json", '{"name": "x"}', "a.json: a device needs bf16_flops, fp32_flops"),
    ],
)
def test_a_file_that_is_no_device_is_refused_in_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DeviceError, match=message) as error:
        load_device(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"none.yaml cannot be read: No such file"):
        load_device(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_bandwidth": "fast"}, "memory_bandwidth must be a number, not 'fast'"),
        ({"memory_bandwidth": 0}, "memory_bandwidth must be above 0"),
        ({"bf16_flops": -1.0}, "bf16_flops must be a number"),
        ({"fp32_flops": float("nan")}, "fp32_flops must be a number"),
        ({"matmul_efficiency": 80}, "matmul_efficiency is a fraction of the peak"),
        ({"name": 7}, "name must be text"),
    ],
)
def test_figures_that_no_device_has_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        Device.from_dict({**DEVICES["l4"].to_dict(), **change})


def test_this_machine_is_measured_and_rounded() -> None:
    device = measured_cpu()
    for figure in (device.fp32_flops, device.memory_bandwidth):
        assert figure == float(f"{figure:.1e}")
    # Any computer of this century, and no computer yet.
    assert 1e8 < device.reached_flops("fp32") < 1e15
    assert 1e8 < device.reached_bandwidth < 1e14
    assert device.memory_bytes > 1e8
    assert Device.from_dict(device.to_dict()) == device
