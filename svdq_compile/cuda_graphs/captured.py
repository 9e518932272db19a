"""``svdq_compile.capture``: CUDA graphs around a transformer that stays the object it is."""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from ..errors import CaptureError, OffloadError
from ..model.bind import unwrap
from ..model.rope import move_tables
from . import arguments
from .entry import Entry, Graphs
from .refusal import Refused, check_call, offload_of
from .report import Report, ShapeReport
from .state import ModelState, environment

log = logging.getLogger(__name__)

SLOT = "_compiled_call_impl"
"""The instance attribute ``nn.Module.__call__`` calls instead of the module's own; ``module.compile`` sets it too."""
ONE_AT_A_TIME = threading.RLock()
"""Held by whoever captures in this process, or frees graphs.

What watches a capture is the process's, and a capture fails if a thread waits for its GPU meanwhile. Taken before a
handle's own lock, never after it: a captured model may call another.
"""


def capture(model: nn.Module, *, max_shapes: int = 8, strict: bool = False) -> Captured:
    """Replays a transformer's whole forward as one CUDA graph per input shape.

        pipe.transformer.compile_repeated_blocks(backend="svdq", fullgraph=True)
        svdq_compile.capture(pipe.transformer)
        image = pipe(prompt).images[0]

    ``model`` stays the same object, with its config, weights and methods; calling it replays a graph. The first call
    of a shape runs the forward four times (compiling, if it is to be compiled), captures it and replays the capture.
    Results equal those of the uncaptured forward bit for bit, and belong to the caller: no later call overwrites them.
    A call no graph can serve (see the report's ``uncaptured``) runs as if nothing were captured.

    Call it after ``compile`` or ``compile_repeated_blocks``; weights may be changed later (``load_into``, ``patch``,
    ``set_compute``, ``.to``): a graph is used only while every weight lies where it lay when it was captured.

    Args:
        model: the model, or what ``torch.compile(model)`` returned.
        max_shapes: how many graphs are kept; the one not used for longest goes first. Under classifier-free guidance
            an image size with two prompt lengths takes two.
        strict: raise where a call would run uncaptured.

    Returns:
        A handle; ``with`` releases at the end. A model that is captured already, with the same options, gives the
        handle it has.

    Raises:
        OffloadError: the model's weights are offloaded.
        CaptureError: the model is captured already, with other options; ``max_shapes`` is below one.
    """
    return install(model, max_shapes, strict, _cuda_graphs)


def install(model: nn.Module, max_shapes: int, strict: bool, make_graphs: Callable[[torch.device], Graphs]) -> Captured:
    """:func:`capture` with graphs of another make."""
    if max_shapes < 1:
        raise CaptureError("nothing could be captured", found=f"max_shapes={max_shapes}", hint="give at least 1")
    for module in {model, unwrap(model)}:
        present = module.__dict__.get(SLOT)
        if isinstance(present, Captured):
            if (module, present.max_shapes, present.strict) == (model, max_shapes, strict):
                return present
            found = f"max_shapes={present.max_shapes}, strict={present.strict}"
            raise CaptureError("the model is captured already", found=found, hint="call release() on its handle first")
    offload = offload_of(list(model.modules()))
    if offload is not None:
        raise OffloadError("a graph reads weights where they lay when it was captured", found=offload)
    return Captured(model, max_shapes, strict, make_graphs)


def _cuda_graphs(device: torch.device) -> Graphs:
    if device.type != "cuda":
        raise Refused(f"the model is on {device}; CUDA graphs need a GPU")
    from .cuda import CudaGraphs

    return CudaGraphs(device)


