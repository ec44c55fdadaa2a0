"""A trained network, made into one for the classes of your own folder of images.

Its convolutions become OREPA blocks that start as exactly what they were, its stem stays as it is, its body learns
slowly and its new last layer fast. Afterwards the blocks are plain convolutions again, and name some of the images.
FOLDER has train/CLASS/*.png and test/CLASS/*.png; without one, pictures are drawn. The same as a command:
`repkern train finetune_folder --data FOLDER`, then `repkern predict IMAGE...`.

python examples/finetune_folder.py
python examples/finetune_folder.py --data FOLDER --model resnet18 --checkpoint resnet18.safetensors --image-size 224
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from shapes import write_folder

import repkern
from repkern.data import DataRecipe
from repkern.train import Recipe
from repkern.train.build import build_data, build_trainer
from repkern.train.predicting import predict
from repkern.train.recipe import ModelRecipe, OptimizerRecipe, ReplaceRecipe, RunRecipe, ScheduleRecipe
from repkern.train.trained import load_trained


def pretrained(folder: Path, model: ModelRecipe, epochs: int) -> Path:
    """A run folder with a network that knows other shapes: in the place of a file from elsewhere."""
    images = write_folder(folder / "images", ("ring", "frame", "diamond"), train=120, test=10)
    recipe = Recipe(
        model=model,
        data=DataRecipe(name="folder", root=str(images), image_size=32),
        train=RunRecipe(epochs=epochs, batch_size=32),
        schedule=ScheduleRecipe(warmup_epochs=1),
    )
    with build_trainer(recipe, build_data(recipe), folder=folder / "run") as trainer:
        trainer.resume()
        print(f"pretrained on other pictures: accuracy {trainer.fit()[-1]['test_accuracy']:.1%}")
    return folder / "run"


def fine_tune(options: argparse.Namespace, work: Path) -> None:
    """Everything that is made lies in `work`; a second call with it continues."""
    network = ModelRecipe(name=options.model)
    if options.model == "small_vgg":
        network = ModelRecipe(name="small_vgg", options={"widths": (16, 32, 64), "blocks": 1})
    images = options.data or write_folder(work / "images", ("circle", "square", "triangle", "cross"), train=60, test=20)
    checkpoint = options.checkpoint or pretrained(work / "pretraining", network, options.epochs)

    start = {"checkpoint": str(checkpoint), "replace": ReplaceRecipe(preserve=True), "freeze": ("stem.*",)}
    recipe = Recipe(
        model=network.model_copy(update=start),
        data=DataRecipe(name="folder", root=str(images), image_size=options.image_size),
        train=RunRecipe(epochs=options.epochs, batch_size=16),
        optimizer=OptimizerRecipe(lr=0.1, layer_lr={"stages.*": 0.5}),  # the head: all of it
        schedule=ScheduleRecipe(warmup_epochs=1),
    )
    with build_trainer(recipe, build_data(recipe), folder=work / "run") as trainer:
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        print(f"{trained} parameters are trained, in {trainer.total_steps} steps")
        trainer.resume()
        for row in trainer.fit():
            print(f"epoch {row['epoch']}  loss {row['train_loss']:.3f}  accuracy {row['test_accuracy']:.1%}")

    best = load_trained(work / "run")
    batch = next(iter(build_data(recipe).test_batches()))
    plain = repkern.reparameterize(best.model, verify=batch.images)
    files = sorted((Path(images) / "test").rglob("*.*"))
    shown = files[:: max(1, len(files) // 6)][:6]
    size = {"channels": best.channels, "image_size": best.image_size}
    for found in predict(plain, shown, best.classes, recipe.data, **size, top=2):
        guesses = ", ".join(f"{name} {probability:.0%}" for name, probability in found.classes)
        print(f"{Path(found.path).relative_to(images)}: {guesses}")


def main() -> None:
    """Read the options, and make a folder to work in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of images; none: draw some")
    parser.add_argument("--model", default="small_vgg", help="small_vgg or a name of `repkern models`")
    parser.add_argument("--checkpoint", type=Path, help="its weights, a file or a run folder; none: train some first")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--work", type=Path, help="for what is made; none: a folder that is deleted at the end")
    options = parser.parse_args()
    if options.data and not options.checkpoint and options.model != "small_vgg":
        parser.error(f"--model {options.model} needs --checkpoint, the file with its weights")
    if options.work is not None:
        fine_tune(options, options.work)
        return
    with tempfile.TemporaryDirectory() as folder:
        fine_tune(options, Path(folder))


if __name__ == "__main__":
    main()
