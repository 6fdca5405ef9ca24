"""Answers timings of the eager students of another checkout: run by `benchmarks.inference --before`, in that checkout.

Its argument is a JSON of ensembles: name to input shape and options of each student. Reads lines `NAME BATCH COUNT`,
asks the first COUNT students, combines their logits, and writes an empty line.
"""

import json
import sys

import torch

from pkd_lightning.models.classifier import MambaClassifier


def main() -> None:
    torch.set_num_threads(1)
    ensembles, inputs = {}, {}
    for name, (shape, students) in json.loads(sys.argv[1]).items():
        torch.manual_seed(0)
        ensembles[name] = [MambaClassifier(tuple(shape), 10, **options).eval() for options in students]
        inputs[name] = shape
    with torch.inference_mode():
        for line in sys.stdin:
            name, batch, count = line.split()
            images = torch.zeros(int(batch), *inputs[name])
            prefix = torch.zeros(int(batch), 10)
            for student in ensembles[name][: int(count)]:
                prefix = 0.5 * prefix + 0.5 * student(images)
            print(flush=True)


if __name__ == "__main__":
    main()
