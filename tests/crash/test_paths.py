"""No name in any format leads out of its root, seen from outside.

A child process takes in some 600 sources whose names want to leave their folder, under strace. What it opened, made, moved
or removed is then held against a list of places where it may: its sources and Python to read, its workbench to write. Around
every source lie canaries, photographs that a name leads to; none of their bytes may be found in the workbench.
"""
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from stat import S_IFCHR, S_IFIFO, S_IFLNK

import pytest
from PIL import Image

REPO = Path(__file__).parents[2]
MARK = b"CANARY-7f3a91c4"
FULL = os.environ.get("CVOPS_FULL") == "1"


def photograph(colour: tuple[int, int, int], comment: bytes = b"") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 24), colour).save(out, "JPEG", comment=comment)
    return out.getvalue()


GOOD, CANARY = photograph((10, 200, 30)), photograph((200, 10, 30), MARK)


def list_names(outside: Path) -> list[str]:
    "Names that want to leave; `canary.jpg` lies in `outside`, in its folder `cases`, and beside each source."
    up, far = "../canary.jpg", f"{outside}/canary.jpg"
    return [
        up, "../../canary.jpg", "./../canary.jpg", "a/../../canary.jpg", "images/../../canary.jpg", "a/b/../../../canary.jpg", "../in/../canary.jpg", "..//canary.jpg", ".././canary.jpg",
        "../../../../../../../../../../etc/hostname", f"../../../../../../../../../..{far}", far, f"/{far}", f"//{far}", f"/.{far}", f"./{far}", f" {far}", f"{far} ", f"\t{far}",
        "/etc/passwd", "/proc/self/environ", "/proc/self/cwd/canary.jpg", "/dev/zero", "/dev/stdin", f"file://{far}", f"file:{up}", "http://127.0.0.1:9/canary.jpg", "~/canary.jpg", "~root/canary.jpg",
        "$HOME/canary.jpg", "`cat canary.jpg`", "|cat canary.jpg",
        "..\\canary.jpg", "..\\..\\canary.jpg", "a\\..\\..\\canary.jpg", "C:\\canary.jpg", "C:canary.jpg", "C:/canary.jpg", "\\\\server\\share\\canary.jpg", "\\\\?\\C:\\canary.jpg", "\\canary.jpg",
        "%2e%2e/canary.jpg", "..%2fcanary.jpg", "%2e%2e%2fcanary.jpg", "..%5ccanary.jpg", "..%c0%afcanary.jpg", "%00../canary.jpg",
        "\u2024\u2024/canary.jpg", "\uff0e\uff0e/canary.jpg", "..\u2215canary.jpg", "..\uff0fcanary.jpg", "..\u2044canary.jpg", "\u2025/canary.jpg", ".\u200b./canary.jpg", "\u202egpj.yranac/..",
        ".\u0308./canary.jpg", "\ufeff../canary.jpg", f"../canary.jpg\0{'x'}.jpg", "\0", "a\0/../../canary.jpg", f"{far}\0.jpg", "../canary.jpg\n", "good.jpg/../../canary.jpg",
        "", ".", "..", "/", "./", "../", "../in", "good.jpg/", "good.jpg/.", "a"*300 + ".jpg", "a/"*2100 + "x.jpg", "../"*1400 + "etc/hostname", "\ud800/../../canary.jpg", "\udcff.jpg",
        "link.jpg", "chain.jpg", "away/canary.jpg", "near/../../canary.jpg", "loop.jpg", "away/../canary.jpg", "pipe.jpg", "images/link.jpg",
    ]


def make_source(root: Path, outside: Path) -> Path:
    "A folder with a good photograph, links that lead out of it, and canaries beside it."
    (root/"in"/"images").mkdir(parents=True)
    os.link(outside/"canary.jpg", root/"canary.jpg")
    inside = root/"in"
    for name in ("good.jpg", "images/good.jpg"): (inside/name).write_bytes(GOOD)
    for name, target in {"link.jpg": outside/"canary.jpg", "chain.jpg": "link.jpg", "away": outside, "near": "images", "loop.jpg": "loop.jpg", "images/link.jpg": "../../canary.jpg"}.items():
        (inside/name).symlink_to(target)
    os.mkfifo(inside/"pipe.jpg")
    return inside


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape" if "\udcff" in text else "surrogatepass"))


