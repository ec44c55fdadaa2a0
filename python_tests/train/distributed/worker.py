"""One of the processes that torchrun starts: runs the trainings of a JSON file, and rank 0 writes what came of them."""

import json
import sys
from pathlib import Path

import torch
from training import train

from repkern.train import Runtime, TrainingRecipe
from repkern.train.ending import ending_well


def main(plan_file, out):
    runtime = None
    for job in json.loads(Path(plan_file).read_text()):
        name, refused = job.pop("name"), job.pop("refused", False)
        own_group = job.pop("own_group", False)
        recipe = TrainingRecipe.model_validate(job["recipe"])
        if runtime is not None and own_group:
            runtime.wait()
            runtime.close()
            runtime = None
        # Trainings after each other share one group of processes.
        runtime = runtime or Runtime(recipe.train)
        try:
            found, gradients = train(**job, runtime=runtime)
        except ValueError as problem:
            if not refused:
                raise
            found, gradients = {"refused": str(problem)}, {}
        found["rank"] = runtime.rank
        everything = runtime.gather(found)
        if runtime.is_main:
            (Path(out) / f"{name}.json").write_text(json.dumps(everything))
            torch.save(gradients, Path(out) / f"{name}.pt")
    assert runtime is not None
    runtime.wait()
    runtime.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with ending_well():
        main(*sys.argv[1:])
