"""Where and with what a benchmark ran: the block printed first, and columns of every CSV row."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess

import torch

from ..cli.env import collect
from .clocks import smi_name
from .timing import l2_bytes

LIMITS = ("clocks.max.sm", "clocks.max.mem", "power.limit")


def environment(device: torch.device) -> dict[str, str]:
    """Name -> value, all texts; ``-`` for what is unknown.

    Args:
        device: where the benchmark runs.
    """
    found = collect()
    block = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": platform.processor() or platform.machine(),
        "driver": found.driver or "-",
        "torch": torch.__version__,
        "triton": found.versions.get("triton") or "-",
        "cuda": torch.version.cuda or "-",
        "python": found.python,
        "svdq_compile": found.versions["svdq_compile"] or "-",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        block["device"] = properties.name
        block["capability"] = f"{properties.major}.{properties.minor}"
        block["multiprocessors"] = str(properties.multi_processor_count)
        block["memory"] = f"{properties.total_memory / 2**30:.1f} GiB"
        block["l2"] = f"{l2_bytes(device) / 2**20:.0f} MiB"
        block |= limits(smi_name(device))
    return block


def limits(gpu: str | None) -> dict[str, str]:
    """Highest clocks in MHz and the power limit in W, as ``nvidia-smi`` says; empty without it."""
    program = shutil.which("nvidia-smi")
    if program is None or gpu is None:
        return {}
    query = [program, f"--query-gpu={','.join(LIMITS)}", "--format=csv,noheader,nounits", "-i", gpu]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")] if done.stdout.strip() else []
    names = ("max_sm_mhz", "max_memory_mhz", "power_limit_w")
    return dict(zip(names, values)) if len(values) == len(names) else {}


def block_text(block: dict[str, str]) -> str:
    """One aligned line an entry."""
    return "\n".join(f"{name:16} {value}" for name, value in block.items())
