"""Run by a test in a mount namespace of its own, as in a container: reads a store through DALI with ever less of /dev/shm."""

import subprocess
import sys
import warnings

import numpy as np

from smoe_hpc.io import Store
from smoe_hpc.io.loading.loader import Loader
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.windows import Window


def main() -> None:
    samples = Samples(Store(sys.argv[1]), Window((0,), (1,)))
    items = np.arange(6 * 16).reshape(6, 16) % len(samples)  # a batch has 1.05 MB
    with Loader(samples) as threads:
        right = [batch.targets.numpy().copy() for batch in threads.of(items)]
    for size, backend in (("4m", "dali"), ("2m", "dali"), ("2m", "auto")):
        subprocess.run(["mount", "-o", f"remount,size={size}", "/dev/shm"], check=True)
        with warnings.catch_warnings(record=True) as told, Loader(samples, backend=backend, prefetch=4, workers=2) as loader:  # type: ignore[arg-type]
            warnings.simplefilter("always")
            try:
                found = [batch.targets.numpy().copy() for batch in loader.of(items)]
                said = f"{len(found)} right: {all(np.array_equal(*pair) for pair in zip(right, found, strict=True))}"
            except ValueError as error:
                said = str(error)
            print(size, backend, loader.backend, said, [str(one.message) for one in told], sep="|")


if __name__ == "__main__":
    main()
