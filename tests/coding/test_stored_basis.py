"""A basis in int8 and int16: bytes as promised, coefficients come back."""

from __future__ import annotations

import torch

from tensornet_compress.coding.stored_basis import StoredBasis


def test_stored_basis_counts_its_bytes_and_inverts() -> None:
    rows = torch.linalg.qr(torch.randn(32, 32))[0][:20]
    basis = StoredBasis.store(rows)
    assert basis.nbytes == 5 * 32 * 2 + 15 * 32 + 2 * 20
    coefficients = torch.randn(9, 20)
    torch.testing.assert_close(basis.analyse(basis.synthesise(coefficients)), coefficients, atol=1e-4, rtol=1e-3)
