"""What the GPU's clocks, heat and power were while something was measured, from ``nvidia-smi`` in the background."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import statistics
import subprocess
import threading
import time

QUERY = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
INTERVAL_MS = 100


@dataclasses.dataclass(frozen=True)
class Clocks:
    """One reading.

    Args:
        sm: MHz of the multiprocessors.
        memory: MHz.
        temperature: degrees Celsius.
        power: W.
    """

    sm: float
    memory: float
    temperature: float
    power: float

    def __str__(self) -> str:
        return f"SM {self.sm:.0f} MHz, memory {self.memory:.0f} MHz, {self.temperature:.0f} C, {self.power:.0f} W"


def parse(line: str) -> Clocks | None:
    """A reading from one line of comma-separated numbers; None if it is anything else.

    A number the driver does not tell, ``[N/A]``, becomes NaN.
    """
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != len(QUERY):
        return None
    values = [_value(part) for part in parts]
    return None if None in values else Clocks(*values)


def _value(text: str) -> float | None:
    if "N/A" in text or "Not Supported" in text:
        return float("nan")
    try:
        return float(text)
    except ValueError:
        return None


class ClockMonitor:
    """Reads clocks until closed. Without a working ``nvidia-smi`` it has no readings, and says nothing.

    Args:
        gpu: what ``nvidia-smi -i`` takes, an index or a UUID; None for a device that is no NVIDIA GPU.
    """

    def __init__(self, gpu: str | None):
        self._readings: list[tuple[float, Clocks]] = []
        self._process: subprocess.Popen | None = None
        program = shutil.which("nvidia-smi")
        if program is None or gpu is None:
            return
        command = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
        command += ["-i", gpu, "-lms", str(INTERVAL_MS)]
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._thread = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
            self._thread.start()

    def _read(self, lines) -> None:
        for line in lines:
            reading = parse(line)
            if reading is not None:
                self._readings.append((time.monotonic(), reading))

    def since(self, begin: float) -> Clocks | None:
        """Median of each number after that ``time.monotonic()``; None without a reading since."""
        found = [dataclasses.astuple(reading) for moment, reading in self._readings.copy() if moment >= begin]
        return Clocks(*(statistics.median(column) for column in zip(*found))) if found else None

    def close(self) -> None:
        """Ends the background process."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._process.stdout.close()
        self._process = None

    def __enter__(self) -> ClockMonitor:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def smi_name(device) -> str | None:
    """What ``nvidia-smi -i`` calls a torch device; None if that is no GPU of NVIDIA's.

    By UUID where torch knows it, since ``CUDA_VISIBLE_DEVICES`` renumbers torch's indices only.
    """
    import torch

    if device.type != "cuda" or torch.version.hip is not None:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    if uuid is None:
        return str(index)
    return str(uuid) if str(uuid).startswith("GPU-") else f"GPU-{uuid}"
