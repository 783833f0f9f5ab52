"""`python -m detr_nb.download` from a server that drops and lies."""
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import threading
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from detr_nb import download
from detr_nb.download import Archive, DownloadError, download_coco, main, space_needed, unpack

# ---------------------------------------------------------------- a server that misbehaves


class Server:
    "Serves `files` on this machine; `spoil(number, path, first, last, body)` changes the number-th answer's body."

    def __init__(self, files: dict[str, bytes]):
        self.files, self.requests = files, []
        self.ranges, self.tag = True, '"one"'
        self.spoil: Callable = lambda number, first, body: body
        self.status: Callable = lambda number: None
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                with lock:
                    outer.requests.append((self.path, self.headers.get("Range")))
                    number = len(outer.requests)
                if status := outer.status(number):
                    return self.send_error(status)
                if self.path not in outer.files:
                    return self.send_error(404)
                outer.answer(self, number)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        "Send a part, or everything where there are no parts; what `spoil` takes away stays promised."
        data = self.files[handler.path]
        first, last = 0, len(data) - 1
        asked = handler.headers.get("Range")
        if self.ranges and asked:
            first, last = (int(place) for place in asked.removeprefix("bytes=").split("-"))
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            handler.send_response(200)
        handler.send_header("Content-Length", str(last + 1 - first))
        if self.tag:
            handler.send_header("ETag", self.tag)
        handler.end_headers()
        handler.wfile.write(self.spoil(number, first, data[first : last + 1]))


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()


FILES = {  # as they must lie on the disk after everything was fetched
    "train2017/000000000001.jpg": noise(90_000), "train2017/000000000002.jpg": noise(70_000, 1),
    "val2017/000000000003.jpg": noise(30_000, 2),
    "annotations/instances_train2017.json": b"{}" * 5000, "annotations/instances_val2017.json": b"[]" * 700,
    "annotations/panoptic_val2017.json": b"[1]", "panoptic_val2017/000000000003.png": noise(5000, 3),
}  # fmt: skip


def archives() -> dict[str, bytes]:
    "The four archives by their path; the panoptic one has another inside."
    def pick(*names):
        return {name: FILES[name] for name in names}

    inner = {"panoptic_val2017/": b"", **pick("panoptic_val2017/000000000003.png"), "__MACOSX/._x": b"x"}
    panoptic = {**pick("annotations/panoptic_val2017.json"), "annotations/panoptic_val2017.zip": zipped(inner)}
    return {
        "zips/train2017.zip": zipped(pick("train2017/000000000001.jpg", "train2017/000000000002.jpg")),
        "zips/val2017.zip": zipped(pick("val2017/000000000003.jpg")),
        "annotations/annotations_trainval2017.zip": zipped(
            pick("annotations/instances_train2017.json", "annotations/instances_val2017.json"), zipfile.ZIP_DEFLATED),
        "annotations/panoptic_annotations_trainval2017.zip": zipped(panoptic),
    }


@pytest.fixture()
def server(monkeypatch):
    "A server of the four archives; the program's list of them, its piece and its waiting times are made to fit."
    server = Server({f"/{path}": data for path, data in archives().items()})
    known = {}
    for name, archive in download.ARCHIVES.items():
        data = server.files[f"/{archive.path}"]
        known[name] = Archive(archive.path, len(data), 2 * len(data), hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(download, "ARCHIVES", known)
    monkeypatch.setattr(download, "PIECE_BYTES", 1 << 14)
    monkeypatch.setattr(download, "READ_BYTES", 1 << 12)
    monkeypatch.setattr(download, "WAITS_S", (0.01, 0.02, 0.03))
    monkeypatch.setattr(download, "TIMEOUT_S", 0.5)
    yield server
    server.server.shutdown()
    server.server.server_close()


def tree(root: Path) -> dict[str, bytes]:
    "Every file below a folder, the program's notes left out."
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*")
            if path.is_file() and ".downloaded" not in path.parts}


