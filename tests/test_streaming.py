"""Files as a source of records, and streams: every sample once, the same order again, whoever reads."""

import copy
import csv
import io
import itertools
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_runs import CASES, STEPS, data_of, fit, write_sources
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from datamodules.files import FileData, stored
from datamodules.loading import Batch
from datamodules.records import BadRecord, BadRecords, Record, Source, Unfit, column_of, find_files

# ---------------------------------------------------------------- a data module that shows what it is given


class Numbers(FileData):
    """Numbers out of files; batches `{"inputs": int64 [N]}`. 13 and 1313 are found bad only when they are looked at."""

    columns = ("number",)

    def parse(self, record: Record) -> tuple[int, bytes]:
        number = column_of(record, "number")
        if isinstance(number, str) and not number.isdigit():
            raise Unfit(f"{number!r} is no number")
        return int(number), str(number).encode()

    def examine(self, content: int) -> None:
        if content in (13, 1313):
            raise Unfit("unlucky")

    def write(self, folder: Path, contents: Iterator[int], limit: int | None) -> int:
        numbers = list(contents)[:limit]
        torch.save(torch.tensor(numbers), folder / "numbers.pt")
        return len(numbers)

    def open(self, folder: Path) -> Dataset[Batch]:
        from datamodules.loading import Rows

        return Rows(inputs=torch.load(folder / "numbers.pt", weights_only=True))

    def collate(self, samples: list[Any]) -> tuple[Batch | None, list[BadRecord]]:
        bad = [BadRecord(file, row, "unlucky") for number, file, row in samples if number in (13, 1313)]
        good = [number for number, _, _ in samples if number not in (13, 1313)]
        return ({"inputs": torch.tensor(good)} if good else None), bad


def write_numbers(folder: Path, *sizes: int, first: int = 100) -> str:
    """jsonl files with so many consecutive numbers each; returns their glob."""
    folder.mkdir(exist_ok=True)
    for i, size in enumerate(sizes):
        lines = [json.dumps({"number": n}) for n in range(first, first + size)]
        (folder / f"{i}.jsonl").write_text("\n".join(lines) + "\n")
        first += size
    return str(folder / "*.jsonl")


def numbers(source: Any, cache: Path, **options: Any) -> Numbers:
    defaults: dict[str, Any] = {"val_fraction": 0.0, "batch_size": 8, "seed": 1}
    if options.get("streaming"):
        defaults |= {"steps_per_epoch": 5, "shuffle_buffer": 16}
    data = Numbers(source, cache_dir=cache, **{**defaults, **options})
    data.setup()
    return data


def take(loader: Any, n: int) -> list[list[int]]:
    seen: list[list[int]] = []
    while len(seen) < n:
        for batch in loader:
            seen.append(batch["inputs"].tolist())
            if len(seen) == n:
                break
    return seen


def epoch(loader: Any) -> list[list[int]]:
    return take(loader, len(loader))


