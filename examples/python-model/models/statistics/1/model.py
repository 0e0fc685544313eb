"""Several outputs, and batching: requests that arrive together are one call, a row each.

doorstep infer statistics values=[1,2,3]
"""

from typing import Annotated, TypedDict

import numpy as np
import numpy.typing as npt

import doorstep
from doorstep.errors import InvalidArgument


class Statistics(TypedDict):
    mean: list[float]
    largest: list[float]


class Model(doorstep.Model):
    max_batch_size = 16

    def load(self) -> None:
        """Called once, before the first request: the place to read weights. Not needed here."""

    def predict(self, values: Annotated[npt.NDArray[np.float32], (-1,)]) -> Statistics:
        if values.shape[1] == 0:
            raise InvalidArgument("no values, so no mean")  # the client's fault; other exceptions are the model's
        return {"mean": values.mean(axis=1).tolist(), "largest": values.max(axis=1).tolist()}  # values: (rows, n)