def pieces_asked(server: Server) -> set[int]:
    "The pieces that were asked for after the probe."
    return {int(span.removeprefix("bytes=").split("-")[0]) // download.PIECE_BYTES for _, span in server.requests[1:]}


def fetched(*folders: str) -> dict[str, bytes]:
    return {name: data for name, data in FILES.items() if name.startswith(folders)}


# ---------------------------------------------------------------- fetching


def test_everything_arrives_in_the_layout_of_a_training_and_nothing_else_stays(server, tmp_path):
    download_coco(tmp_path, what="train, val,annotations,panoptic", url=server.url + "/")
    assert tree(tmp_path) == FILES


def test_a_second_start_asks_the_server_for_nothing(server, tmp_path):
    download_coco(tmp_path, what="train,val,annotations,panoptic", url=server.url)
    server.requests.clear()
    download_coco(tmp_path, what="train,val,annotations,panoptic", url=server.url)
    assert server.requests == [] and tree(tmp_path) == FILES


def test_what_was_deleted_or_changed_its_size_is_fetched_again_and_no_more(server, tmp_path):
    download_coco(tmp_path, url=server.url)
    (tmp_path / "val2017" / "000000000003.jpg").write_bytes(b"short")
    server.requests.clear()
    download_coco(tmp_path, url=server.url)
    assert {path for path, _ in server.requests} == {"/zips/val2017.zip"}
    assert tree(tmp_path) == fetched("train", "val", "annotations/instances")


def test_several_pieces_travel_at_the_same_time(server, tmp_path):
    meeting = threading.Barrier(3, timeout=5)

    def wait_for_others(number, first, body):
        if number in (2, 3, 4):  # after the probe; passes only when three requests are open at once
            meeting.wait()
        return body

    server.spoil = wait_for_others
    download.TIMEOUT_S = 6
    download_coco(tmp_path, what="train", url=server.url, connections=3)
    assert tree(tmp_path) == fetched("train2017") and not meeting.broken


@pytest.mark.parametrize("ranges", [True, False], ids=["parts", "no parts"])
@pytest.mark.parametrize("tag", ['"one"', ""], ids=["tag", "no tag"])
def test_dropped_connections_cost_only_what_was_lost(server, tmp_path, ranges, tag):
    server.ranges, server.tag = ranges, tag
    server.spoil = lambda number, first, body: body[: len(body) // 2] if number % 2 else body  # every other answer
    download_coco(tmp_path, what="train,annotations", url=server.url)
    assert tree(tmp_path) == fetched("train2017", "annotations/instances")


def test_a_server_that_is_busy_at_times_is_asked_again(server, tmp_path):
    server.status = lambda number: {1: 503, 3: 429, 4: 500}.get(number)
    download_coco(tmp_path, what="val", url=server.url)
    assert tree(tmp_path) == fetched("val2017")


def test_a_server_that_goes_silent_is_given_up_and_the_next_start_fetches_the_rest(server, tmp_path):
    whole = len(server.files["/zips/train2017.zip"])
    server.spoil = lambda number, first, body: body if first < whole // 2 else b""
    with pytest.raises(DownloadError, match=r"train2017.zip: .*brought nothing after byte .*go on from here"):
        download_coco(tmp_path, what="train", url=server.url, connections=2)
    done = json.loads((tmp_path / "train2017.zip.part.json").read_text())["done"]
    assert len(done) >= whole // 2 // download.PIECE_BYTES - 1 > 2
    server.requests.clear()
    server.spoil = lambda number, first, body: body
    download_coco(tmp_path, what="train", url=server.url)
    assert not pieces_asked(server) & set(done) and tree(tmp_path) == fetched("train2017")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_download_is_taken_up_where_it_was(server, tmp_path):
    "In a process of its own that is killed with signal 9 in the middle."
    slow, notes = threading.Event(), tmp_path / "train2017.zip.part.json"
    server.spoil = lambda number, first, body: (slow.wait(0.05), body)[1]
    process = multiprocessing.get_context("fork").Process(
        target=download_coco, args=(tmp_path, "train", server.url), kwargs={"connections": 1})
    process.start()
    while not (notes.exists() and len(json.loads(notes.read_text())["done"]) >= 3):
        assert process.is_alive()
        slow.wait(0.01)
    process.kill()
    process.join()
    done = set(json.loads(notes.read_text())["done"])
    server.requests.clear()
    download_coco(tmp_path, what="train", url=server.url)
    assert pieces_asked(server) and not pieces_asked(server) & done and tree(tmp_path) == fetched("train2017")


def test_another_version_on_the_server_is_fetched_from_the_beginning(server, tmp_path):
    server.spoil = lambda number, first, body: body if first < 40_000 else b""
    with pytest.raises(DownloadError):
        download_coco(tmp_path, what="train", url=server.url, connections=1)
    server.tag, server.spoil = '"two"', lambda number, first, body: body
    server.requests.clear()
    download_coco(tmp_path, what="train", url=server.url)
    assert "bytes=0-16383" in {span for _, span in server.requests} and tree(tmp_path) == fetched("train2017")


def test_a_file_that_changes_on_the_server_meanwhile_is_noticed(server, tmp_path):
    def change(number, first, body):
        server.tag = '"two"' if number > 3 else '"one"'
        return body

    server.spoil = change
    with pytest.raises(DownloadError, match="has changed, or a proxy is in the way"):
        download_coco(tmp_path, what="train", url=server.url, connections=1)


def spoil_member(server: Server, path: str, member: str) -> bytes:
    "Turn a bit of a member of an archive on the server; returns the archive as it was."
    good = server.files[path]
    place = good.index(FILES[member]) + 100
    server.files[path] = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
    return good


def test_wrong_bytes_are_found_and_nothing_of_them_is_kept(server, tmp_path):
    good = spoil_member(server, "/zips/train2017.zip", "train2017/000000000001.jpg")
    with pytest.raises(DownloadError, match=r"bytes are wrong\. It is deleted"):
        download_coco(tmp_path, what="train", url=server.url)
    assert tree(tmp_path) == {}
    server.files["/zips/train2017.zip"] = good
    download_coco(tmp_path, what="train", url=server.url)
    assert tree(tmp_path) == fetched("train2017")


def test_a_member_with_another_checksum_than_its_archive_says_is_found(server, tmp_path, monkeypatch):
    "In the archive within the archive; the sum of the whole is right."
    archive = download.ARCHIVES["panoptic"]
    spoil_member(server, f"/{archive.path}", "panoptic_val2017/000000000003.png")
    wrong = hashlib.sha256(server.files[f"/{archive.path}"]).hexdigest()
    monkeypatch.setitem(download.ARCHIVES, "panoptic", archive._replace(sha256=wrong))
    with pytest.raises(DownloadError, match=r"damaged: Bad CRC-32 .*It is deleted"):
        download_coco(tmp_path, what="panoptic", url=server.url)
    assert not list(tmp_path.glob("*.zip*")) and not list(tmp_path.rglob("*.png*"))


def test_a_page_in_the_place_of_the_archive_is_refused_before_it_is_fetched(server, tmp_path):
    server.files["/zips/val2017.zip"] = b"<html>please log in</html>"
    with pytest.raises(DownloadError, match="val2017.zip has 26 bytes, COCO's file has .* another file, or a page"):
        download_coco(tmp_path, what="val", url=server.url)
    assert len(server.requests) == 1 and tree(tmp_path) == {}


def test_an_address_without_the_file_is_said_at_once(server, tmp_path):
    del server.files["/zips/val2017.zip"]
    with pytest.raises(DownloadError, match=r"cannot fetch http://.*val2017.zip: HTTP Error 404"):
        download_coco(tmp_path, what="val", url=server.url)
    assert len(server.requests) == 1


def test_no_server_at_all(server, tmp_path):
    with pytest.raises(DownloadError, match="cannot fetch http://127.0.0.1:9/zips/val2017.zip"):
        download_coco(tmp_path, what="val", url="http://127.0.0.1:9")


def test_an_archive_put_there_by_hand_is_used_and_left_alone(server, tmp_path):
    (tmp_path / "val2017.zip").write_bytes(server.files["/zips/val2017.zip"])
    download_coco(tmp_path, what="val", url=server.url)
    assert server.requests == [] and tree(tmp_path).keys() == {"val2017.zip", *fetched("val2017")}
    (tmp_path / "train2017.zip").write_bytes(b"half of it")
    with pytest.raises(DownloadError, match=r"train2017.zip has 10 bytes.*\. Delete it and start again"):
        download_coco(tmp_path, what="train", url=server.url)
    assert (tmp_path / "train2017.zip").read_bytes() == b"half of it"  # yours: you delete it


def test_archives_can_be_kept(server, tmp_path):
    download_coco(tmp_path, what="val", url=server.url, keep_archives=True)
    assert (tmp_path / "val2017.zip").read_bytes() == server.files["/zips/val2017.zip"]
    assert not list(tmp_path.glob("*.part*"))


def test_too_small_a_disk_is_refused_before_the_first_request(server, tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=400_000))
    with pytest.raises(DownloadError, match=r"has 0.0 GB of room, 0.0 GB are needed: free some"):
        download_coco(tmp_path, what="train", url=server.url)
    assert server.requests == [] and tree(tmp_path) == {}
    needed = space_needed([download.ARCHIVES["train"]])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    with caplog.at_level("INFO"):
        download_coco(tmp_path, what="train", url=server.url)
    assert "of room are needed" in caplog.text and tree(tmp_path) == fetched("train2017")


def test_what_was_fetched_before_needs_no_room_again(server, tmp_path, monkeypatch):
    (tmp_path / "train2017.zip").write_bytes(server.files["/zips/train2017.zip"])
    archive, usage = download.ARCHIVES["train"], shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=archive.unpacked))
    download_coco(tmp_path, what="train", url=server.url)
    assert fetched("train2017").items() <= tree(tmp_path).items()