# --- a source for each format and name

def make_coco(root: Path, name: str) -> None:
    images = [{"id": 1, "file_name": "good.jpg"}, {"id": 2, "file_name": name}]
    write(root/"instances_train.json", json.dumps({"images": images, "categories": [{"id": 1, "name": "tea"}], "annotations": [{"image_id": k, "category_id": 1, "bbox": [1, 2, 3, 4]} for k in (1, 2)]}))


def make_yolo_list(root: Path, name: str) -> None:
    write(root/"data.yaml", "train: train.txt\nnames: [tea]\n")
    write(root/"train.txt", f"good.jpg\n{name}\n./{name}\nimages/{name}\n")


def make_yolo_folder(root: Path, name: str) -> None:
    write(root/"data.yaml", f"path: {json.dumps(name)}\ntrain: {json.dumps(name)}\nval: images\nnames: [tea]\n")


def make_yolo_path(root: Path, name: str) -> None:
    write(root/"data.yaml", f"path: {json.dumps(name)}\ntrain: images\nval: [{json.dumps(name)}, images]\nnames: [tea]\n")


def make_voc(root: Path, name: str) -> None:
    from xml.sax.saxutils import escape
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    write(root/"Annotations/1.xml", f"<annotation><folder>{escape(name)}</folder><filename>{escape(name)}</filename><path>{escape(name)}</path><object><name>tea</name>{box}</object></annotation>")
    write(root/"ImageSets/Main/train.txt", f"{name}\n1\n")


def make_fiftyone(root: Path, name: str) -> None:
    write(root/"metadata.json", "{}")
    write(root/"samples.json", json.dumps({"samples": [{"filepath": "good.jpg", "tags": []}, {"filepath": name, "tags": ["train"], "label": {"_cls": "Classification", "label": name}}]}))


def make_csv(root: Path, name: str) -> None:
    write(root/"labels.csv", 'path,label\ngood.jpg,tea\n"{}","{}"\n'.format(*[name.replace('"', '""')]*2))


