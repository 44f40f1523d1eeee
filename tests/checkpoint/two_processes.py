"""Two processes that save one model: python two_processes.py FOLDER PORT NUMBER."""

import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
from checks import tiny

from mil_jax.checkpoint import orbax_io

FILE = "added"


def add(folder):
    time.sleep(0.5)  # The other process is long done with its part.
    (folder / FILE).write_text(str(jax.process_index()))


def main(folder, port, number):
    address = f"localhost:{port}"
    jax.distributed.initialize(address, num_processes=2, process_id=int(number))
    replace = os.replace

    def slow_replace(source, target):
        time.sleep(0.5)
        replace(source, target)

    os.replace = slow_replace
    params = {"final_norm.scale": np.arange(3.0)}
    orbax_io.save_model(folder, tiny.CONFIGS["mamba"], params, add=add)
    # What the next step of a conversion does at once, on every process.
    _, found = orbax_io.load_model(folder)
    np.testing.assert_array_equal(found["final_norm.scale"], np.arange(3.0))
    print((folder / FILE).read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
