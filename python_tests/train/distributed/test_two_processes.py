"""Two gloo processes compute what one computes, resume exactly, and shard by FSDP2."""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")

EPOCHS, STEPS = 2, 10  # 130 images in batches of 24
FIFTY = {"epochs": 10}


@pytest.fixture(scope="session")
def saved_by_one(tmp_path_factory, alone, jobs_module):
    """(folder, what was found) of a training in one process that was interrupted at step 7."""
    folder = tmp_path_factory.mktemp("saved_by_one")
    found, _ = alone({**jobs_module.job("one", **jobs_module.EXACT), "folder": folder, "misfortune": ["SIGTERM", 0, 7]})
    assert found["interrupted"] == "SIGTERM"
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two_processes")


@pytest.fixture(scope="session")
def found(run, folder, saved_by_one, jobs_module):
    """All jobs in one launch, one after the other in the same two processes."""
    job, exact, lively = jobs_module.job, jobs_module.EXACT, jobs_module.LIVELY
    at, sharded = {name: str(folder / name) for name in "abcd"}, {"strategy": "fsdp2"}
    stop = {"misfortune": ["SIGTERM", 1, 7]}
    deep = {**exact, "network": "resnet"}
    ddp = [
        job("fifty", given=FIFTY, **exact),
        job("mixed", network="mixed", **exact),
        job("single", given={"max_steps": 1}, sync=True),
        job("whole", **lively),
        job("stopped", **lively, folder=at["a"], **stop),
        job("resumed", **lively, folder=at["a"], resume=True),
        job("stopped_for_one", **exact, folder=at["b"], **stop),
        job("from_one", **exact, folder=str(saved_by_one), resume=True),
        job("pieces", given={"accumulate": 5}, refused=True),
        job("ddp", **deep),
        job("ddp_stopped", **deep, folder=at["c"], **stop),
    ]
    fsdp2 = [
        job("fsdp2", given=sharded, **deep),
        job("fsdp2_stopped", given=sharded, **deep, folder=at["d"], **stop),
        job("fsdp2_resumed", given=sharded, **deep, folder=at["d"], resume=True),
        job("ddp_to_fsdp2", given=sharded, **deep, folder=at["c"], resume=True),
        job("pieces_fsdp2", given={**sharded, "accumulate": 3, "clip_norm": 0.5, "optimizer": "adamw"}, **exact),
        job("repsgd", given={**sharded, "optimizer": "repsgd"}, refused=True),
        job("custom_l2", given={**sharded, "custom_l2": True}, refused=True),
        job("structure", given=sharded, misfortune=["structure", -1, 1], refused=True),
    ]
    back = [
        job("fsdp2_to_ddp", **deep, folder=at["d"] + "_copy", resume=True),
        job("pieces_ddp", given={"accumulate": 3, "clip_norm": 0.5, "optimizer": "adamw"}, **exact),
    ]
    fsdp2.insert(2, job("fsdp2_stopped_again", given=sharded, **deep, folder=at["d"] + "_copy", **stop))
    fsdp2[0]["own_group"] = back[0]["own_group"] = True
    return run([*ddp, *fsdp2, *back], folder)


def close(one, other):
    assert len(one) == len(other) > 0
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-9


def test_losses_of_fifty_steps_are_those_of_one_process(found, alone, jobs_module):
    wanted, _ = alone(jobs_module.job("fifty", given=FIFTY, **jobs_module.EXACT))
    for rank in found["fifty"]:
        assert rank["world"] == 2
        assert len(rank["losses"]) == 50
        close(rank["losses"], wanted["losses"])


def test_norms_outside_of_blocks_are_synchronized(found, alone, jobs_module):
    wanted, _ = alone(jobs_module.job("mixed", network="mixed", **jobs_module.EXACT))
    close(found["mixed"][0]["losses"], wanted["losses"])
    assert found["mixed"][0]["rows"][-1]["test_loss"] == pytest.approx(wanted["rows"][-1]["test_loss"], abs=1e-6)


