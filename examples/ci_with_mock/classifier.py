"""An application that serves a model. It neither knows nor asks what runs it."""

from __future__ import annotations

import asyncio

import numpy as np
import numpy.typing as npt

import trtx_py as trtx


class DigitReader:
    def __init__(self, engine: trtx.Engine) -> None:
        self._engine = engine

    async def read(self, images: list[npt.NDArray[np.float32]]) -> list[int]:
        """The digits on 8 x 8 images with values 0 to 16, all asked for at once."""
        answers = await asyncio.gather(*(self._engine.infer({"image": image.reshape(1, 1, 8, 8)}) for image in images))
        return [int(answer["probabilities"].argmax()) for answer in answers]
