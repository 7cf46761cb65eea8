"""A disk that loses power: a recorded trace is played on a model in which nothing is safe but what was synced.

A file's unsynced writes may be there or not, each by itself and cut at any sector; a folder's unsynced entries may be there or
not; an fsync of a file says nothing of its name, one of a folder nothing of the folder's own name. A rename is whole, or not
there, or (where the target folder alone is on the disk) leaves the old name too. SQLite's -shm is rebuilt and left out."""
import os
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

RECORDED = "openat,creat,write,pwrite64,writev,pwritev,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat,rmdir,mkdir,mkdirat,ftruncate,truncate,fallocate,close,dup,dup2,dup3,copy_file_range,sendfile"
LINE = re.compile(r'^\d+ +(\w+)\((.*)\) += +(-?\d+)')
TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
SECTOR = 512


@dataclass
class File:
    "Bytes on the disk, and the writes that may not be."
    synced: bytearray = field(default_factory=bytearray)
    pending: list[tuple] = field(default_factory=list)      # (offset, bytes), or (size, None) for a truncation

    def sync(self) -> None:
        for write in self.pending: apply(self.synced, *write)
        self.pending = []


@dataclass
class Folder:
    "Names on the disk, and the changes that may not be."
    synced: dict = field(default_factory=dict)
    pending: list = field(default_factory=list)             # (name, node or None, the other half of a rename)
    live: dict = field(default_factory=dict)


def apply(data: bytearray, at: int, piece: bytes | None) -> None:
    "A write or a truncation."
    if len(data) < at: data.extend(bytes(at - len(data)))
    if piece is None: del data[at:]
    else: data[at:at + len(piece)] = piece