def test_first_gradients_in_single_precision(found, folder, alone, jobs_module):
    _, wanted = alone(jobs_module.job("single", given={"max_steps": 1}, sync=True))
    gradients = torch.load(folder / "single.pt", weights_only=True)
    assert gradients.keys() == wanted.keys()
    error = torch.cat([(gradients[name] - wanted[name]).flatten() for name in wanted]).norm()
    assert error <= 1e-5 * torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()


def test_a_signal_to_one_process_stops_and_saves_all(found):
    for name in ("stopped", "fsdp2_stopped"):
        ranks = found[name]
        assert [rank["interrupted"] for rank in ranks] == ["a signal", "SIGTERM"]
        assert [rank["step"] for rank in ranks] == [8, 8]  # it arrives at the end of step 7 and is seen in step 8
        assert ranks[0]["saved"] == ranks[1]["saved"]
        assert ranks[0]["saved"].endswith("step_00000008")


@pytest.mark.parametrize(("whole", "resumed"), [("whole", "resumed"), ("fsdp2", "fsdp2_resumed")])
def test_resumed_has_the_bits_of_uninterrupted(found, whole, resumed):
    for one, other in zip(found[whole], found[resumed], strict=True):
        assert other["began"] == [1, 3, 8]
        assert other["losses"] == one["losses"][8:]
        assert other["rows"] == one["rows"]
        assert other["digest"] == one["digest"]
        assert other["notes"] == []


def test_from_one_process_to_two_and_from_two_to_one(found, folder, alone, jobs_module):
    wanted, _ = alone(jobs_module.job("wanted", **jobs_module.EXACT))
    back, _ = alone({**jobs_module.job("b", **jobs_module.EXACT), "folder": folder / "b", "resume": True})
    for resumed, saved, now in ((found["from_one"][0], 1, 2), (back, 2, 1)):
        assert resumed["began"][2] == 8
        close(resumed["losses"], wanted["losses"][8:])
        order, pieces = resumed["notes"]
        assert order.startswith(f"saved by {saved} processes, continued by {now}: the order of the images stays")
        assert pieces.startswith(f"a batch was computed in {saved} pieces, and is now in {now}")
        assert [row["epoch"] for row in resumed["rows"]] == [1, 2]
        for row, other in zip(resumed["rows"], wanted["rows"], strict=True):
            assert row["train_loss"] == pytest.approx(other["train_loss"], abs=1e-6)


def test_a_batch_that_cannot_be_divided(found):
    for rank in found["pieces"]:
        assert rank["refused"] == (
            "batch_size 24 cannot be divided into equal pieces for 2 processes that take 5 each (accumulate): it must "
            "be a multiple of 10"
        )


def test_fsdp2_computes_what_ddp_computes(found):
    for ddp, fsdp2 in (("ddp", "fsdp2"), ("pieces_ddp", "pieces_fsdp2")):
        close(found[ddp][0]["losses"], found[fsdp2][0]["losses"])
        for row, other in zip(found[ddp][0]["rows"], found[fsdp2][0]["rows"], strict=True):
            assert row["test_loss"] == pytest.approx(other["test_loss"], abs=1e-6)


@pytest.mark.parametrize("name", ["ddp_to_fsdp2", "fsdp2_to_ddp"])
def test_checkpoints_move_between_strategies(found, name):
    assert found[name][0]["began"] == [1, 3, 8]
    close(found[name][0]["losses"], found["ddp"][0]["losses"][8:])


def test_what_fsdp2_refuses(found):
    for name, text in (
        ("repsgd", "strategy fsdp2 does not work with optimizer.name repsgd"),
        ("custom_l2", "strategy fsdp2 does not work with loss.custom_l2"),
        ("structure", "strategy fsdp2 needs a network of fixed structure"),
    ):
        assert found[name][0]["refused"].startswith(text)


def test_only_rank_0_writes(found, folder):
    assert sorted(path.name for path in (folder / "a").iterdir()) == ["checkpoints", "metrics.csv", "metrics.jsonl"]
    assert [rank["rank"] for rank in found["whole"]] == [0, 1]