def test_the_room_of_the_real_archives_is_known():
    real = list(download.ARCHIVES.values())
    assert 38e9 < space_needed(real) < 45e9
    assert space_needed([Archive("a", 5, 6, ""), Archive("b", 1, 1, "")], keep_archives=True) == 13


def test_an_unknown_part_is_refused(server, tmp_path):
    with pytest.raises(DownloadError, match="--what test: there are train, val, annotations, panoptic"):
        download_coco(tmp_path, what="val,test", url=server.url)


# ---------------------------------------------------------------- unpacking


@pytest.mark.parametrize("name", ["../out.txt", "/out.txt", "a/../../out.txt", "..\\out.txt", "C:/out.txt", "a/.."])
def test_a_name_that_leads_out_is_refused_and_nothing_is_written(tmp_path, name):
    (tmp_path / "a.zip").write_bytes(zipped({"fine.txt": b"fine", "b/fine.txt": b"fine"}))
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"out")
    with pytest.raises(DownloadError, match="lead out of .*nothing was unpacked"):
        unpack(tmp_path / "a.zip", tmp_path / "root")
    assert tree(tmp_path).keys() == {"a.zip"}


def test_a_link_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("train2017")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, str(tmp_path / "elsewhere"))
        archive.writestr("train2017/out.txt", b"out")
    with pytest.raises(DownloadError, match="holds the link 'train2017'"):
        unpack(tmp_path / "a.zip", tmp_path / "root")
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("cut", [1, 30, 2000])
def test_an_archive_cut_short_is_refused(tmp_path, cut):
    (tmp_path / "a.zip").write_bytes(zipped(FILES)[:-cut])
    with pytest.raises(DownloadError, match="a.zip is damaged"):
        unpack(tmp_path / "a.zip", tmp_path / "root")


def test_unpacking_goes_on_where_it_stopped_and_mends_what_is_wrong(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped(FILES))
    root = tmp_path / "root"
    unpack(tmp_path / "a.zip", root)
    first, second = root / "train2017/000000000001.jpg", root / "train2017/000000000002.jpg"
    os.utime(first, (1, 1))
    second.write_bytes(noise(len(second.read_bytes()), 99))  # of the same size
    unpack(tmp_path / "a.zip", root)
    assert first.stat().st_mtime == 1 and tree(root) == FILES


# ---------------------------------------------------------------- the command


def test_the_command_reads_its_arguments(server, tmp_path):
    main([str(tmp_path), "--what", "val", "--url", server.url, "--connections", "2"])
    assert tree(tmp_path) == fetched("val2017")
    with pytest.raises(SystemExit, match="DownloadError: --what x"):
        main([str(tmp_path), "--what", "x", "--url", server.url])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SystemExit, match="DownloadError: .*file"):
        main([str(tmp_path / "file"), "--url", server.url])
