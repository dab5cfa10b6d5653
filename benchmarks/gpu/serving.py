"""How fast the runtime serves: `python -m benchmarks.gpu.serving`, with vLLM's figures on the same card beside its own.

startup   seconds from the start of a process to its first output token (always measured)
decode    a decode step at context 512 to 640, at batches of 1 to 256
prefill   one prompt of 512 or 2,048 tokens, and 32 of 2,048
idle      the GPU's idle share between steps, and the kernels that take its time
offline   256 requests at once, input and output uniform in 100..1024
azure     1,000 requests at once, with the lengths of the Azure 2023 conversation trace
online    Poisson arrivals at 6, 12 and 16 requests/s with the same lengths: TTFT, TPOT, E2E

Weights and prompts are random. Every model is measured in a process of its own, and its result is written after every
part, into the folder named by DIPTYCH_BENCH_OUT (else benchmarks/results). The trace's lengths come from --azure, else
from the file named by DIPTYCH_AZURE, else from the generator fitted to the trace. `python -m benchmarks.gpu.serving
lengths TRACE OUT.jsonl.gz` writes the part of the trace that is needed as a small file.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import lengths
from benchmarks.gpu.reference import MODELS, ONLINE_MODELS
from benchmarks.gpu.results import out_folder, read, result_path, save, text_table

PARTS = ("startup", "decode", "prefill", "idle", "offline", "azure", "online")


def parts_of(model: str, only: str | None, small: bool) -> list[str]:
    """The parts to measure: those asked for, else all that there are figures for."""
    if only is not None:
        return [part for part in PARTS if part in only.split(",")]
    return [part for part in PARTS if part != "online" or small or model in ONLINE_MODELS]


def measure(model: str, options: argparse.Namespace) -> bool:
    """Measure one model in a new process. Returns whether all of it went well."""
    folder = out_folder()
    path = result_path(folder, model, options.small)
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.model", model]
    command += [",".join(parts_of(model, options.only, options.small)), "--out", str(folder)]
    command += ["--device", options.device, "--block-size", str(options.block_size)]
    command += ["--command", shlex.join(["python", "-m", "benchmarks.gpu.serving", *sys.argv[1:]])]
    if options.azure is not None:
        command += ["--azure", str(options.azure)]
    if options.small:
        command.append("--small")
    if options.repeats is not None:
        command += ["--repeats", str(options.repeats)]
    code = subprocess.run([*command, "--started-ns", str(time.monotonic_ns())], check=False).returncode
    if path.exists():
        result = read(path)
        if not result["finished"]:
            result["errors"].setdefault("process", f"the process ended with status {code}")
            save(result, path)
    return code == 0


def main() -> None:
    if sys.argv[1:2] == ["lengths"]:
        return main_lengths(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="presets, with commas (default: %(default)s)")
    parser.add_argument("--only", metavar="PARTS", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--azure", type=Path, default=os.environ.get("DIPTYCH_AZURE") or None, metavar="FILE")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, help="of the decode part (default: 2)")
    parser.add_argument("--small", action="store_true", help="a few seconds of everything, to see that it works")
    options = parser.parse_args()
    unknown = set((options.only or "").split(",")) - {*PARTS, ""}
    if unknown:
        parser.error(f"unknown part {sorted(unknown)[0]!r}; known: {', '.join(PARTS)}")
    if options.azure is not None and not options.azure.is_file():
        parser.error(f"{options.azure} is no file")
    models = options.models.split(",")
    well = [measure(model, options) for model in models]
    for path in (result_path(out_folder(), model, options.small) for model in models):
        if path.exists():
            print(f"\n{text_table(read(path))}\nsaved to {path}", flush=True)
    sys.exit(0 if all(well) else 1)


def main_lengths(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.serving lengths")
    parser.add_argument("trace", type=Path, help="AzureLLMInferenceTrace_conv.csv")
    parser.add_argument("out", type=Path, help="name ending in .jsonl or .jsonl.gz")
    options = parser.parse_args(arguments)
    print(f"{lengths.prepare(options.trace, options.out)} requests in {options.out}")


if __name__ == "__main__":
    main()
