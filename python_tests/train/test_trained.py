"""Runs of a Trainer whose network was made in Python: no recipe says which network it is."""

import pytest
import torch
from small_training import make_trainer, small_model

from repkern.nn import replace_convs
from repkern.train import CheckpointError
from repkern.train.start import start_from
from repkern.train.trained import load_trained


def test_a_network_made_in_python_is_loaded_into_one(tmp_path):
    model = replace_convs(small_model(), preserve=True)
    trainer = make_trainer(tmp_path, model=model, train={"epochs": 1}, ema={"decay": 0.5})
    trainer.fit()
    with pytest.raises(CheckpointError, match=r"made in Python.*start_from"):
        load_trained(str(tmp_path))
    other = replace_convs(small_model(seed=4))
    assert start_from(other, str(tmp_path)) == []
    average = trainer.average.module.state_dict()
    assert all(torch.equal(tensor, average[name]) for name, tensor in other.state_dict().items())
