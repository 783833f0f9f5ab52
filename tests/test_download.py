"""`python -m detr_nb.download` from a server that drops and lies."""
import hashlib
import io
import multiprocessing
import os
import shutil
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from detr_nb.download import ARCHIVES, DownloadError, download_coco, main


class Server:
    "Serves `files` on this machine, as well or badly as a test wants."

    def __init__(self, files: dict[str, bytes]):
        self.files, self.tag = files, {"ETag": '"one"'}
        self.asked, self.slept = [], []  # the Range of each request; how long the program waited
        self.knows_ranges = self.knows_if_range = True
        self.spoil = lambda number, first, body: body  # changes the body of the number-th answer
        self.status, self.then = (lambda number: None), (lambda: None)  # of that answer; what follows it
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.headers.get("Range"))
                status = outer.status(len(outer.asked)) or (404 if self.path not in outer.files else None)
                self.send_error(status) if status else outer.answer(self, outer.files[self.path])

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler, data: bytes) -> None:
        "Send the rest, or everything; what `spoil` takes away stays promised."
        number, first, span, headers = len(self.asked), 0, self.asked[-1], dict(self.tag)
        if self.knows_ranges and span and (not self.knows_if_range or handler.headers["If-Range"] in self.tag.values()):
            first = int(span.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        headers["Content-Length"] = str(len(data) - first)
        handler.send_response(206 if "Content-Range" in headers else 200)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(self.spoil(number, first, data[first:]))
        self.then()


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
    "annotations/panoptic_val2017.json": b"[1]", "panoptic_val2017/000000000003.png": noise(5000, 3)}  # fmt: skip
TRAIN, VAL, PANOPTIC = "/zips/train2017.zip", "/zips/val2017.zip", "/annotations/panoptic_annotations_trainval2017.zip"


def fetched(*folders: str) -> dict[str, bytes]:
    return {name: data for name, data in FILES.items() if name.startswith(folders)}


def tree(root: Path) -> dict[str, bytes]:
    "Every file below a folder that has bytes, the program's notes left out."
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*")
            if path.is_file() and path.stat().st_size and ".downloaded" not in path.parts}


def believe(name: str, data: bytes) -> None:
    "Let the program take this for COCO's archive of that name."
    known = dict(size=len(data), unpacked=2 * len(data), sha256=hashlib.sha256(data).hexdigest())
    ARCHIVES[name] = ARCHIVES[name]._replace(**known)


@pytest.fixture()
def server(monkeypatch):
    "A server of four small archives, the panoptic one with another inside; nobody sleeps."
    inner = zipped({"panoptic_val2017/": b"", **fetched("panoptic_val2017"), "__MACOSX/._x": b"x"})
    server = Server({
        TRAIN: zipped(fetched("train2017")), VAL: zipped(fetched("val2017")),
        "/annotations/annotations_trainval2017.zip": zipped(fetched("annotations/inst"), zipfile.ZIP_DEFLATED),
        PANOPTIC: zipped({**fetched("annotations/panoptic"), "annotations/panoptic_val2017.zip": inner})})
    for name, data in zip(("train", "val", "annotations", "panoptic"), server.files.values()):
        monkeypatch.setitem(ARCHIVES, name, ARCHIVES[name])  # put back afterwards
        believe(name, data)
    monkeypatch.setattr(time, "sleep", server.slept.append)
    yield server
    server.server.shutdown()
    server.server.server_close()


def stop_half_way(server: Server, root: Path) -> int:
    "A start that ends when half of the training images have come; returns how many bytes of them lie there."
    half = len(server.files[TRAIN]) // 2
    server.spoil = lambda number, first, body: body[: max(half - first, 0)]
    with pytest.raises(DownloadError, match=rf"cannot fetch http.*{TRAIN} from byte {half} on: .*go on from here"):
        download_coco(root, what="train", url=server.url)
    server.spoil = lambda number, first, body: body
    server.asked.clear()
    return (root / "train2017.zip.part").stat().st_size


def test_everything_arrives_in_the_layout_of_a_training_and_a_second_start_asks_for_nothing(server, tmp_path):
    for what in ("train, val,annotations,panoptic", "train,val,annotations,panoptic"):
        download_coco(tmp_path, what=what, url=server.url + "/")
        assert tree(tmp_path) == FILES and server.asked == [None] * 4


def test_what_was_deleted_or_changed_its_size_is_fetched_again_and_no_more(server, tmp_path):
    download_coco(tmp_path, url=server.url)
    (tmp_path / "val2017" / "000000000003.jpg").write_bytes(b"short")
    del server.files[TRAIN]
    download_coco(tmp_path, url=server.url)
    assert len(server.asked) == 4 and tree(tmp_path) == fetched("train", "val", "annotations/instances")


