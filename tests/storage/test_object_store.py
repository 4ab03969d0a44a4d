"""Objects in Cloud Storage by Google's own client, against a fake that fails on demand."""

import os
import subprocess
import sys
import threading

import pytest
from fake_gcs import KEEPS_HALF, FakeStorage, random_faults, serve

from trainer.errors import RunAgain, UserError
from trainer.storage import gcs, gcs_client
from trainer.storage.filesystem import checksum
from trainer.storage.gcs import ObjectReader, Taken, find_object, open_reader, upload

LARGE = os.urandom(1 << 20) * 21


def contents(cloud, name):
    return cloud.buckets["b"][name].data


def test_objects_come_back_as_they_were_written(cloud, tmp_path):
    for name, data in (("none", b""), ("å b/ü", b"text"), ("large", LARGE)):
        stored = upload(f"gs://b/{name}", data)
        assert contents(cloud, name) == data and stored.bytes == len(data)
        assert find_object(f"gs://b/{name}") == stored
        path = tmp_path / "copy"
        gcs.download(f"gs://b/{name}", str(path))
        assert path.read_bytes() == data
    assert stored.checksum == checksum(str(path))
    assert find_object("gs://b/other") is None and gcs.read_object("gs://b/x") is None


def test_a_reader_seeks_and_reads_lines(cloud):
    lines = b"".join(b"line %d\n" % number for number in range(600_000))
    upload("gs://b/lines", lines)
    with open_reader("gs://b/lines") as file:
        assert list(file) == lines.splitlines(keepends=True)
        assert file.seek(-5, os.SEEK_END) == len(lines) - 5 and file.read() == lines[-5:]
        assert file.seek(10) == 10 and file.read(20) == lines[10:30] and file.tell() == 30


def test_folders_come_whole(cloud, tmp_path):
    names = [f"f/{index:02d}" for index in range(20)] + ["f/sub/deep", "f/", "fother"]
    for name in names:
        cloud.put("b", name, name.encode())
    listed = gcs.list_objects("gs://b/f/")
    assert [item.url for item in listed] == [f"gs://b/{name}" for name in sorted(names[:21])]
    gcs.download_folder("gs://b/f", str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "sub" / "deep").read_bytes() == b"f/sub/deep"
    assert len(list((tmp_path / "copy").iterdir())) == 21
    with pytest.raises(FileNotFoundError, match="not found"):
        gcs.download_folder("gs://b/nowhere", str(tmp_path))


def test_a_name_that_leads_out_of_the_folder_is_refused(cloud, tmp_path):
    cloud.put("b", "f/a/../../out", b"x")
    for copy in (
        lambda: gcs.download_folder("gs://b/f", str(tmp_path / "f")),
        lambda: gcs.download_files("gs://b/f", str(tmp_path / "f"), ["a/../../out"]),
    ):
        with pytest.raises(UserError, match="leads out of its folder"):
            copy()
    assert not (tmp_path / "out").exists()


def test_preconditions_stop_the_second_writer(cloud):
    first = upload("gs://b/part", b"one", if_generation=0)
    with pytest.raises(Taken):
        upload("gs://b/part", b"two", if_generation=0)
    with pytest.raises(Taken):
        upload("gs://b/part", LARGE, if_generation=0)
    upload("gs://b/part", b"two", if_generation=first.generation)
    assert contents(cloud, "part") == b"two"
    gcs.delete("gs://b/part")
    gcs.delete("gs://b/part")
    assert not cloud.buckets["b"]


@pytest.mark.parametrize("data", [b"small", LARGE])
def test_an_upload_whose_answer_was_lost_is_not_somebody_else_s(cloud, data):
    lost = []

    def lose_answers(request):
        if ("multipart" in request or request.startswith("PUT")) and len(lost) < 3:
            lost.append(request)
            return "reset after"
        return ""

    cloud.plan = lose_answers
    stored = upload("gs://b/part", data, if_generation=0)
    assert contents(cloud, "part") == data and lost
    assert find_object("gs://b/part") == stored


def test_an_upload_of_which_the_store_keeps_half_a_piece_is_begun_again(cloud):
    asked = []

    def keep_half_once(request):
        asked.append(request)
        return KEEPS_HALF if [item[:3] for item in asked].count("PUT") == 2 else ""

    cloud.plan = keep_half_once
    stored = upload("gs://b/part", LARGE, if_generation=0)
    assert contents(cloud, "part") == LARGE and stored.bytes == len(LARGE)
    assert cloud.faults[KEEPS_HALF] >= 1 and sum("uploadType" in item for item in asked) == 2


