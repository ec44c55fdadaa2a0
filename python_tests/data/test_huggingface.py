"""Hugging Face's layouts: parquet files, folders, saved data sets; by number and as streams."""

import io
import itertools

import numpy
import pytest
import torch

from repkern.data import DataRecipe, MissingExtraError, Shard, open_data, open_huggingface

datasets = pytest.importorskip("datasets")
images = pytest.importorskip("PIL.Image")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|huggingface_hub|fsspec|dill|multiprocess).*"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


@pytest.fixture(autouse=True)
def _quiet_and_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    # What `datasets` waits for its threads after a shuffled stream: 5 seconds, each time.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    datasets.disable_progress_bars()


def png(value):
    buffer = io.BytesIO()
    images.fromarray(numpy.full((6, 6, 3), value, dtype=numpy.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(count, label=None, names=("no", "yes")):
    """Row n is an image of value 5 n; of the class n modulo 2."""
    features = {"picture": datasets.Image(), "answer": label or datasets.ClassLabel(names=list(names))}
    labels = [number % 2 for number in range(count)]
    if label is not None and label.dtype == "string":
        labels = [names[number] for number in labels]
    stored = [{"bytes": png(5 * number), "path": None} for number in range(count)]
    return datasets.Dataset.from_dict({"picture": stored, "answer": labels}, features=datasets.Features(features))


@pytest.fixture
def make_repository(tmp_path):
    def make(count=20, tests=6, test_name="test", **options):
        folder = tmp_path / "repository" / "data"
        folder.mkdir(parents=True)
        half = count // 2
        every = rows(count, **options)
        every.select(range(half)).to_parquet(str(folder / "train-00000-of-00002.parquet"))
        every.select(range(half, count)).to_parquet(str(folder / "train-00001-of-00002.parquet"))
        rows(tests, **options).to_parquet(str(folder / f"{test_name}-00000-of-00001.parquet"))
        return folder.parent

    return make


def values_of(part):
    found = []
    for number in range(len(part)):
        with part.open(number) as image:
            found.append(numpy.asarray(image)[0, 0, 0].item())
    return found


def open_source(folder, **options):
    recipe = {"name": "huggingface", "root": str(folder), "mean": (0, 0, 0), "std": (1, 1, 1)} | options
    return open_data(DataRecipe(**recipe), batch_size=4, seed=1)


def seen(batches):
    batches = list(batches)
    values = torch.cat([batch.images[:, 0, 0, 0] for batch in batches]) * 255
    assert torch.equal(torch.cat([batch.labels for batch in batches]), values.round().long() // 5 % 2)
    return values.round().long().tolist()


@pytest.mark.parametrize("test_name", ["test", "validation"])
def test_parquet_files_by_number(make_repository, test_name):
    train, test = open_huggingface(str(make_repository(test_name=test_name)))
    assert values_of(train) == [5 * number for number in range(20)]
    assert train.labels.tolist() == [number % 2 for number in range(20)]
    assert train.classes == ("no", "yes")
    assert len(test) == 6
    assert values_of(train.take(torch.tensor([7, 3]))) == [35, 15]
    assert "row 3 of" in train.name_of(3)


def test_a_saved_data_set(tmp_path):
    folder = str(tmp_path / "saved")
    datasets.DatasetDict({"train": rows(6), "test": rows(4)}).save_to_disk(folder)
    assert values_of(open_huggingface(folder)[0]) == [5 * number for number in range(6)]


def test_a_folder_of_images(tmp_path):
    for part, name, value in itertools.product(("train", "test"), ("a", "b"), (0, 50)):
        (tmp_path / "photos" / part / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / part / name / f"{value}.png").write_bytes(png(value))
    train, test = open_huggingface(str(tmp_path / "photos"))
    assert train.classes == ("a", "b")
    assert sorted(values_of(test)) == [0, 0, 50, 50]


def test_labels_without_names(make_repository):
    folder = make_repository(label=datasets.Value("int64"))
    with pytest.raises(ValueError, match=r"has 0 label columns, name one \(data.huggingface.label_column\)"):
        open_huggingface(str(folder))
    assert open_huggingface(str(folder), label_column="answer")[0].classes == ("0", "1")


def test_labels_that_are_texts(make_repository):
    train, _ = open_huggingface(str(make_repository(label=datasets.Value("string"))), label_column="answer")
    assert train.classes == ("no", "yes")
    assert train.labels.tolist() == [number % 2 for number in range(20)]


def test_bad_names(make_repository, tmp_path):
    folder = str(make_repository())
    with pytest.raises(ValueError, match="has no split 'dev', it has train, test"):
        open_huggingface(folder, test_split="dev")
    with pytest.raises(ValueError, match=r"has no column 'photo', it has picture, answer"):
        open_huggingface(folder, image_column="photo")
    with pytest.raises(FileNotFoundError):
        open_huggingface(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"nothing\.parquet is not there"):
        open_huggingface(str(tmp_path / "nothing.parquet"))
    with pytest.raises(ValueError, match=r"data.root must name"):
        open_huggingface("")


def test_hidden_labels_are_refused(tmp_path):
    shown, hidden = (rows(count).cast_column("answer", datasets.Value("int64")) for count in (6, 4))
    hidden = hidden.map(lambda row: {"answer": -1})
    datasets.DatasetDict({"train": shown, "test": hidden}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"\(test\): labels must be in \[0, 2\), got -1 to -1 .*choose another split"):
        open_huggingface(str(tmp_path / "saved"), label_column="answer")


def test_a_source_of_rows(make_repository, no_process_is_left):
    folder = make_repository()
    alone = open_source(folder)
    assert alone.image_size == 6
    assert sorted(seen(alone.train_batches(0))) == [5 * number for number in range(20)]
    helped = open_source(folder, workers=1)
    assert seen(helped.train_batches(1)) == seen(alone.train_batches(1)) != seen(alone.train_batches(0))
    assert seen(helped.test_batches()) == [0, 5, 10, 15, 20, 25]
    helped.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_resume_and_are_shared_like_other_sets(make_repository, workers, no_process_is_left):
    options = {"huggingface": {"streaming": True, "shuffle": 8}, "workers": workers}
    source = open_source(make_repository(), **options)
    first, second = seen(source.train_batches(0)), seen(source.train_batches(1))
    assert sorted(first) == sorted(second) == [5 * number for number in range(20)]
    assert first != second
    assert seen(source.train_batches(1, 3)) == second[12:]
    halves = [seen(source.train_batches(1, 2, Shard(rank, 2))) for rank in range(2)]
    together = [halves[at // 2 % 2][at // 4 * 2 + at % 2] for at in range(12)]
    assert together == second[8:]
    assert seen(source.test_batches()) == [0, 5, 10, 15, 20, 25]
    assert [seen(source.test_batches(Shard(rank, 2))) for rank in range(2)] == [[0, 5, 10], [15, 20, 25]]
    source.close()


def test_streams_with_a_limit_or_without_a_length(make_repository, tmp_path):
    folder = make_repository()
    source = open_source(folder, limit=9, test_limit=2, huggingface={"streaming": True})
    assert source.steps_per_epoch == 2
    assert len(seen(source.test_batches())) == 2
    with pytest.raises(ValueError, match=r"has 20 rows, 21 were asked for"):
        open_source(folder, limit=21, huggingface={"streaming": True})
    part = str(folder / "data" / "train-00000-of-00002.parquet")
    options = {"streaming": True, "test_split": "train"}
    assert len(set(seen(open_source(part, huggingface=options).train_batches(0)))) == 8  # of 10
    photos = tmp_path / "photos"
    for place, number in itertools.product(("train/a", "train/b", "test/a", "test/b"), range(5)):
        (photos / place).mkdir(parents=True, exist_ok=True)
        (photos / place / f"{number}.png").write_bytes(png(10 * number))
    with pytest.raises(ValueError, match=r"photos \(train\) does not state its number of rows: give data\.limit"):
        open_source(photos, huggingface={"streaming": True})
    few = open_source(photos, limit=8, test_limit=3, huggingface={"streaming": True})
    assert sum(len(batch.labels) for batch in few.train_batches(0)) == 8
    many = open_source(photos, limit=12, test_limit=3, huggingface={"streaming": True})
    with pytest.raises(ValueError, match="the stream ended within step 2"):
        list(many.train_batches(0))


def test_a_damaged_row_is_replaced(tmp_path):
    broken = rows(8)
    stored = [{"bytes": b"no image" if number == 3 else png(5 * number), "path": None} for number in range(8)]
    broken = datasets.Dataset.from_dict({"picture": stored, "answer": broken["answer"][:]}, features=broken.features)
    datasets.DatasetDict({"train": broken, "test": rows(4)}).save_to_disk(str(tmp_path / "saved"))
    for streaming in (False, True):
        options = {"damaged_share": 0.5, "limit": 8, "test_limit": 4, "huggingface": {"streaming": streaming}}
        source = open_source(tmp_path / "saved", **options)
        with pytest.warns(UserWarning, match="1 of 8 train images cannot be read"):
            assert len(seen(source.train_batches(0))) == 8
        assert source.damaged()["train"] == 1


def test_without_datasets_the_text_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'repkern\[train\]'"):
        open_huggingface("anything")
