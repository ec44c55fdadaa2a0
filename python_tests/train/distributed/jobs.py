"""The jobs that several tests share."""


def recipe(strategy="ddp", ema=True, every=2, optimizer="sgd", custom_l2=False, **train):
    sections = {
        "train": {"epochs": 2, "batch_size": 24, "device": "cpu", "strategy": strategy, **train},
        "optimizer": {"name": optimizer, "lr": 0.02, "scales": "none.json" if optimizer.startswith("rep") else ""},
        "loss": {"custom_l2": custom_l2},
        "checkpoint": {"every_steps": every},
    }
    return {**sections, "ema": {"decay": 0.9}} if ema else sections


def job(name, *, given=None, **options):
    return {"name": name, "recipe": recipe(**(given or {})), **options}


EXACT = {"dtype": "float64", "sync": True}
#: Something of everything whose state must be kept: dropout, pieces, a moving average, a momentum.
LIVELY = {"given": {"accumulate": 2, "clip_norm": 1.0}, "network": "dropout"}
