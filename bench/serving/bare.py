"The bare loop: decode and ONNX Runtime, no server. `bare.py rate SECONDS` answers at scheduled times; rate 0: one after another, eight threads waiting makes no difference."
import json
import sys
import time
from pathlib import Path

from engine import Engine


def main():
    rate, seconds, photos = float(sys.argv[1]), float(sys.argv[2]), [path.read_bytes() for path in sorted(Path(sys.argv[3]).iterdir())]
    engine, waits = Engine(), []
    for photo in photos: engine.predict(photo)
    begin, number = time.perf_counter(), 0
    while time.perf_counter() < begin + seconds:
        due = begin + number/rate if rate else time.perf_counter()
        time.sleep(max(0., due - time.perf_counter()))
        engine.predict(photos[number % len(photos)])
        waits.append(time.perf_counter() - due)
        number += 1
    print(json.dumps({"waits": waits, "seconds": time.perf_counter() - begin, "labels": [engine.predict(photo)["label"] for photo in photos]}))


if __name__ == "__main__": main()
