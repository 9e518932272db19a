"""How long compilation takes in a process of its own, with empty caches and with full ones, and what recompiles.

    python -m svdq_compile.bench.compile_time PLAN CONTENDER DEVICE [first]

measures one process, or only its first forward, and prints a line of JSON; plan and contender are JSON themselves.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from .forward_models import Contender, build, compile_model, forward_of, make_inputs
from .forward_plan import PIXELS_PER_TOKEN, ForwardPlan

log = logging.getLogger(__name__)

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
"""Environment variables that say where compiled code is kept."""


FIRST = "first"


def measure(plan: ForwardPlan, contender: Contender, device: str) -> dict[str, float]:
    """Two processes one after the other, the first with empty caches, the second with what it left.

    Only the first goes on to another image size and another prompt length.

    Returns:
        Fields of :class:`~svdq_compile.bench.forward_report.Row`.

    Raises:
        RuntimeError: a process failed; the message is the last line it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        cold = _process(plan, contender, device, folder)
        log.info("%s: first forward of a process with empty caches: %s", contender.label, cold)
        warm = _process(plan, contender, device, folder, FIRST)
        log.info("%s: with full caches: %s", contender.label, warm)
    return {"cold_s": cold.pop("first_s"), "warm_s": warm["first_s"], **cold}


def _process(plan: ForwardPlan, contender: Contender, device: str, folder: str, *more: str) -> dict[str, float]:
    arguments = [json.dumps(dataclasses.asdict(plan)), json.dumps(dataclasses.asdict(contender)), device, *more]
    caches = {name: os.path.join(folder, name) for name in CACHES}
    command = [sys.executable, "-m", __spec__.name, *arguments]
    done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def second_size(plan: ForwardPlan) -> tuple[int, int]:
    """The plan's second size, or the first with a row of tokens more."""
    if len(plan.sizes) > 1:
        return plan.sizes[1]
    height, width = plan.sizes[0]
    return height + PIXELS_PER_TOKEN, width


def in_this_process(plan: ForwardPlan, contender: Contender, device: str, only_first: bool) -> dict[str, float]:
    """Seconds of the first forward, of the first with another image size, and of the first with another prompt length.

    Returns:
        ``first_s``; ``size_s`` and ``text_s``, and how many graphs Dynamo compiled for each of those two.
    """
    import torch
    from torch._dynamo.utils import counters

    device = torch.device(device)
    with torch.no_grad():
        model = build(contender, plan, device)
        compiled = compile_model(model, contender, plan)

        def seconds(size: tuple[int, int], text: int) -> tuple[float, int]:
            counters.clear()
            forward = forward_of(compiled, make_inputs(model, plan, size, text, device))
            begin = time.perf_counter()
            forward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - begin, counters["stats"]["unique_graphs"]

        first = seconds(plan.sizes[0], plan.text)
        if only_first:
            return {"first_s": first[0]}
        size = seconds(second_size(plan), plan.text)
        text = seconds(second_size(plan), 2 * plan.text)
    return {
        "first_s": first[0],
        "size_s": size[0],
        "size_graphs": size[1],
        "text_s": text[0],
        "text_graphs": text[1],
    }


def _plan(values: dict[str, Any]) -> ForwardPlan:
    return ForwardPlan(**values | {"sizes": tuple(map(tuple, values["sizes"]))})


if __name__ == "__main__":
    plan_json, contender_json, device_name, *rest = sys.argv[1:]
    asked = _plan(json.loads(plan_json)), Contender(**json.loads(contender_json)), device_name
    print(json.dumps(in_this_process(*asked, only_first=rest == [FIRST])))