def test_everything_is_repeated_until_it_works(cloud, tmp_path):
    cloud.plan = random_faults(7, 0.3)
    for index in range(12):
        upload(f"gs://b/f/{index:02d}", b"%d" % index, if_generation=0)
    upload("gs://b/f/large", LARGE, if_generation=0)
    gcs.download_folder("gs://b/f", str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "large").read_bytes() == LARGE
    found = gcs.read_objects([f"gs://b/f/{index:02d}" for index in range(13)])
    assert found == [*(b"%d" % index for index in range(12)), None]
    assert sum(cloud.faults.values()) >= 20 and len(cloud.faults) == 6, cloud.faults


def test_bytes_that_are_not_the_object_s_are_noticed(cloud, monkeypatch):
    cloud.put("b", "large", LARGE)
    stored = find_object("gs://b/large")
    changed = bytearray(LARGE)
    changed[5 << 20] ^= 1
    cloud.buckets["b"]["large"].data = bytes(changed)
    reader = ObjectReader(stored)
    with pytest.raises(RunAgain, match="arrived with CRC-32C"):
        while reader.read(4 << 20):
            pass


def test_an_object_that_is_replaced_while_it_is_read_stops_the_reader(cloud):
    cloud.put("b", "large", LARGE)
    with open_reader("gs://b/large") as file:
        file.read(100)
        cloud.put("b", "large", LARGE)
        with pytest.raises(UserError, match="gs://b/large: replaced or removed while it was read"):
            file.read()


@pytest.mark.parametrize(
    ("bucket", "kind", "message"),
    [
        ("forbidden", PermissionError, "access denied .HTTP 403."),
        ("missing", FileNotFoundError, "not found; check bucket"),
        ("odd", OSError, "the store refused the request .HTTP 418."),
        ("down", RunAgain, "did not answer .HTTP 503."),
        ("busy", RunAgain, "did not answer .HTTP 429."),
    ],
)
def test_what_a_store_refuses_is_said_in_one_line(cloud, monkeypatch, bucket, kind, message):
    monkeypatch.setattr(gcs_client, "_DEADLINE_SECONDS", 1.5)
    cloud.statuses |= {"forbidden": 403, "down": 503, "busy": 429, "odd": 418}
    for act in (
        lambda: upload(f"gs://{bucket}/x", b"", if_generation=0),
        lambda: gcs.list_objects(f"gs://{bucket}/x"),
        lambda: open_reader(f"gs://{bucket}/x"),
    ):
        with pytest.raises(kind, match=message) as caught:
            act()
        assert type(caught.value) is kind and f"gs://{bucket}/x" in str(caught.value)
    with pytest.raises(UserError, match="expected a local path or gs://BUCKET/NAME"):
        find_object("s3://bucket/name")


def test_nobody_there_is_a_reason_to_run_again(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(gcs_client, "_DEADLINE_SECONDS", 1.0)
    gcs_client._make_client.cache_clear()
    with pytest.raises(RunAgain, match="gs://b/x: the store did not answer"):
        find_object("gs://b/x")
    gcs_client._make_client.cache_clear()


def test_of_many_writers_one_gets_the_name(cloud):
    cloud.plan = random_faults(5, 0.1)
    results = []

    def write(number):
        try:
            upload("gs://b/part", b"%d" % number, if_generation=0)
            results.append(number)
        except Taken:
            pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 1 and contents(cloud, "part") == b"%d" % results[0]


def test_behind_a_proxy_without_credentials_requests_are_anonymous(tmp_path):
    storage = FakeStorage({"b": {}})
    storage.put("b", "public", b"for all")
    code = (
        "import sys; from trainer.storage.gcs import read_object as read;"
        "from trainer.storage.gcs import upload;"
        "print(read('gs://b/public'), upload('gs://b/large', b'x' * 9000000).bytes);"
        "assert 'tensorflow' not in sys.modules"
    )
    with serve(storage, str(tmp_path)) as environment:
        values = dict(os.environ) | environment | {"HOME": str(tmp_path)}
        for name in ("STORAGE_EMULATOR_HOST", "REQUESTS_CA_BUNDLE"):
            values.pop(name, None)
        child = subprocess.run(
            [sys.executable, "-c", code], env=values, capture_output=True, text=True, timeout=60
        )
    assert child.stdout == "b'for all' 9000000\n", child.stderr
    assert child.stderr.count("\n") == 1
    assert child.stderr.startswith("warning: no Google credentials found")