@pytest.mark.parametrize("tag", [{"ETag": '"one"'}, {"Last-Modified": "Mon, 01 Jan 2018 00:00:00 GMT"}, {}])
@pytest.mark.parametrize("ranges", [True, False])
def test_dropped_connections_are_mended_and_nothing_is_sent_twice_where_there_are_parts(server, tmp_path, ranges, tag):
    server.knows_ranges, server.tag, whole = ranges, tag, len(server.files[TRAIN])
    server.spoil = lambda number, first, body: body[: len(body) // 2] if number % 3 else body
    download_coco(tmp_path, what="train", url=server.url)
    assert tree(tmp_path) == fetched("train2017") and len(server.asked) == 3
    if ranges and tag:
        assert server.asked == [None, f"bytes={whole // 2}-", f"bytes={whole // 2 + (whole - whole // 2) // 2}-"]


def test_a_server_that_is_busy_is_asked_again_one_without_the_file_is_not(server, tmp_path):
    server.status = {1: 503, 2: 429, 3: 500}.get
    download_coco(tmp_path, what="val", url=server.url)
    assert tree(tmp_path) == fetched("val2017") and len(server.asked) == 4
    del server.files[TRAIN]
    with pytest.raises(DownloadError, match=rf"cannot fetch http://.*{TRAIN} .*HTTP Error 404.* with --url"):
        download_coco(tmp_path, what="train", url=server.url)
    assert len(server.asked) == 5
    with pytest.raises(DownloadError, match=f"cannot fetch http://127.0.0.1:9{TRAIN} .*refused"):
        download_coco(tmp_path, what="train", url="http://127.0.0.1:9")


def test_a_server_that_goes_silent_is_given_up_and_the_next_start_fetches_the_rest(server, tmp_path):
    have = stop_half_way(server, tmp_path)
    assert [wait for wait in server.slept if wait] == [0.5, 1, 2, 4, 8, 16]
    download_coco(tmp_path, what="train", url=server.url)
    assert server.asked == [f"bytes={have}-"] and tree(tmp_path) == fetched("train2017")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_download_is_taken_up_where_it_was(server, tmp_path):
    "In a process of its own that is killed with signal 9 while the server keeps it waiting for the second half."
    part, killed = tmp_path / "train2017.zip.part", threading.Event()
    server.spoil = lambda number, first, body: body if killed.is_set() else body[: len(body) // 2]
    server.then = lambda: killed.wait(60)
    process = multiprocessing.get_context("fork").Process(target=download_coco, args=(tmp_path, "train", server.url))
    process.start()
    while not (part.exists() and part.stat().st_size):
        assert process.is_alive()
        killed.wait(0.01)
    process.kill()
    process.join()
    killed.set()
    have = part.stat().st_size
    download_coco(tmp_path, what="train", url=server.url)
    assert server.asked == [None, f"bytes={have}-"] and tree(tmp_path) == fetched("train2017")


@pytest.mark.parametrize("case", ["told", "lied", "forgotten"])
def test_another_version_is_fetched_from_the_beginning(server, tmp_path, case):
    "Told by the server; lied to, for it would send the rest of the new one; forgotten which one we have."
    rest = f"bytes={stop_half_way(server, tmp_path)}-"
    server.tag, server.knows_if_range = {"ETag": '"two"'}, case != "lied"
    if case == "forgotten":
        (tmp_path / "train2017.zip.part.tag").unlink()
    new = {name: data[::-1] for name, data in fetched("train2017").items()}  # of the same length
    server.files[TRAIN] = zipped(new)
    believe("train", server.files[TRAIN])
    download_coco(tmp_path, what="train", url=server.url)
    assert server.asked == {"told": [rest], "lied": [rest, None], "forgotten": [None]}[case] and tree(tmp_path) == new


def test_wrong_bytes_are_found_and_nothing_of_them_is_kept(server, tmp_path):
    server.files[TRAIN], good = server.files[TRAIN].replace(noise(90_000)[:9], b"forgeries"), server.files[TRAIN]
    with pytest.raises(DownloadError, match=r"train2017.zip.part has the SHA-256 sum .* wrong bytes\. It is deleted"):
        download_coco(tmp_path, what="train", url=server.url)
    assert not list(tmp_path.iterdir())
    server.files[TRAIN] = good
    download_coco(tmp_path, what="train", url=server.url)
    assert tree(tmp_path) == fetched("train2017")


def test_a_page_in_the_place_of_the_archive_is_refused_before_it_is_fetched(server, tmp_path):
    server.files[VAL] = b"<html>please log in</html>"
    with pytest.raises(DownloadError, match=f"{VAL} has 26 bytes, COCO's file has .* another file, or a page"):
        download_coco(tmp_path, what="val", url=server.url)
    assert len(server.asked) == 1 and tree(tmp_path) == {}


def test_an_archive_put_there_by_hand_is_used_and_left_alone(server, tmp_path):
    (tmp_path / "val2017.zip").write_bytes(server.files[VAL])
    download_coco(tmp_path, what="val", url=server.url)
    assert server.asked == [] and tree(tmp_path).keys() == {"val2017.zip", *fetched("val2017")}
    (tmp_path / "train2017.zip").write_bytes(b"half of it")
    with pytest.raises(DownloadError, match=r"train2017.zip has 10 bytes.*\. Delete it and start again"):
        download_coco(tmp_path, what="train", url=server.url)
    assert (tmp_path / "train2017.zip").read_bytes() == b"half of it"  # yours: you delete it


@pytest.mark.parametrize("there", ["", "train2017.zip"])
def test_too_small_a_disk_is_refused_before_the_first_request(server, tmp_path, monkeypatch, there):
    "An archive and its files must have room at the same time; what was fetched before needs none again."
    if there:
        (tmp_path / there).write_bytes(server.files[TRAIN])
    usage, needed = shutil.disk_usage(tmp_path), (2 if there else 3) * len(server.files[TRAIN])
    free = [needed, needed - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free.pop()))
    with pytest.raises(DownloadError, match=r"0.0 GB of room are needed, 0.0 GB are free. Free some"):
        download_coco(tmp_path, what="train", url=server.url)
    assert server.asked == [] and tree(tmp_path).keys() <= {there}
    download_coco(tmp_path, what="train", url=server.url)
    assert fetched("train2017").items() <= tree(tmp_path).items()


def test_a_disk_that_fills_up_ends_with_a_message_and_the_next_start_goes_on(server, tmp_path):
    resource = pytest.importorskip("resource", reason="Windows limits no file's size")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may be larger
    try:
        with pytest.raises(SystemExit, match="DownloadError: .*File too large.* mend this, and start again"):
            main([str(tmp_path), "--what", "train", "--url", server.url])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    have = (tmp_path / "train2017.zip.part").stat().st_size
    download_coco(tmp_path, what="train", url=server.url)
    assert server.asked == [None, f"bytes={have}-"] and tree(tmp_path) == fetched("train2017")


def unpack(data: bytes, root: Path) -> None:
    "Put an archive there by hand, as that of the validation images, and let the command unpack it."
    believe("val", data)
    (root / "val2017.zip").write_bytes(data)
    download_coco(root, what="val")


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out", "..\\out", "C:/out", "a/..", "link"])
def test_a_link_or_a_name_that_leads_out_is_refused_and_nothing_is_written(server, tmp_path, name):
    member = zipfile.ZipInfo(name)
    member.external_attr = (0o120777 if name == "link" else 0o100644) << 16
    with pytest.raises(DownloadError, match="a link or a way out of .*nothing was unpacked"):
        unpack(zipped({"fine.txt": b"fine", member: b"elsewhere"}), tmp_path)
    assert tree(tmp_path).keys() == {"val2017.zip"}


def test_a_damaged_member_or_an_archive_cut_short_is_found_though_the_sum_is_right(server, tmp_path):
    server.files[PANOPTIC] = server.files[PANOPTIC].replace(noise(5000, 3)[:9], b"forgeries")
    believe("panoptic", server.files[PANOPTIC])
    with pytest.raises(DownloadError, match=r"damaged: Bad CRC-32 .*It is deleted"):
        download_coco(tmp_path, what="panoptic", url=server.url)
    assert not list(tmp_path.glob("*.zip*")) and not list(tmp_path.rglob("*.png*"))
    for cut in (1, 30, 2000):
        with pytest.raises(DownloadError, match="val2017.zip is damaged"):
            unpack(zipped(FILES)[:-cut], tmp_path)


def test_unpacking_goes_on_where_it_stopped_and_mends_what_is_wrong(server, tmp_path):
    first, second, third = (tmp_path / name for name in list(FILES)[:3])
    unpack(zipped(FILES), tmp_path)
    os.utime(first, (1, 1))
    second.write_bytes(noise(second.stat().st_size, 99))  # of the same size
    third.unlink()
    unpack(zipped(FILES), tmp_path)
    assert first.stat().st_mtime == 1  # not written again
    assert tree(tmp_path).keys() == {*FILES, "val2017.zip"} and FILES.items() <= tree(tmp_path).items()


def test_the_command_reads_its_arguments(server, tmp_path):
    main([str(tmp_path), "--what", "val", "--url", server.url, "--keep_archives"])
    assert tree(tmp_path) == {"val2017.zip": server.files[VAL], **fetched("val2017")}
    with pytest.raises(SystemExit, match="DownloadError: --what x: there are train, val, annotations, panoptic"):
        main([str(tmp_path), "--what", "val,x", "--url", server.url])
    with pytest.raises(SystemExit, match="DownloadError: .*exists: .*val2017.zip"):
        main([str(tmp_path / "val2017.zip"), "--url", server.url])