def make_parquet(root: Path, name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    clean = name.encode("utf-8", "replace").decode()
    pq.write_table(pa.table({"path": ["good.jpg", clean], "label": ["tea", clean]}), root/"labels.parquet")


def make_lists(root: Path, name: str) -> None:
    write(root/"train.txt", f"good.jpg, tea\n{name}, tea\n{name}\n")


def make_zip(root: Path, name: str) -> None:
    with zipfile.ZipFile(root/"a.zip", "w") as file:
        for entry in ("tea/good.jpg", name):
            info = zipfile.ZipInfo("x")
            info.filename = entry.encode("utf-8", "replace").decode()      # as it is: ZipInfo itself cuts a name at NUL
            file.writestr(info, GOOD + entry.encode("utf-8", "replace"))


def make_tar(root: Path, name: str) -> None:
    with tarfile.open(root/"a.tar", "w", format=tarfile.PAX_FORMAT) as file:
        for entry in ("tea/good.jpg", name):
            info = tarfile.TarInfo(entry.encode("utf-8", "replace").decode())
            info.size = len(GOOD)
            file.addfile(info, io.BytesIO(GOOD))


def make_zip_link(root: Path, name: str) -> None:
    "A link to the name, and then a file written through it."
    with zipfile.ZipFile(root/"a.zip", "w") as file:
        file.writestr("tea/good.jpg", GOOD)
        for entry, kind, content in (("tea/link.jpg", S_IFLNK, name), ("door", S_IFLNK, name), ("pipe", S_IFIFO, ""), ("zero", S_IFCHR, "")):
            info = zipfile.ZipInfo(entry)
            info.create_system, info.external_attr = 3, (kind | 0o777) << 16
            file.writestr(info, content.encode("utf-8", "replace"))
        file.writestr("door/planted.jpg", GOOD)


def make_tar_link(root: Path, name: str) -> None:
    with tarfile.open(root/"a.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as file:
        for entry, kind in (("tea/good.jpg", tarfile.REGTYPE), ("tea/link.jpg", tarfile.SYMTYPE), ("tea/hard.jpg", tarfile.LNKTYPE), ("door", tarfile.SYMTYPE), ("zero", tarfile.CHRTYPE), ("door/planted.jpg", tarfile.REGTYPE)):
            info = tarfile.TarInfo(entry)
            info.type, info.size = kind, len(GOOD) if kind == tarfile.REGTYPE else 0
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE): info.linkname = name.encode("utf-8", "replace").decode()
            file.addfile(info, io.BytesIO(GOOD))


def make_folder(root: Path, name: str) -> None:
    "The name as a link's target, and as a file's name as far as the disk takes it."
    for place, content in ((root/"tea.jpg", name), (root/"door", name)):
        try: place.symlink_to(content)
        except (OSError, ValueError): continue
    try: write(root/"tea"/name.replace("/", "\uff0f"), GOOD)
    except (OSError, ValueError): return


def make_document(root: Path, name: str) -> None:
    "Every document of every format as a link to the name."
    for place in ("instances.json", "data.yaml", "train.txt", "val.txt", "classes.csv", "labels.csv", "metadata.json", "samples.json", "Annotations", "annotations", "ImageSets", "labels"):
        try: (root/place).symlink_to(name)
        except (OSError, ValueError): continue


FORMATS = {"coco": make_coco, "yolo:list": make_yolo_list, "yolo:folder": make_yolo_folder, "yolo:path": make_yolo_path, "voc": make_voc, "fiftyone": make_fiftyone, "csv": make_csv,
           "csv:parquet": make_parquet, "lists": make_lists, "archive:zip": make_zip, "archive:tar": make_tar, "archive:zip-link": make_zip_link, "archive:tar-link": make_tar_link,
           "folder": make_folder, "auto:document": make_document}


def make_cases(base: Path, every: int = 1) -> list[tuple[str, str]]:
    "Sources below `base/outside/cases`; the format to read each with, and its folder or file."
    outside = base/"outside"
    (outside/"cases").mkdir(parents=True)
    (outside/"canary.jpg").write_bytes(CANARY)
    os.link(outside/"canary.jpg", outside/"cases"/"canary.jpg")
    for name, text in {"canary.json": '{"images": [], "annotations": [], "note": "%s"}', "canary.txt": "canary.jpg, %s\n", "canary.yaml": "names: [%s]\n"}.items(): write(outside/name, text % MARK.decode())
    pairs = [(format, name) for format in FORMATS for name in [*list_names(outside), *(f"{outside}/{file}" for file in ("canary.json", "canary.txt", "canary.yaml") if format == "auto:document")]]
    cases = []
    for number, (format, name) in enumerate(pairs[::every]):
        root = make_source(outside/"cases"/f"{number:04}", outside)
        FORMATS[format](root, name)
        packed = next(root.glob("a.*"), None)
        cases.append((format.partition(":")[0], str(packed or root)))
    return cases


# --- the child, which takes everything in

def plain_join(root, name: str) -> Path:
    if "\0" in str(name): raise ValueError("no call of the system takes it")
    return Path(root)/str(name)


def follow(root: Path, path: Path):
    from cvops_wb.data.formats import Item
    name = path.relative_to(root).as_posix()
    try: return Item(name, path.resolve())
    except (OSError, RuntimeError): return Item(name, None, problem="unreadable")


def plant(bug: str) -> None:
    import cvops_wb.data.formats as face
    from cvops_wb.data.formats import archives, documents, exporting, remotes, yolo
    if bug == "join":
        for module in (face, archives, documents, exporting, remotes, yolo): module.join_within = plain_join
    if bug == "unpack": archives.unpack = lambda source, folder: shutil.unpack_archive(source, folder, **({"filter": "fully_trusted"} if ".tar" in source.name else {}))
    if bug == "follow": face._make_item = follow


def run_child(base: str, bug: str) -> None:
    "Read every source, take its items in, and write an export with labels and names that want to leave; for a process under strace."
    import fsspec
    import pandas as pd
    from fsspec.implementations.memory import MemoryFile

    from cvops_wb.core.errors import CvopsError
    from cvops_wb.core.settings import load_settings
    from cvops_wb.data.formats import Listing, clean_name, find_format, formats
    from cvops_wb.data.formats.exporting import Sample, list_writers, name_files, write_export
    from cvops_wb.data.intake import take_in
    from cvops_wb.data.store import open_writer
    formats.find()
    plant(bug)
    settings, work = load_settings(), json.loads(Path(base, "work.json").read_text())
    memory = fsspec.filesystem("memory")
    try: os.open("/BEGIN", os.O_RDONLY)
    except FileNotFoundError: pass
    items, failed, counts = [], [], Counter()
    remote = [(f"remote{k}", name) for k, name in enumerate(work["names"]) if name.isprintable() and name.strip("/.")]
    for bucket, name in remote: memory.store.update({f"/{bucket}/{key}": MemoryFile(memory, f"/{bucket}/{key}", GOOD) for key in ("tea/good.jpg", name)})
    for format, source in [*work["cases"], *(("remote", f"memory://{bucket}") for bucket, _ in remote)]:
        try:
            found = find_format(source)[1] if format == "auto" else formats[format]
            items += found.read(source).items
            counts["read"] += 1
        except CvopsError: counts["refused"] += 1
        except Exception as e: failed.append(f"{format} {source}: {e!r}")
    with open_writer(settings) as store: taken, new = take_in(store, Listing(items, "test"), "test", settings)
    counts += Counter(arrival.reason or "taken" for arrival in taken)
    for k, name in enumerate(work["names"]):
        table = pd.DataFrame({"id": [f"{k:016x}"], "sources": [[name]], "ext": [".jpg"]})
        sample = Sample(f"{k:016x}", name_files(table)[0], clean_name(name), "train", [], True, 32, 24, {"tags": [], "camera": "", "taken": ""}, lambda: GOOD)
        for format in list_writers():
            try: write_export([sample], settings.root/"exports"/f"{format}{k}", format)
            except CvopsError: counts["export refused"] += 1
            except Exception as e: failed.append(f"export {format} {name!r}: {e!r}")
    try: os.open("/END", os.O_RDONLY)
    except FileNotFoundError: pass
    Path(base, "told.json").write_text(json.dumps({"new": new, "counts": counts, "failed": failed}))


# --- what was seen from outside

CALLS = "open,openat,openat2,creat,rename,renameat,renameat2,unlink,unlinkat,link,linkat,symlink,symlinkat,mkdir,mkdirat,rmdir,truncate,mknod,mknodat,chmod,fchmodat,execve,connect"
LINE = re.compile(r"^\d+\s+(\w+)\((.*)\)\s+= (-?\d+)(?:<(.*?)>)?(?:\s+(E\w+))?")
TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"(\.\.\.)?')
FOLDER = re.compile(r"(?:AT_FDCWD|\d+)<([^>]*)>, $")


def list_touched(log: Path):
    "Call, its arguments, and each path that it named, resolved as the kernel did where it came so far."
    pending, inside = {}, False
    for line in log.read_text(errors="surrogateescape").splitlines():
        pid = line.split()[0]
        if line.endswith("<unfinished ...>"): pending[pid] = line.removesuffix("<unfinished ...>"); continue
        if resumed := re.match(r"^\d+\s+<\.\.\. \w+ resumed>(.*)", line): line = pending.pop(pid, "") + resumed[1]
        if '"/BEGIN"' in line: inside = True; continue
        if '"/END"' in line: return
        if not inside or not (match := LINE.match(line)): continue
        call, arguments, _, real, error = match.groups()
        for text in TEXT.finditer(arguments):
            name = text[1].encode("utf-8", "surrogateescape").decode("unicode_escape").encode("latin-1", "replace").decode("utf-8", "replace")
            folder = FOLDER.search(arguments[:text.start()])
            named = os.path.normpath(os.path.join(folder[1] if folder else "/unknown", name))
            yield call, arguments, real if real and call.startswith("open") else named, error


def find_escapes(base: Path, log: Path) -> list[str]:
    "What was touched elsewhere than it may be."
    outside, bench = os.path.realpath(base/"outside"), os.path.realpath(base/"bench")
    source = re.compile(re.escape(outside) + r"/cases/\d{4}/in(/|$)")
    python = tuple(os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, REPO/"cvops_wb")) + ("/usr/lib", "/usr/share/zoneinfo", "/lib", "/etc/ld.so.cache", "/etc/locale.alias", "/etc/ssl/openssl.cnf", "/dev/null", "/dev/urandom", "/proc/meminfo", "/sys/devices/system/cpu")
    found = []
    for call, arguments, path, error in list_touched(log):
        writes = not call.startswith("open") or re.search(r"O_(WRONLY|RDWR|CREAT|TRUNC|APPEND)", arguments)
        if path.startswith("/dev/shm/sem."): continue      # the lock of a progress bar
        if call == "execve" and arguments.startswith(f'"{sys.executable}", ["{sys.executable}", "-W", "ignore", "-c", "from cvops_wb.data.inspectors import serve; serve('): continue   # decodes, traced as we are
        if path == bench or path.startswith(bench + "/"): continue
        if not writes and (source.match(path) or path.startswith(python) or path == os.path.realpath(REPO)): continue
        found.append(f"{call} {path}{' ' + error if error else ''}")
    return found


