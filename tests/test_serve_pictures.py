"Which images a service keeps, for how long, and who may forbid it; asked of a real one."
import hashlib
import time

import pytest
from serve_toy import photograph

from cvops_wb.core.errors import BadInput
from cvops_wb.data import read_blob
from cvops_wb.serve import Client
from cvops_wb.serve.launching import service_running


def wait(made, seconds=10.):
    "Until it holds, or the time is over."
    end = time.monotonic() + seconds
    while not made() and time.monotonic() < end: time.sleep(.05)
    return made()


@pytest.mark.parametrize("share, below, kept", [("1", "0", "all"), ("0", "1.01", "all"), ("0", "0", "none"), ("0.5", "0", "half")])
def test_images_are_kept_as_settings_and_callers_say(share, below, kept, bench, bento, monkeypatch):
    "Bit for bit under their id, for `read_blob`; what a caller forbids is not there."
    monkeypatch.setenv("CVOPS_SERVE_KEEP_SHARE", share)
    monkeypatch.setenv("CVOPS_SERVE_KEEP_BELOW", below)
    log = bench.store/"predictions"
    photos = {hashlib.sha256(data).hexdigest()[:16]: data for data in (photograph("red", seed=100 + k) for k in range(24))}
    secret = photograph("blue", seed=99)
    with service_running(bento, log, workers=1) as service, Client(service.url) as client:
        for data in photos.values(): assert client.predict(data)["label"]
        client.predict(secret, keep=False)
        wanted = {id for id in photos if kept == "all" or kept == "half" and int(id[:8], 16) < 2**31}
        folder = bench.store/"kept"
        assert wait(lambda: {p.name for p in folder.glob("??/*")} >= wanted)
    found = {p.name: p.read_bytes() for p in folder.glob("??/*")}
    assert found == {id: photos[id] for id in wanted} and (0 < len(found) < 24 or kept != "half")
    for id in wanted: assert read_blob(id, bench) == photos[id]
    with pytest.raises(BadInput): read_blob(hashlib.sha256(secret).hexdigest()[:16], bench)
    for path in folder.glob("??/*"): path.unlink()


def test_a_damaged_picture_is_no_picture(bench):
    "The id is the hash: other bytes under it are refused."
    path = bench.store/"kept"/"ab"/("ab" + "0"*14)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"something else")
    with pytest.raises(BadInput, match="damaged"): read_blob(path.name, bench)