class Captured:
    """The handle of a captured model, and what its ``__call__`` runs. Made by :func:`capture`."""

    def __init__(
        self, model: nn.Module, max_shapes: int, strict: bool, make_graphs: Callable[[torch.device], Graphs]
    ) -> None:
        self.max_shapes, self.strict = max_shapes, strict
        self._model = model
        self._own = model.__dict__.get(SLOT)
        self._state = ModelState(model)
        self._make_graphs = make_graphs
        self._graphs: Graphs | None = None
        self._device: torch.device | None = None
        self._entries: collections.OrderedDict[Hashable, Entry | str] = collections.OrderedDict()
        self._uncaptured: collections.Counter[str] = collections.Counter()
        self._evicted = 0
        self._lock = threading.RLock()
        # Past OptimizedModule.__setattr__, which writes to the module inside.
        model.__dict__[SLOT] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. Called by ``model(...)``."""
        if torch.compiler.is_compiling():
            return self._forward(*args, **kwargs)
        try:
            with self._lock:
                key, call = self._read(args, kwargs)
                entry = self._entries.get(key)
                if entry is not None:
                    return self._replay(key, entry, call)
            with ONE_AT_A_TIME, self._lock:
                self._follow()
                # Once more: another thread may have been here before.
                key, call = self._read(args, kwargs)
                entry = self._entries.get(key)
                if entry is None:
                    key, entry = self._capture(key, call)
                return self._replay(key, entry, call)
        except Refused as refusal:
            self._count(str(refusal))
        return self._forward(*args, **kwargs)

    @property
    def active(self) -> bool:
        """Whether calling the model comes here: neither released, nor replaced by a later ``model.compile()``."""
        return self._model.__dict__.get(SLOT) is self

    def release(self) -> None:
        """Makes the model what it was and frees every graph; a second time does nothing."""
        with ONE_AT_A_TIME, self._lock:
            if self.active:
                del self._model.__dict__[SLOT]
                if self._own is not None:
                    self._model.__dict__[SLOT] = self._own
            self.clear()

    def clear(self) -> None:
        """Frees every graph; the next call captures anew. For changes no tensor and no attribute shows."""
        with ONE_AT_A_TIME, self._lock:
            if self._graphs is None:
                return
            self._graphs.finish()
            while self._entries:
                _close(self._entries.popitem()[1])
            self._graphs.renew()
            self._graphs = None

    def report(self) -> Report:
        """What is captured, what it takes, and why calls ran uncaptured."""
        with self._lock:
            entries = [entry for entry in self._entries.values() if isinstance(entry, Entry)]
            shapes = (ShapeReport(e.text, e.input_nbytes, e.pool_nbytes, e.replays) for e in entries)
            pool = 0 if self._graphs is None else self._graphs.pool_nbytes()
            return Report(tuple(shapes), self.max_shapes, pool, self._evicted, dict(self._uncaptured))

    def __enter__(self) -> Captured:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "active" if self.active else "not active"
        return f"Captured({type(unwrap(self._model)).__name__}, {len(self._entries)} shapes, {state})"

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self._own or self._model._call_impl)(*args, **kwargs)

    def _read(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, arguments.Arguments]:
        """What a graph for this call is kept under, and the call's arguments."""
        device = self._state.device()
        check_call(device)
        state = self._state.key()
        call = arguments.read(args, kwargs, device)
        return (device, call.key, state, environment(device)), call

    def _replay(self, key: tuple, entry: Entry | str, call: arguments.Arguments) -> Any:
        self._entries.move_to_end(key)
        if isinstance(entry, str):
            raise Refused(entry)
        with self._graphs.ordered():
            return entry.run(call)

    def _follow(self) -> None:
        """Leaves graphs of another device behind."""
        device = self._state.device()
        if device != self._device:
            self.clear()
            move_tables(unwrap(self._model), device)
            self._device = device

    def _capture(self, key: tuple, call: arguments.Arguments) -> tuple[tuple, Entry | str]:
        """What serves a call from now on, and the key it is kept under."""
        self._state.check_devices()
        if self._graphs is None:
            self._graphs = self._make_graphs(self._device)
        while len(self._entries) >= self.max_shapes:
            self._evict()
        whole = self._own is not None or self._model is not unwrap(self._model)
        settings: list[Hashable] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            settings.append(environment(self._device))
            return self._forward(*args, **kwargs)

        try:
            entry: Entry | str | None = Entry(forward, None if whole else self._model, call, self._graphs)
            log.info("captured %s", entry.text)
            # torch makes some settings at their first use, as SDPA's order; later calls have the recorded run's.
            settled = (*key[:-1], settings[-1])
            if settings[-1] == environment(self._device) and settled not in self._entries:
                key = settled
        except Refused as refusal:
            # Not tried again on each call.
            entry = str(refusal)
        except torch.OutOfMemoryError:
            # The error holds what the forward had made; what follows runs after it is gone.
            entry = None if self._entries else "too little memory to capture it"
        if entry is None:
            self.clear()
            return self._capture(key, call)
        self._entries[key] = entry
        return key, entry

    def _evict(self) -> None:
        """Gives up the graph not used for longest.

        A pool shrinks only when its last graph is closed, so if more than half of it came from this one, all go: they
        are captured again when they are used.
        """
        _, oldest = self._entries.popitem(last=False)
        if isinstance(oldest, str):
            return
        self._evicted += 1
        self._graphs.finish()
        oldest.close()
        rest = [entry for entry in self._entries.values() if isinstance(entry, Entry)]
        if oldest.pool_nbytes > sum(entry.pool_nbytes for entry in rest):
            for entry in rest:
                entry.close()
            self._entries = collections.OrderedDict((k, e) for k, e in self._entries.items() if isinstance(e, str))
            self._graphs.renew()

    def _count(self, reason: str) -> None:
        if self.strict:
            raise CaptureError("strict: a call would run uncaptured", found=reason)
        with self._lock:
            if reason not in self._uncaptured:
                log.warning("%s runs uncaptured: %s", type(unwrap(self._model)).__name__, reason)
            self._uncaptured[reason] += 1


def _close(entry: Entry | str) -> None:
    if isinstance(entry, Entry):
        entry.close()
