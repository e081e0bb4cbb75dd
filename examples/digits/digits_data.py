"""scikit-learn's handwritten digits, and which of them are held out. Shared by train.py and demo.py."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

SEED = 20
HELD_OUT = 450


@dataclass(frozen=True)
class Digits:
    """Images are float32 [N, 1, 8, 8] with values 0 to 16; labels are 0 to 9."""

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


def held_out_indices(count: int) -> npt.NDArray[np.int64]:
    """The images that training never sees; RandomState's stream is frozen, so every numpy gives the same ones."""
    return np.sort(np.random.RandomState(SEED).permutation(count)[:HELD_OUT]).astype(np.int64)


def fingerprint(indices: npt.NDArray[np.int64]) -> str:
    """Stored in the model by train.py and compared by demo.py, so that "held out" means what it says."""
    return hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()[:16]


def load() -> tuple[Digits, Digits]:
    """Returns (training, held out)."""
    pixels, targets = load_digits(return_X_y=True)
    images = np.asarray(pixels, dtype=np.float32).reshape(-1, 1, 8, 8)
    labels = np.asarray(targets, dtype=np.int64)
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[held_out_indices(len(labels))] = True
    return Digits(images[~held_out], labels[~held_out]), Digits(images[held_out], labels[held_out])