def flat(batches: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


class Rank:
    """As much of a trainer as a data module asks for."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.global_rank, self.world_size, self.is_global_zero = rank, world_size, rank == 0


# ---------------------------------------------------------------- streams


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 0),
    buffer=st.integers(1, 50),
    world_size=st.integers(1, 3),
    batch_size=st.integers(1, 7),
    shuffle=st.booleans(),
)
@settings(max_examples=25)
def test_every_sample_once_per_pass_and_ranks_make_up_the_global_batches(
    tmp_path_factory: Any, sizes: list[int], buffer: int, world_size: int, batch_size: int, shuffle: bool
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    source = write_numbers(folder / "in", *sizes)
    options: dict[str, Any] = {"streaming": True, "shuffle": shuffle, "shuffle_buffer": buffer}

    def read(rank: int, world_size: int, batch_size: int) -> list[list[int]]:
        data = numbers(source, folder, batch_size=batch_size, **options)
        data.trainer = Rank(rank, world_size)  # type: ignore[assignment]
        return take(data.train_dataloader(), n)

    total, size = sum(sizes), batch_size * world_size
    n = -(-2 * total // size)  # two passes, and into a third
    ranks = [read(rank, world_size, batch_size) for rank in range(world_size)]
    together = [flat(parts) for parts in zip(*ranks, strict=True)]
    assert together == read(0, 1, size)
    samples = flat(together)
    everything = list(range(100, 100 + total))
    assert sorted(samples[:total]) == sorted(samples[total : 2 * total]) == everything
    assert shuffle or samples[:total] == everything


def test_a_stream_is_shuffled_anew_in_every_pass_and_by_the_seed_alone(tmp_path: Path) -> None:
    source = write_numbers(tmp_path / "in", 40, 40)

    def passes(seed: int) -> list[list[int]]:
        samples = flat(take(numbers(source, tmp_path, streaming=True, seed=seed).train_dataloader(), 20))
        return [samples[:80], samples[80:]]

    torch.manual_seed(1)
    expected = passes(1)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert passes(1) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert expected[0] != expected[1]
    assert passes(2)[0] not in expected
    assert expected[0] != sorted(expected[0])


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_change_nothing_and_any_number_of_them_goes_on(tmp_path: Path, streaming: bool) -> None:
    source = write_numbers(tmp_path / "in", 17, 0, 30, 3)

    def loader(workers: int) -> Any:
        return numbers(source, tmp_path, streaming=streaming, num_workers=workers).train_dataloader()

    expected = take(loader(0), 23)  # over three borders of epochs, and passes
    for stop, workers in ((1, 2), (5, 1), (11, 2)):
        first, second = loader(workers), loader(workers - 1)
        seen = take(first, stop)
        second.sampler.load_state_dict(copy.deepcopy(first.sampler.state_dict()))
        first.close()
        assert seen + take(second, 23 - stop) == expected
        second.close()


def test_resume_starts_reading_near_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_numbers(tmp_path / "in", *[50] * 10)
    first = numbers(source, tmp_path, streaming=True).train_dataloader()
    take(first, 100)  # 800 samples: well in the second pass
    data = numbers(source, tmp_path, streaming=True)
    asked: list[Any] = []
    read = Source.read
    monkeypatch.setattr(Source, "read", lambda self, *place: asked.append(place) or read(self, *place))
    second = data.train_dataloader()
    second.sampler.load_state_dict(first.sampler.state_dict())
    take(second, 1)
    assert [place[1][0] for place in asked] == [5]  # one file, of the second pass


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"batch_size": 9}, "written with batch_size = 8, this run has batch_size = 9"),
        ({"seed": 2}, "written with seed = 1, this run has seed = 2"),
        ({"shuffle_buffer": 7}, "written with shuffle_buffer = 16"),
        ({"source": "other"}, "written with files and settings = "),
    ],
)
def test_state_of_another_stream_is_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    source = write_numbers(tmp_path / "in", 20)
    state = numbers(source, tmp_path, streaming=True).train_dataloader().sampler.state_dict()
    if "source" in other:
        other = {"source": write_numbers(tmp_path / "other", 21)}
    place = numbers(**{"source": source, "cache": tmp_path, "streaming": True, **other}).train_dataloader().sampler
    with pytest.raises(ValueError, match=message):
        place.load_state_dict(state)


def test_first_batches_leave_training_alone(tmp_path: Path) -> None:
    data = numbers(write_numbers(tmp_path / "in", 30), tmp_path, streaming=True)
    loader = data.train_dataloader()
    seen = take(loader, 4)
    assert take(data.first_dataloader(), 3) == seen[:3]
    assert data.state_dict()["batches_given"] == 4


def test_workers_that_are_started_afresh_get_all_they_need(tmp_path: Path) -> None:
    data = numbers(write_numbers(tmp_path / "in", 30), tmp_path, streaming=True)
    data.trainer = Rank(0, 1)  # type: ignore[assignment]
    expected = data.train_dataloader()
    data.trainer.generator = (x for x in ())  # type: ignore[union-attr]  # no process can be given that
    again = pickle.loads(pickle.dumps(expected.batches))
    assert torch.equal(again.batch(0).batch["inputs"], next(iter(expected))["inputs"])


# ---------------------------------------------------------------- bad records


def test_bad_records_are_left_out_counted_and_named(tmp_path: Path) -> None:
    write_numbers(tmp_path / "in", 300, 300)
    lines = (tmp_path / "in/0.jsonl").read_text().splitlines()
    lines[7] = '{"number": "x"}'
    lines[11] = '{"number": 1'
    (tmp_path / "in/0.jsonl").write_text("\n".join(lines))
    with open(tmp_path / "in/1.jsonl", "a") as file:
        file.write('{"number": 13}\n')
    source, good = str(tmp_path / "in/*.jsonl"), sorted({*range(100, 700)} - {107, 111})

    with pytest.warns(
        UserWarning, match=r"data: found 3 bad record\(s\) \(.*0.jsonl, row 7: 'x' is no number; .*row 11"
    ):
        data = numbers(source, tmp_path)
    assert [(Path(bad.file).name, bad.row) for bad in data.bad_records] == [
        ("0.jsonl", 7),
        ("0.jsonl", 11),
        ("1.jsonl", 300),
    ]
    assert sorted(flat(epoch(data.train_dataloader()))) == good
    with pytest.warns(UserWarning, match="found 3 bad"):  # told again by a store that was there
        numbers(source, tmp_path)
    with pytest.raises(ValueError, match=r"max_bad_fraction: found 3 bad .* of 601 read in 2 file\(s\); allowed"):
        numbers(source, tmp_path, max_bad_fraction=0.004)

    for workers in (0, 2):
        data = numbers(source, tmp_path, streaming=True, num_workers=workers)
        n = 2 * 599 // 8
        batches = take(data.train_dataloader(), n)
        assert {len(batch) for batch in batches} == {7, 8}  # one that is found bad late leaves its place empty
        samples = flat(batches)
        assert sorted(set(samples)) == good
        assert {samples.count(number) for number in good} <= {1, 2}
        with pytest.warns(UserWarning, match="found 3 bad"):
            data.teardown("fit")
        assert len(data.bad_records) == 3


def test_too_many_bad_records_end_a_stream_in_one_line(tmp_path: Path) -> None:
    write_numbers(tmp_path / "in", 100)
    (tmp_path / "in/1.jsonl").write_text("no\n" * 60)
    for workers in (0, 2):
        data = numbers(str(tmp_path / "in/*.jsonl"), tmp_path, streaming=True, num_workers=workers)
        with pytest.raises(ValueError, match=r"max_bad_fraction: found \d+ bad record\(s\) .*1.jsonl, row 0") as error:
            take(data.train_dataloader(), 40)
        assert "\n" not in str(error.value)
        with pytest.warns(UserWarning, match="bad record"):
            data.teardown("fit")
    (tmp_path / "in/0.jsonl").unlink()
    with pytest.raises(ValueError, match=r"there is no good record in 1 file\(s\)"):
        take(numbers(str(tmp_path / "in/*.jsonl"), tmp_path, streaming=True).train_dataloader(), 1)


def test_a_file_that_breaks_off_counts_as_a_share_of_the_files() -> None:
    bad = BadRecords(0.3, 3)
    bad.add([BadRecord("a", 90, "the file breaks off", broken=True)])
    with pytest.raises(ValueError, match="max_bad_fraction"):
        bad.check(3000)
    bad.n_files = 4
    bad.check(3000)
    bad.add([BadRecord("a", 90, "the file breaks off", broken=True)])  # the same one
    assert len(bad) == bad.broken == 1


# ---------------------------------------------------------------- files

ROWS = [{"text": f"Story {i}, ünd so on.", "id": i} for i in range(600)]


def write_rows(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(row["text"] for row in rows))
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        with tarfile.open(path, "w") as tar:
            for row in rows:
                for extension, value in row.items():
                    member = tarfile.TarInfo(f"shard/{row['id']:06}.{extension}")
                    member.size = len(str(value).encode())
                    tar.addfile(member, io.BytesIO(str(value).encode()))


def read(*files: Path, column: str = "text", start: tuple[int, int] = (0, 0)) -> list[Any]:
    def parse(record: Record) -> tuple[str, bytes]:
        text = column_of(record, column)
        return (text.decode() if isinstance(text, bytes) else text), b""

    format, found = find_files([str(file) for file in files])
    return list(Source(format, tuple(found["train"]), parse, (column,)).read(None, start))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".tar"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    files = [tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"]
    write_rows(files[0], ROWS[:350])
    write_rows(files[1], ROWS[350:])
    everything = read(*files)
    assert [content for _, content in everything] == [row["text"] for row in ROWS]
    for i in (0, 1, 299, 350, 599):
        assert read(*files, start=everything[i][0]) == everything[i:]
    if suffix != ".txt":
        content = read(*files, column="tex")[0][1]
        assert content.row == 0
        assert content.reason.startswith("no column 'tex', only ")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".tar"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    write_rows(whole)
    write_rows(cut)
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) * 2 // 3 + 100])
    found = read(cut, whole)
    bad = [content for _, content in found if isinstance(content, BadRecord)]
    texts = [content for _, content in found if not isinstance(content, BadRecord)]
    assert len(bad) == 1
    assert texts[-600:] == [row["text"] for row in ROWS]
    assert bad[0].row == len(texts) - 600
    assert texts[: bad[0].row] == [row["text"] for row in ROWS[: bad[0].row]]
    assert bad[0].row > 300 or suffix == ".parquet"  # whose table of contents is at its end
    assert bad[0].broken or suffix == ".jsonl"


def test_compressed_lines(tmp_path: Path) -> None:
    import gzip

    content = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    assert [text for _, text in read(tmp_path / "a.jsonl.gz")] == [row["text"] for row in ROWS]
    (tmp_path / "b.jsonl.gz").write_bytes(content[:-100])
    bad = [content for _, content in read(tmp_path / "b.jsonl.gz") if isinstance(content, BadRecord)]
    assert bad[-1].broken


def test_splits_of_a_directory_and_by_file(tmp_path: Path) -> None:
    for name, rows in (("train-00000-of-00002", ROWS[:10]), ("train-00001-of-00002", ROWS[10:20]), ("test", ROWS[20:])):
        write_rows(tmp_path / f"{name}.parquet", rows)
    format, found = find_files(str(tmp_path))
    assert format == "parquet"
    assert {split: len(files) for split, files in found.items()} == {"train": 2, "test": 1}
    pattern = str(tmp_path / "train*.parquet")
    assert find_files({"train": pattern, "val": str(tmp_path / "test.parquet")})[1]["val"] == found["test"]
    assert find_files(pattern)[1]["train"] == found["train"]
    assert find_files([str(tmp_path / "test.parquet"), pattern])[1]["train"] == [*found["test"], *found["train"]]


def test_files_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` says of the hub, with addresses in memory instead."""
    import datasets
    import fsspec

    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.parquet")
        fsspec.filesystem("memory").pipe(f"/hub/{name}.parquet", (tmp_path / f"{name}.parquet").read_bytes())
    builder = SimpleNamespace(
        name="parquet",
        config=SimpleNamespace(data_files={"train": ["memory://hub/a.parquet"], "test": ["memory://hub/b.parquet"]}),
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda source, config: builder)
    format, found = find_files("someone/stories")
    assert [found["train"], found["test"]] == [["memory://hub/a.parquet"], ["memory://hub/b.parquet"]]

    def texts() -> list[str]:
        source = Source(format, tuple(found["train"]), lambda record: (record["text"], b""), ("text",))
        return [text.decode() for _, text in source.read()]

    assert texts() == [row["text"] for row in ROWS]

    def unplugged(*_: Any, **__: Any) -> None:
        raise TimeoutError("no route to host")

    monkeypatch.setattr(fsspec, "open", unplugged)
    with pytest.raises(ValueError, match=r"memory://hub/a.parquet cannot be reached \(no route to host\)"):
        texts()  # that is no bad file, and nothing to go on without
    builder.name = "audiofolder"
    with pytest.raises(ValueError, match="format of someone/stories: found 'audiofolder', allowed are parquet, json"):
        find_files("someone/stories")


def test_sources_that_are_not_there_give_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            find_files(source)
        assert "\n" not in str(error.value)

    write_rows(tmp_path / "stories.jsonl")
    refused(str(tmp_path / "storys.jsonl"), "there is no file .*storys.jsonl; did you mean .*stories.jsonl")
    refused(str(tmp_path / "*.parquet"), "there is no file .*parquet")
    refused(str(tmp_path / "nowhere"), "there is no file or directory .*nowhere")
    (tmp_path / "a.xyz").touch()
    refused(str(tmp_path / "a.xyz"), "a.xyz has an unknown extension, allowed are .parquet")
    write_rows(tmp_path / "a.parquet")
    refused([str(tmp_path / "a.parquet"), str(tmp_path / "stories.jsonl")], "files of different formats, json, parquet")
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), "the directory .* is empty")
    import datasets

    def no_hub(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nreally")

    monkeypatch.setattr(datasets, "load_dataset_builder", no_hub)
    refused("pydco", r"'pydco' is no file .* hub gives \(Couldn't reach the Hub\); did you mean 'pydoc'")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("me/stories", r"needs the package datasets: pip install 'l3d_pl\[hub\]'")


def test_val_fraction_parts_records_by_what_they_hold(tmp_path: Path) -> None:
    source = write_numbers(tmp_path / "in", 500, 500)
    write_rows(tmp_path / "in/2.jsonl", [{"number": n} for n in range(100, 150)])  # once more

    def sets(**options: Any) -> tuple[set[int], set[int]]:
        data = numbers(source, tmp_path, val_fraction=0.2, n_val=None, **options)
        return set(flat(epoch(data.train_dataloader()))), set(flat(epoch(data.val_dataloader())))

    train, val = sets()
    assert train | val == set(range(100, 1100))
    assert not train & val
    assert 150 < len(val) < 250
    assert sets(streaming=True, steps_per_epoch=110, seed=3) == (train, val)


def test_parts_by_split_and_their_limits(tmp_path: Path) -> None:
    write_numbers(tmp_path / "a", 60)
    write_numbers(tmp_path / "b", 60, first=1000)
    source = {"train": str(tmp_path / "a"), "validation": str(tmp_path / "b")}
    data = numbers(source, tmp_path, n_val=20, val_batch_size=7, max_rows=30)
    assert [len(batch) for batch in take(data.val_dataloader(), 3)] == [7, 7, 6]
    assert take(data.val_dataloader(), 3) == take(data.test_dataloader(), 3)
    assert sorted(flat(take(data.train_dataloader(), 4))) == list(range(100, 130))
    with pytest.raises(ValueError, match="val_split: found 'validatoin', allowed are train, validation; did you mean"):
        numbers(source, tmp_path, val_split="validatoin")
    assert numbers(str(tmp_path / "a"), tmp_path).val_dataloader() == []


def test_a_store_follows_its_files_and_is_whole_or_not_there(tmp_path: Path) -> None:
    source = write_numbers(tmp_path / "in", 30)
    assert len(numbers(source, tmp_path / "cache").train) == 30
    write_numbers(tmp_path / "in", 31)
    assert len(numbers(source, tmp_path / "cache").train) == 31
    before = sorted((tmp_path / "cache").iterdir())

    def breaks(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"cache_dir: .*new cannot be made \(No space left on device\)"):
        stored(tmp_path / "cache/new", breaks)
    assert sorted((tmp_path / "cache").iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streaming": True}, "steps_per_epoch: found None; a stream has no length"),
        ({"steps_per_epoch": 3}, "steps_per_epoch: found 3; it is for streaming"),
        ({"streaming": True, "steps_per_epoch": 3, "max_rows": 3}, "max_rows: found 3 with streaming"),
        ({"batch_size": 0}, "batch_size: found 0, allowed are whole numbers >= 1"),
        ({"num_workers": -1}, "num_workers: found -1, allowed are whole numbers >= 0"),
        ({"shuffle_buffer": 0}, "shuffle_buffer: found 0"),
        ({"val_fraction": 1.0}, r"val_fraction: found 1.0, allowed are numbers in \[0, 1\)"),
        ({"max_bad_fraction": -0.1}, "max_bad_fraction: found -0.1"),
    ],
)
def test_bad_options_give_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Numbers("pydoc", **options)


