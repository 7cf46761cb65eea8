"""Batches of augmented photographs a second, beside ImageFolder with PIL and DataLoader, WebDataset and MosaicML Streaming.

    python bench/loader.py [--quick] [--json FILE] [--runs N] [--photos DIR] [--gpu]

Grocery at its own size, random resized crop to 128 (area .08 to 1, antialiased), a flip, uint8 to normalised float batches of 64, for all. The sides
take turns, epoch by epoch; each has two cores: ours two threads in one process, the peers two worker processes, and torch one thread everywhere.
ImageFolder's workers stay (persistent_workers), and what its first epoch pays for starting them counts, as does our writing of the cache in ours.
WebDataset and MosaicML read shards that were written before, untimed, as JPEG; their augmentation is torchvision's on PIL images.
Ours keeps the images as squares of 348 px, which 95 % of them are. Peers come from `make bench-peers` and run on the workbench's torch and Pillow.
`--gpu`: ResNet-18 fed by ours, beside the same network on one batch that lies on the GPU already, and beside ImageFolder's recipe.
"""
import argparse
import io
import json
import os
import shutil
import statistics
import sys
import tarfile
import time
from pathlib import Path
from tempfile import TemporaryDirectory

REPO = Path(__file__).parents[1]
PHOTOS = REPO.parent/"shared"/"data"/"grocery"/"train"
PEERS = REPO/".cvops"/"peers"/"loader"
MEAN, STD = (.485, .456, .406), (.229, .224, .225)


