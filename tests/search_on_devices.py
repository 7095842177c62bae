"""A search on the devices of this process, or of several; prints what it found as JSON.

Arguments: none, or the coordinator's port, the number of processes, and which of them this is.
"""

import json
import sys

import jax
import numpy as np

from learnware_jax.selection.search import Specifications, place, pool_mesh, search
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.rkme import RKME
from learnware_jax.specification.sketch import choose_landmarks, project, quantise

ROWS, N = 1000, 40


class Watched:
    """An array that keeps in mind which rows are read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, set()

    def __getitem__(self, index):
        self.read.update(np.atleast_1d(np.arange(len(self.array))[index]).tolist())
        return self.array[index]

    def __len__(self):
        return len(self.array)


def main(port=None, processes=1, process=0):
    if port is not None:
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    rng, kernel = np.random.default_rng(0), Gaussian(0.3)
    kinds = rng.normal(size=(10, 1, 6))
    z = 0.3 * rng.normal(size=(ROWS, 5, 6)) + kinds[rng.integers(10, size=ROWS)]
    z, beta = z.astype(np.float32), rng.dirichlet(np.ones(5), ROWS)
    users = [RKME(z[i, :3] + np.float32(0.1), np.full(3, 1 / 3)) for i in range(10)]
    landmarks = choose_landmarks(jax.random.key(0), z, beta, kernel, count=64, width=24)
    p = project(landmarks, kernel, z, beta)
    self_term = p.self_term * N / (N - 1)
    code, scale, error = quantise(p.coordinates, "int8")
    codes = Watched(code)
    sketches = place(pool_mesh(), codes, scale, error, p.rest, self_term - p.self_term)
    u = project(landmarks, kernel, *(np.stack(a) for a in zip(*users, strict=True)))
    watched = Watched(z)
    specs = Specifications(kernel, watched, beta, self_term)
    found = search(users, u.coordinates, u.rest, sketches, specs, n=[N] * 10, top_k=10)
    print(
        json.dumps(
            {
                "index": found.index.tolist(),
                "distance": [[d.hex() for d in row] for row in found.distance.tolist()],
                "certified": found.certified.tolist(),
                "devices": jax.device_count(),
                "rows": sorted(watched.read),
                "codes": sorted(codes.read),
            }
        )
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