# ---------------------------------------------------------------- resume under Lightning


@pytest.mark.filterwarnings("ignore:data. found . bad record")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("case", CASES)
def test_resumed_run_sees_what_the_uninterrupted_one_would(tmp_path: Path, case: str, num_workers: int) -> None:
    write_sources(tmp_path)
    expected = fit(data_of(case, tmp_path, num_workers=num_workers), tmp_path)
    assert len(expected) == STEPS
    assert len({json.dumps(sample) for batch in expected for sample in batch}) > 30
    for stop in range(1, STEPS) if num_workers == 0 else (2, 5, 6, 11):
        torch.manual_seed(stop)
        resumed = fit(data_of(case, tmp_path, num_workers=num_workers), resume=tmp_path / f"{stop}.ckpt")
        assert resumed == expected[stop:], stop


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:data. found . bad record")
def test_two_ranks_see_the_batches_of_one_process_and_resume_exactly(tmp_path: Path) -> None:
    write_sources(tmp_path)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"TORCHELASTIC_RUN_ID": "data", "GROUP_RANK": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])}
    command = [sys.executable, str(Path(__file__).with_name("data_runs.py")), str(tmp_path)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    files = [tmp_path / f"rank{rank}.json" for rank in range(2)]
    assert all(file.is_file() for file in files), "\n".join(outputs)
    results = [json.loads(file.read_text()) for file in files]
    for case in CASES:
        together = [a + b for a, b in zip(*(result[case] for result in results), strict=True)]
        assert together == fit(data_of(case, tmp_path))
        for result in results:
            for stop in (3, 5, 9):
                assert result[f"{case} {stop}"] == result[case][stop:], (case, stop)