def find_canaries(root: Path) -> list[str]:
    "Files of the workbench that hold a canary's bytes or its mark."
    return [str(path) for path in root.rglob("*") if path.is_file() and not path.is_symlink() and (MARK in (data := path.read_bytes()) or CANARY in data)]


def photograph_tree(root: Path) -> dict[str, tuple]:
    return {str(path): (found.st_mode, found.st_size, found.st_mtime_ns, os.readlink(path) if path.is_symlink() else "") for path in sorted(root.rglob("*")) for found in [path.lstat()]}


def attack(base: Path, bug: str = "", every: int = 1) -> dict:
    "Take in all cases below strace; what it told, what it touched, what it brought home."
    cases = make_cases(base, every)
    (base/"bench").mkdir()
    shutil.copy(REPO/"settings.ini", base/"bench")
    (base/"work.json").write_text(json.dumps({"cases": cases, "names": list_names(base/"outside")[::every]}))
    before = photograph_tree(base/"outside")
    command = ["strace", "-f", "-y", "-qq", "-s", "9000", "-e", f"trace={CALLS}", "-e", "signal=none", "-o", base/"log", sys.executable, __file__, base, bug]
    environment = {**os.environ, "CVOPS_ROOT": str(base/"bench"), "PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(base/"outside"), "TMPDIR": str(base/"bench")}
    done = subprocess.run(command, cwd=base/"bench", env=environment, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    assert (base/"told.json").is_file(), done.stderr[-3000:]
    changed = {path for path, found in photograph_tree(base/"outside").items() if before.get(path) != found} | before.keys() - photograph_tree(base/"outside").keys()
    return {"cases": len(cases), **json.loads((base/"told.json").read_text()), "escapes": find_escapes(base, base/"log"), "canaries": find_canaries(base/"bench"), "changed": sorted(changed)}


pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")


def test_no_name_leads_out_of_its_root(tmp_path):
    seen = attack(tmp_path, every=1 if FULL else 2)
    print({**seen, "escapes": len(seen["escapes"])})
    assert seen["failed"] == [] and seen["escapes"] == [] and seen["canaries"] == [] and seen["changed"] == []
    assert seen["new"] >= 1 and seen["cases"] >= 500 and seen["counts"]["read"] > 200 and seen["counts"]["refused"] > 50 and seen["counts"]["outside_root"] > 100


@pytest.mark.parametrize("bug, sees", [("join", ("escapes", "canaries")), ("unpack", ("escapes",)), ("follow", ("escapes", "canaries"))])
def test_a_planted_bug_is_seen(tmp_path, bug, sees):
    "Names joined without a look, archives unpacked by the standard library, links followed."
    seen = attack(tmp_path, bug, every=7)
    assert all(seen[what] for what in sees), seen


if __name__ == "__main__": run_child(sys.argv[1], sys.argv[2])