def transform():
    "The peers' augmentation: torchvision on PIL images."
    from torchvision import transforms
    return transforms.Compose([transforms.RandomResizedCrop(128, antialias=True), transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def to_pair(sample):
    "WebDataset's sample through the augmentation."
    return transform_once(sample[0]), sample[1]


def transform_once(image, made=[]):
    "With one transform a process."
    if not made: made.append(transform())
    return made[0](image)


def settle(worker: int = 0) -> None:
    "One thread a worker."
    import torch
    torch.set_num_threads(1)


def serve_folder(photos: Path, folder: Path, device: str = "cpu"):
    "ImageFolder, PIL, DataLoader."
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    return DataLoader(ImageFolder(str(photos), transform()), 64, shuffle=True, num_workers=2, persistent_workers=True, worker_init_fn=settle, pin_memory=device != "cpu")


def serve_webdataset(photos: Path, folder: Path):
    "WebDataset over two shards, one a worker."
    import webdataset
    from torch.utils.data import DataLoader
    data = webdataset.WebDataset([str(folder/f"wds-{k}.tar") for k in range(2)], shardshuffle=False).shuffle(500).decode("pil").to_tuple("jpg", "cls").map(to_pair)
    return DataLoader(data, 64, num_workers=2, persistent_workers=True, worker_init_fn=settle)


def serve_mosaic(photos: Path, folder: Path):
    "MosaicML Streaming from a local folder."
    import streaming
    from torch.utils.data import DataLoader

    class Photos(streaming.StreamingDataset):
        def __getitem__(self, place):
            sample = super().__getitem__(place)
            from PIL import Image
            return transform_once(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]
    return DataLoader(Photos(local=str(folder/"mds"), shuffle=True, batch_size=64), 64, num_workers=2, persistent_workers=True, worker_init_fn=settle)


class Ours:
    "The pixel cache and its crops; the first epoch decodes and writes."

    def __init__(self, photos: Path, folder: Path, device: str = "cpu"):
        import pandas as pd
        self.paths, self.folder, self.device, self.crops = sorted(photos.rglob("*.jpg")), folder/"pixels", device, None
        shutil.rmtree(self.folder, ignore_errors=True)
        self.table = pd.DataFrame({"id": [f"{k:08}" for k in range(len(self.paths))], "split": "train"})

    def read(self, name: str) -> bytes:
        "The file of a sample."
        return self.paths[int(name)].read_bytes()

    def __iter__(self):
        from cvops_wb.learn.augmentation import Crops
        from cvops_wb.learn.loading import load_pixels
        if self.crops is None: self.crops = Crops(load_pixels(self, [348], self.folder, threads=2)[0].images, 128, 64, 2, device=self.device)
        return iter(self.crops)


SIDES = {"ours": Ours, "ImageFolder": serve_folder, "WebDataset": serve_webdataset, "MosaicML": serve_mosaic}


def write_shards(photos: Path, folder: Path, mosaic: bool) -> None:
    "The same files as two tars and as MDS."
    paths, names = sorted(photos.rglob("*.jpg")), {}
    for k in range(2):
        with tarfile.open(folder/f"wds-{k}.tar", "w") as tar:
            for n, path in list(enumerate(paths))[k::2]:
                label = names.setdefault(path.parent.name, len(names))
                for suffix, data in (("jpg", path.read_bytes()), ("cls", str(label).encode())):
                    entry = tarfile.TarInfo(f"{n:06}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    if not mosaic: return
    import streaming
    with streaming.MDSWriter(out=str(folder/"mds"), columns={"image": "bytes", "label": "int"}) as writer:
        for path in paths: writer.write({"image": path.read_bytes(), "label": names[path.parent.name]})


def sum_cpu() -> float:
    "Processor seconds so far of this process and its workers."
    import psutil
    me = psutil.Process()
    times = [each.cpu_times() for each in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def take_epoch(loader, count: int) -> tuple[float, float]:
    "Seconds of one epoch, on the wall and of the processor; every image came, in the right shape."
    import torch
    begin, before, seen = time.perf_counter(), sum_cpu(), 0
    for batch, _ in loader:
        assert batch.shape[1:] == (3, 128, 128) and batch.dtype == torch.float32
        seen += len(batch)
    assert seen == count, (seen, count)
    return time.perf_counter() - begin, sum_cpu() - before


def row(measure: str, ours: float, peer: float, name: str, goal: float | None, runs: int, note: str = "") -> dict:
    "One row of the table."
    ratio = ours/peer
    return {"measure": measure, "ours": round(ours, 1), "peer": round(peer, 1), "peer_name": name, "ratio": round(ratio, 2), "goal": f">= {goal}" if goal else "",
            "met": ratio >= goal if goal else None, "runs": runs, "note": note}


def warm(folder: Path) -> None:
    "Imports, and what is compiled once on a machine."
    import numpy as np

    from cvops_wb.data import decode_image, resize_image  # noqa: F401
    from cvops_wb.learn.augmentation import Crops
    np.save(folder/"still.npy", np.zeros((2, 348, 348, 3), np.uint8))
    list(Crops(np.load(folder/"still.npy", mmap_mode="r"), 128, 64, 2))


def compare(photos: Path, folder: Path, runs: int) -> list[dict]:
    "Images a second in the first epoch and later, the sides in turn."
    settle()
    count, present = len(list(photos.rglob("*.jpg"))), {"ours": Ours, "ImageFolder": serve_folder}
    present |= {name: SIDES[name] for name in ("WebDataset", "MosaicML")} if PEERS.is_dir() else {}
    write_shards(photos, folder, "MosaicML" in present)
    loaders, seconds = {name: make(photos, folder) for name, make in present.items()}, {name: [] for name in present}
    for name in present:    # imports are nobody's first epoch
        if name == "ours": warm(folder)
    for epoch in range(runs + 1):
        for name, loader in loaders.items():
            seconds[name].append(take_epoch(loader, count))
            print(f"epoch {epoch + 1}  {name:<12} {count/seconds[name][-1][0]:8.0f} images/s  {seconds[name][-1][1]/count*1e6:6.0f} µs of the processor an image", flush=True)
    rows, goals = [], {"ImageFolder": (1.3, 8)}
    for name in list(present)[1:]:
        one, more = goals.get(name, (None, None))
        for kind, unit in enumerate(("images/s", "images a second of the processor")):
            first, later = ({n: count/find([each[kind] for each in s]) for n, s in seconds.items()} for find in (lambda s: s[0], lambda s: statistics.median(s[1:])))
            rows.append(row(f"{unit}, epoch 1", first["ours"], first[name], name, one, 1, f"{count} images; ours writes its cache in it"))
            rows.append(row(f"{unit}, from epoch 2", later["ours"], later[name], name, more, runs, "median"))
    return rows if PEERS.is_dir() else [*rows, {**row("peers", 1, 1, "", None, 0, "WebDataset and MosaicML are not installed: make bench-peers"), "ratio": None}]


def feed(loader, network, steps: int) -> float:
    "Images a second through training steps."
    import torch
    optimizer, done, begin = torch.optim.SGD(network.parameters(), lr=.01), 0, 0.
    while done < steps + 5:
        for batch, _ in loader:
            if done == 5: torch.cuda.synchronize(); begin = time.perf_counter()  # noqa: E702
            with torch.autocast("cuda", torch.bfloat16): loss = network(batch.to("cuda", non_blocking=True, memory_format=torch.channels_last)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == steps + 5: break
    torch.cuda.synchronize()
    return 64*steps/(time.perf_counter() - begin)


def compare_gpu(photos: Path, folder: Path, runs: int) -> list[dict]:
    "ResNet-18 on real data, on synthetic data that lies on the GPU, and by ImageFolder's recipe."
    import torch
    from torchvision.models import resnet18
    network = resnet18().cuda().to(memory_format=torch.channels_last)
    still, ours, theirs = [(torch.randn(64, 3, 128, 128, device="cuda"), None)], Ours(photos, folder, "cuda"), serve_folder(photos, folder, "cuda")
    list(ours)
    found = [[feed(loader, network, 200) for loader in (ours, still, theirs)] for _ in range(runs)]
    mine, synthetic, folder_rate = (statistics.median(each) for each in zip(*found, strict=True))
    return [row("images/s through ResNet-18, GPU", mine, synthetic, "synthetic, on the GPU", .95, runs, torch.cuda.get_device_name()),
            row("images/s through ResNet-18, GPU", mine, folder_rate, "ImageFolder", 5, runs, torch.cuda.get_device_name())]


def main() -> None:
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, options in {"--quick": {"action": "store_true"}, "--gpu": {"action": "store_true"}, "--json": {"type": Path}, "--runs": {"type": int, "default": 4},
                          "--photos": {"type": Path, "default": PHOTOS}}.items(): parser.add_argument(name, **options)
    given = parser.parse_args()
    sys.path.append(str(PEERS))
    os.environ["PYTHONPATH"] = f"{REPO}{os.pathsep}{PEERS}"
    with TemporaryDirectory() as place:
        folder, photos = Path(place), given.photos
        if given.quick: photos = take_few(photos, folder/"photos", 600)
        rows = (compare_gpu if given.gpu else compare)(photos, folder, 2 if given.quick else given.runs)
    for each in rows: print(f"{each['measure']:<32} {each['ours']:>9} {each['peer']:>9} {each['peer_name']:<22} × {each['ratio']}  goal {each['goal'] or '-'}  {each['note']}")
    if given.json: given.json.write_text(json.dumps(rows, indent=1))


def take_few(photos: Path, folder: Path, count: int) -> Path:
    "A part of the photographs, in the same folders."
    paths = sorted(photos.rglob("*.jpg"))
    for path in paths[::max(1, len(paths)//count)]:
        target = folder/path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder


if __name__ == "__main__": main()
