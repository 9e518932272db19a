"""The two equalities tests may use: equal bits, and an error budget against a wider reference."""

from __future__ import annotations

import torch


def assert_bits_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Same dtype, shape and bytes; NaNs compare by their bits."""
    assert actual.dtype == expected.dtype, f"{actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    a, b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (actual, expected))
    if torch.equal(a, b):
        return
    size = actual.element_size()
    wrong = (a.view(-1, size) != b.view(-1, size)).any(-1).nonzero().flatten()
    first = int(wrong[0])
    raise AssertionError(
        f"{wrong.numel()} of {actual.numel()} elements differ, first at {first}: "
        f"{actual.reshape(-1)[first].item()} is not {expected.reshape(-1)[first].item()}"
    )


def assert_within_budget(actual: torch.Tensor, oracle: torch.Tensor, *, low_precision: torch.Tensor) -> None:
    """``max|actual - oracle| <= 2 * (max|low_precision - oracle| + eps * max|oracle|)``.

    Args:
        actual: the result under test; its dtype gives eps.
        oracle: the same computation in float64.
        low_precision: the same computation by an independent implementation in ``actual``'s dtype.
    """
    assert actual.shape == oracle.shape, f"{tuple(actual.shape)} is not {tuple(oracle.shape)}"
    if actual.numel() == 0:
        return
    wide = oracle.detach().cpu().double()
    error = (actual.detach().cpu().double() - wide).abs().max().item()
    reference_error = (low_precision.detach().cpu().double() - wide).abs().max().item()
    budget = 2 * (reference_error + torch.finfo(actual.dtype).eps * wide.abs().max().item())
    assert error <= budget, f"error {error:.3e} exceeds {budget:.3e} (low-precision reference: {reference_error:.3e})"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64."""
    wide = expected.detach().cpu().double()
    return ((actual.detach().cpu().double() - wide).norm() / wide.norm()).item()
