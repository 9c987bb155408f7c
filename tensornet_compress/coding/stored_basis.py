"""Basis vectors in int8 and int16 with one scale a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FINE_SHARE = 0.25
_REFINEMENTS = 1


@dataclass(frozen=True)
class StoredBasis:
    """Basis vectors as rows, (rank, width), with one fp16 scale a row: the leading rows in int16 (``fine``), the rest in int8.

    A rounded row leaks its coefficient into all others, so rows of large coefficients need more places than rows of small ones.
    """

    fine: Tensor
    codes: Tensor
    scale: Tensor

    @staticmethod
    def store(vectors: Tensor, fine_share: float = FINE_SHARE) -> StoredBasis:
        """Round rows (rank, width), sorted by falling coefficients; the first ``fine_share`` of them finely."""
        fine = round(len(vectors) * fine_share)
        places = torch.full((len(vectors),), 127.0)
        places[:fine] = 32767.0
        scale = (vectors.abs().amax(1) / places).clamp_min(1e-7).to(torch.float16)
        codes = (vectors / scale.float()[:, None]).round()
        codes = codes.maximum(-places[:, None]).minimum(places[:, None])
        return StoredBasis(codes[:fine].to(torch.int16), codes[fine:].to(torch.int8), scale)

    @staticmethod
    def read(stored: dict[str, Tensor], name: str, rank: int, width: int) -> StoredBasis:
        """The basis stored as ``name``, of the shape it must have (``RuntimeError`` or ``KeyError`` otherwise)."""
        fine, codes = (stored[f"{name}.{part}"].view(-1, width) for part in ("fine", "codes"))
        if len(fine) + len(codes) != rank:
            raise RuntimeError(f"{name} has {len(fine)} + {len(codes)} rows, not {rank}")
        return StoredBasis(fine, codes, stored[f"{name}.scale"].view(rank))

    @property
    def rank(self) -> int:
        """Number of basis vectors."""
        return len(self.scale)

    @property
    def width(self) -> int:
        """Length of a basis vector."""
        return self.codes.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The stored parts by name."""
        return {"fine": self.fine, "codes": self.codes, "scale": self.scale}

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(part.nbytes for part in self.tensors().values())

    def dense(self) -> Tensor:
        """fp32 (rank, width)."""
        return torch.cat([self.fine.float(), self.codes.float()]) * self.scale.float()[:, None]

    def analyse(self, rows: Tensor) -> Tensor:
        """Coefficients (tokens, rank) whose synthesis is nearest to ``rows`` (tokens, width).

        The stored rows are orthonormal up to rounding, so a few fixed-point steps reach the least-squares solution.
        """
        basis = self.dense()
        coefficients = rows @ basis.T
        for _ in range(_REFINEMENTS):
            coefficients = coefficients + (rows - coefficients @ basis) @ basis.T
        return coefficients

    def synthesise(self, coefficients: Tensor) -> Tensor:
        """Rows (tokens, width) of coefficients (tokens, rank)."""
        return coefficients @ self.dense()