class Disk:
    "Folders and files below a root, played from traces."

    def __init__(self, root: Path):
        self.root, self.top, self.open, self.acks = str(root), Folder(), {}, {}

    def find(self, path: str):
        node = self.top
        for part in Path(path).relative_to(self.root).parts:
            node = node.live.get(part) if isinstance(node, Folder) else None
        return node

    def inside(self, path: str) -> bool: return path == self.root or path.startswith(self.root + "/")

    def enter(self, path: str, node, half=None) -> tuple:
        "Change a name; pending until the folder is synced."
        folder, name = self.find(os.path.dirname(path)), os.path.basename(path)
        change = [name, node, half]
        folder.pending.append(change)
        if node is None: folder.live.pop(name, None)
        else: folder.live[name] = node
        return change

    def play(self, line: str, acks: str = "") -> bool:
        "One call of a trace; whether the disk may now be different."
        if not (found := LINE.match(line)): return False
        call, arguments, result = found[1], found[2], int(found[3])
        if result < 0: return False
        texts = [bytes.fromhex(t.replace("\\x", "")) for t in TEXT.findall(arguments)]
        return bool(getattr(self, f"do_{call}", self.ignore)(arguments, texts, result, acks))

    def ignore(self, arguments, texts, result, acks): return False

    def do_openat(self, arguments, texts, result, acks):
        path = texts[0].decode()
        self.open[result] = ("acks", None, 0) if path == acks else ("other", None, 0)
        if not self.inside(path) or path.endswith("-shm"): return False
        node = self.find(path)
        if node is None: self.enter(path, node := File())
        elif "O_TRUNC" in arguments: node.pending.append((0, None))
        self.open[result] = ("node", node, 0)
        return True

    def do_close(self, arguments, texts, result, acks): self.open.pop(int(arguments), None)

    def do_write(self, arguments, texts, result, acks):
        number = int(arguments.split(",")[0])
        kind, node, at = self.open.get(number, ("other", None, 0))
        if kind == "acks": self.acks |= dict(line.split() for line in texts[0].decode().splitlines())
        if kind != "node": return kind == "acks"
        node.pending.append((at, texts[0][:result]))
        self.open[number] = (kind, node, at + result)
        return True

    def do_pwrite64(self, arguments, texts, result, acks):
        kind, node, _ = self.open.get(int(arguments.split(",")[0]), ("other", None, 0))
        if kind == "node": node.pending.append((int(arguments.rsplit(",", 1)[1]), texts[0][:result]))
        return kind == "node"

    def do_ftruncate(self, arguments, texts, result, acks):
        number, size = map(int, arguments.split(","))
        kind, node, _ = self.open.get(number, ("other", None, 0))
        if kind == "node": node.pending.append((size, None))
        return kind == "node"

    def do_fsync(self, arguments, texts, result, acks):
        kind, node, _ = self.open.get(int(arguments), ("other", None, 0))
        if kind != "node": return False
        if isinstance(node, File): node.sync()
        else: self.sync_folder(node)
        return True

    do_fdatasync = do_fsync

    def sync_folder(self, folder: Folder) -> None:
        for name, node, half in folder.pending:
            if node is None and half and self._is_pending(half): self._land(half)     # the old name is gone, so the new one is there
            if node is None: folder.synced.pop(name, None)
            else: folder.synced[name] = node
        folder.pending = []

    def _land(self, change: list) -> None:
        for folder in self._folders(self.top):
            if any(change is other for other in folder.pending):
                folder.synced[change[0]] = change[1]
                folder.pending = [other for other in folder.pending if other is not change]

    def do_rename(self, arguments, texts, result, acks):
        old, new = (text.decode() for text in texts)
        if not self.inside(old): return False
        added = self.enter(new, self.find(old))
        self.enter(old, None, half=added)
        return True

    def do_unlink(self, arguments, texts, result, acks):
        path = texts[0].decode()
        if not self.inside(path) or path.endswith("-shm"): return False
        self.enter(path, None)
        return True

    do_unlinkat = do_unlink

    def do_mkdir(self, arguments, texts, result, acks):
        if not self.inside(texts[0].decode()): return False
        self.enter(texts[0].decode(), Folder())
        return True

    def refuse(self, arguments, texts, result, acks):
        number = re.match(r"\d+", arguments)
        ours = any(self.inside(text.decode(errors="replace")) for text in texts) or number and self.open.get(int(number[0]), "?")[0] == "node"
        if ours: raise AssertionError(f"a call that this model does not know: {arguments[:100]}")

    do_writev = do_pwritev = do_link = do_linkat = do_fallocate = do_copy_file_range = do_sendfile = do_truncate = do_rmdir = do_dup = do_dup2 = refuse
    do_renameat = do_renameat2 = do_rename

    def lose_power(self, place: Path, rng: random.Random) -> None:
        "Write one state that the disk may be in after a power loss."
        keep = rng.choice((0., .2, .5, .8, 1.))
        kept: dict[int, bool] = {}
        self._write(self.top, place, lambda: rng.random() < keep, kept, rng)

    def _write(self, folder: Folder, place: Path, chance, kept: dict[int, bool], rng: random.Random) -> None:
        names = dict(folder.synced)
        for change in folder.pending:
            name, node, half = change
            # an old name may go only where the new one is on the disk: pending halves are decided once, together
            if node is None and half is not None and self._is_pending(half): there = kept.setdefault(id(half), chance())
            elif node is None: there = chance()
            else: there = kept.setdefault(id(change), chance())
            if there and node is None: names.pop(name, None)
            elif there: names[name] = node
        for name, node in names.items():
            if isinstance(node, Folder):
                (place/name).mkdir()
                self._write(node, place/name, chance, kept, rng)
            else: (place/name).write_bytes(self._content(node, chance, rng))

    def _is_pending(self, change) -> bool:
        return any(change is other for folder in self._folders(self.top) for other in folder.pending)

    def _folders(self, folder: Folder):
        yield folder
        for node in [*folder.synced.values(), *folder.live.values()]:
            if isinstance(node, Folder): yield from self._folders(node)

    def _content(self, file: File, chance, rng: random.Random) -> bytes:
        data = bytearray(file.synced)
        for at, piece in file.pending:
            if not chance(): continue
            if piece and len(piece) > SECTOR and rng.random() < .3: piece = piece[:SECTOR*rng.randrange(1 + len(piece)//SECTOR)]
            apply(data, at, piece)
        return bytes(data)
