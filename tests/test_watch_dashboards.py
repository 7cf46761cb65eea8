"Voila: the page behind its token, and nothing else; nothing leaves the machine, nothing is left running."
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from watch_bench import fill_bench, take_picture

from cvops_wb.core.errors import NoRoom, WrongUsage
from cvops_wb.core.processes import free_port
from cvops_wb.core.settings import load_settings
from cvops_wb.watch import dashboard_running, open_dashboard
from cvops_wb.watch.dashboards import find_notebook

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    "A full workbench for the whole file."
    root = tmp_path_factory.mktemp("dashboard")/"bench"
    root.mkdir()
    shutil.copy(REPO/"settings.ini", root)
    os.environ["CVOPS_ROOT"], before = str(root), os.environ.get("CVOPS_ROOT")
    settings = load_settings(root)
    fill_bench(settings)
    (settings.reports/".locks").mkdir()
    (settings.reports/".locks"/"secret.html").write_text("secret")
    (settings.root/"secret.html").write_text("secret")
    (settings.reports/"link.html").symlink_to(settings.root/"secret.html")
    yield settings
    if before is None: os.environ.pop("CVOPS_ROOT")
    else: os.environ["CVOPS_ROOT"] = before


@pytest.fixture(scope="module")
def served(bench):
    with dashboard_running(settings=bench) as (address, process): yield address, process


def ask(address, **headers):
    "The status that a GET is answered with."
    try:
        with urlopen(Request(address, headers=headers), timeout=20) as reply: return reply.status
    except HTTPError as e: return e.code


def family(pid):
    "A process and all that descend from it: command lines."
    import psutil
    found = psutil.Process(pid)
    return [" ".join(p.cmdline()) for p in (found, *found.children(recursive=True))]


@pytest.mark.slow
@pytest.mark.parametrize("path, status", [
    ("", 403), ("?token=wrong", 403), ("results/monitor-00000000bb/notebook.html", 403), ("api/kernels/00000000-0000-0000-0000-000000000000", 403),
    ("login", 403), ("voila/files/workbench.png", 404), ("ready", 204),
])
def test_without_the_token(served, path, status):
    assert ask(served[0].split("?")[0] + path) == status


@pytest.mark.slow
@pytest.mark.parametrize("path, status", [
    ("results/monitor-00000000bb/notebook.html", 200), ("results/monitor-00000000bb/record.json", 404), ("results/../settings.ini", 403), ("results/.locks/secret.html", 404),
    ("results/link.html", 404), ("results/%2e%2e/secret.html", 403), ("results/nothing.html", 404), ("voila/files/workbench.png", 404),
])
def test_with_the_token_only_results(served, path, status):
    # pages and pictures below reports/, nothing hidden, nothing behind a link, nothing outside
    address, token = served[0].split("?token=")
    assert ask(address + path, Authorization=f"token {token}") == status


@pytest.mark.slow
def test_under_another_name(served):
    assert ask(served[0], Host="evil.example") == 403


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_shows_the_data(served, bench, tmp_path):
    address, process = served
    token, base = address.split("token=")[1], address.split("?")[0]

    def look(tab):
        said, place = tab.inner_text(".wb"), tab.url
        with tab.context.expect_page() as opened: tab.click("a[href$='monitor-00000000bb/notebook.html']")
        opened.value.wait_for_load_state()
        inside = opened.value.evaluate("[document.title, (() => { try { return document.cookie } catch (e) { return 'refused' } })()]")
        opened.value.close()
        ini = bench.root/"settings.ini"
        ini.write_text(ini.read_text().replace("name = warehouse", "name = another"))
        tab.click("text=Refresh")
        tab.wait_for_function("document.querySelector('.wb h1').innerText.startsWith('another')")
        over = tab.evaluate("[document.documentElement.scrollWidth - innerWidth, document.documentElement.scrollHeight]")
        return said, place, inside, over, family(process.pid)
    asked, errors, (said, place, inside, (over, height), commands) = take_picture(address, tmp_path/"page.png", before=look, wait=".wb h1")
    for text in ("warehouse", "93.1 %", "camera-2", "Champion", "near duplicate 7", "rehearse"): assert text in said
    assert place == base and inside == ["ran", "refused"] and errors == [] and over <= 0 and height > 1800
    assert [url for url in asked if not url.startswith((base, "data:", "blob:", f"ws://127.0.0.1:{base.split(':')[2]}")) or "plotly" in url] == []     # as it came it draws without plotly's scripts
    assert not any(token in command for command in commands) and len(commands) >= 2
    assert token not in "".join(p.read_text() for p in (bench.cache/"dashboard").glob("*.log"))


@pytest.mark.slow
def test_ctrl_c_ends_it_all(bench):
    import psutil
    port = free_port()
    code = f"from cvops_wb.watch import open_dashboard; open_dashboard({port})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "CVOPS_ROOT": str(bench.root)})
    try:
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}/?token=" in line and ask(line.split()[1]) == 200     # a kernel was started for it
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0 and "ended" in process.stdout.read()
    finally: process.kill()
    end = time.monotonic() + 5
    while any(p.is_running() and p.status() != "zombie" for p in started) and time.monotonic() < end: time.sleep(.1)
    assert len(started) >= 2 and not [p for p in started if p.is_running() and p.status() != "zombie"]


def test_a_port_in_use(workbench):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(NoRoom, match="in use"): open_dashboard(other.getsockname()[1])


def test_the_notebook_is_found(workbench):
    assert find_notebook(workbench).is_file()
    with pytest.raises(WrongUsage): find_notebook(workbench, "absent")
    own = workbench.root/"nbs"/"dashboards"/"workbench.ipynb"
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    assert find_notebook(workbench) == own
