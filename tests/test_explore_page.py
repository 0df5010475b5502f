"""The page of `mpvg explore` in a browser, among variables that would open it to everybody; and the command."""

import errno
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from browser import new_page
from mpvg import runs
from mpvg.analysis.explore import Changes, ExploredRun
from mpvg.cli import explorer
from mpvg.cli.main import main
from untrained_runs import make_run

HOSTILE = {
    "GRADIO_SHARE": "True",
    "GRADIO_SERVER_NAME": "0.0.0.0",
    "GRADIO_SERVER_PORT": "1",
    "GRADIO_NUM_PORTS": "0",
    "GRADIO_ALLOWED_PATHS": "/",
    "GRADIO_MCP_SERVER": "True",
    "GRADIO_ROOT_PATH": "/elsewhere",
    "GRADIO_ANALYTICS_ENABLED": "True",
    "GRADIO_RUN_HISTORY": "True",
    "GRADIO_FLAGGING_MODE": "auto",
    "GRADIO_SSR_MODE": "True",
    "GRADIO_NUM_WORKERS": "2",
    "GRADIO_DEBUG": "1",
    "GRADIO_VIBE_MODE": "1",
    "GRADIO_WATCH_DIRS": "/",
    "GRADIO_LOCAL_DEV_MODE": "1",
    "GRADIO_PROFILING": "1",
    "SYSTEM": "spaces",
    "SPACE_ID": "somebody/something",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "ALL_PROXY": "socks5://127.0.0.1:9",
}


def obey_interrupts() -> None:
    """A process of a shell's background job would ignore Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explore")
    for method, name in (("mpvg", "<b>mpvg"), ("gap", "gap")):
        make_run(path / name, method)
    return path


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[ExploredRun]]]:
    """The address of the page of two runs, served by the command among hostile variables; and its runs.

    In a process of its own, as Gradio reads variables when it is imported, and leaves event loops open.
    """
    names = ["<b>mpvg", "gap"]
    temporary, theirs, here = (tmp_path_factory.mktemp(name) for name in ("temporary", "theirs", "here"))
    environment = os.environ | HOSTILE | {"GRADIO_TEMP_DIR": str(theirs), "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "mpvg", "explore", *(str(folder / name) for name in names)]
    with subprocess.Popen(
        command, env=environment, cwd=here, stdout=-1, stderr=-2, text=True, preexec_fn=obey_interrupts
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(3)]
        found = re.search(r"open (http://\S+) in a browser", said[-1])
        assert found, [*said, process.stdout.read()]
        torch.set_num_threads(1)
        yield found[1], [ExploredRun(runs.load(folder / name)) for name in names]
        assert any(temporary.iterdir())  # of uploads, before it ends
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "\nended\n"
        assert process.wait() == 0
    assert [*temporary.iterdir(), *theirs.iterdir(), *here.iterdir()] == []


@pytest.fixture(scope="module")
def opened(served: tuple[str, list[ExploredRun]]) -> Iterator[tuple[Any, list[str], list[str]]]:
    """The page in a browser, what it complained of, and what it column for."""
    with new_page() as (page, complaints, column):
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(served[0])
        page.wait_for_function("document.querySelectorAll('.explored table').length === 4")
        yield page, complaints, column


def table(page: Any, number: int) -> dict[str, list[str]]:
    """First column -> the others of a table of the page: probabilities, then layers, of each run."""
    rows = page.locator(".explored table").nth(number).locator("tbody tr").all()
    return {row.locator("th").text_content(): row.locator("td").all_text_contents() for row in rows}


def wait_for_change(page: Any, before: str, number: int = 0) -> None:
    page.wait_for_function(
        "([number, before]) => document.querySelectorAll('.explored table')[number]?.textContent !== before",
        arg=[number, before],
    )


def texts(page: Any) -> list[str]:
    return page.locator(".explored table").all_text_contents()


def expected(explored: ExploredRun, number: int, changes: Changes) -> dict[str, list[str]]:
    image = explored.validation_image(number).input
    now, before = (explored.predict(image, change).probabilities for change in (changes, Changes()))
    found, classes = now.topk(5)
    names = explored.run.info.class_names
    return {
        names[c]: [f"{100 * p:.2f}", f"{100 * float(before[c]):.2f}"]
        for c, p in zip(classes.tolist(), found.tolist(), strict=True)
    }


def test_a_slider_is_moved_by_the_keyboard_and_the_answer_is_that_of_the_network(
    opened: tuple[Any, list[str], list[str]], served: tuple[str, list[ExploredRun]]
) -> None:
    page, _, _ = opened
    (mpvg, gap), before = served[1], texts(page)
    assert table(page, 0) == expected(mpvg, 0, Changes())
    assert table(page, 2) == expected(gap, 0, Changes())
    assert list(table(page, 1)) == ["layer 0", "layer 1", "layer 2", "layer 3", "Last LN"]
    slider = page.get_by_label("range slider for Factor, layer 2")
    slider.focus()
    page.keyboard.press("Home")
    wait_for_change(page, before[0])
    page.wait_for_timeout(100)
    assert table(page, 0) == expected(mpvg, 0, Changes(factors={"2": 0}))
    assert [cells[0] for cells in table(page, 1).values()] == ["raw PE", "its PE", "raw PE", "its PE", "its PE"]
    assert texts(page)[2:] == before[2:]  # the other run is not column again
    page.get_by_role("button", name="Reset", exact=True).first.click()
    page.wait_for_function("before => document.querySelector('.explored table')?.textContent === before", arg=before[0])


def test_switching_off_and_exchanging_by_the_keyboard(
    opened: tuple[Any, list[str], list[str]], served: tuple[str, list[ExploredRun]]
) -> None:
    page, _, _ = opened
    mpvg, before = served[1][0], texts(page)
    page.get_by_role("checkbox", name="layer 1").focus()
    page.keyboard.press("Space")
    wait_for_change(page, before[0])
    assert table(page, 0) == expected(mpvg, 0, Changes(factors={"1": 0}))
    off = texts(page)[0]
    for label, keys in (("Exchange the PE of", 3), ("with that of", 4)):
        page.get_by_label(label).first.focus()
        page.get_by_role("listbox").wait_for()  # before it is there, keys are lost
        for _ in range(keys):
            page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.get_by_role("listbox").wait_for(state="hidden")
    wait_for_change(page, off)
    shown = [page.get_by_label(label).first.input_value() for label in ("Exchange the PE of", "with that of")]
    one, other = (label.removeprefix("layer ") for label in shown)
    assert one != other
    assert table(page, 0) == expected(mpvg, 0, Changes(factors={"1": 0}, exchanged=(one, other)))
    page.get_by_role("button", name="Reset", exact=True).first.click()
    page.wait_for_function("before => document.querySelector('.explored table')?.textContent === before", arg=before[0])


def test_another_image_moves_in_both_runs(
    opened: tuple[Any, list[str], list[str]], served: tuple[str, list[ExploredRun]]
) -> None:
    page, _, _ = opened
    before = texts(page)
    number = page.get_by_label("Validation image, 0 to 359")
    number.fill("5")
    page.wait_for_function("document.body.textContent.split('Image number 5').length === 3")
    page.get_by_label("range slider for Move right, pixels").focus()
    page.keyboard.press("ArrowRight")
    wait_for_change(page, texts(page)[2], 2)
    page.wait_for_timeout(200)
    for place, one in ((0, served[1][0]), (2, served[1][1])):
        assert table(page, place) == expected(one, 5, Changes(right=1))
    page.keyboard.press("ArrowLeft")
    number.fill("360")
    page.wait_for_selector(".problem:has-text('the number of the image is 360; allowed: 0 to 359')")
    number.fill("0")
    wait_for_change(page, "", 2)
    page.wait_for_function("before => document.querySelector('.explored table')?.textContent === before", arg=before[0])


def test_an_upload_is_answered_or_refused_in_one_line(opened: tuple[Any, list[str], list[str]], tmp_path: Path) -> None:
    page, complaints, _ = opened
    from PIL import Image

    Image.new("RGB", (20, 30), "white").save(tmp_path / "good.png")
    bytes_of = (tmp_path / "good.png").read_bytes()
    (tmp_path / "huge.png").write_bytes(resized_header(bytes_of, 30_000))
    (tmp_path / "text.png").write_text("no image")
    page.get_by_role("button", name="Another image from a file").click()
    for name, words in (
        ("good.png", "Image good.png"),
        ("huge.png", "the image cannot be read (DecompressionBomb"),
        ("text.png", "cannot identify image file"),
    ):
        page.locator("input[type=file]").set_input_files(tmp_path / name)
        page.wait_for_function("words => document.body.textContent.split(words).length === 3", arg=words)
        page.get_by_label("Clear").or_(page.get_by_label("Remove this file")).first.click()
        page.wait_for_function("document.body.textContent.split('Image number 0').length === 3")
    assert complaints == []


def resized_header(png: bytes, side: int) -> bytes:
    """A PNG whose header says that it has another size; its checksum is that of the header."""
    import zlib

    head = b"IHDR" + struct.pack(">II", side, side) + png[24:29]
    return png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:]


def test_it_is_as_wide_as_a_phone(opened: tuple[Any, list[str], list[str]]) -> None:
    page, _, _ = opened
    page.set_viewport_size({"width": 400, "height": 900})
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    page.set_viewport_size({"width": 1200, "height": 900})


def test_every_control_has_a_label_and_names_are_text(opened: tuple[Any, list[str], list[str]], folder: Path) -> None:
    page, _, _ = opened
    unnamed = page.locator("input:not([type=file]), button, select").evaluate_all(
        "all => all.filter(e => !(e.getAttribute('aria-label') || e.innerText.trim() || e.labels?.length)).length"
    )
    assert unnamed == 0
    assert page.locator(".explored h2").all_text_contents() == [str(folder / "<b>mpvg"), str(folder / "gap")]
    assert "nothing to switch off there" in page.locator("body").text_content()


def test_nothing_is_asked_of_another_host_and_nothing_complains(
    opened: tuple[Any, list[str], list[str]], served: tuple[str, list[ExploredRun]]
) -> None:
    _, complaints, column = opened
    assert complaints == []
    assert len(column) > 10
    assert [url for url in column if not url.startswith((served[0], "data:", "blob:"))] == []


def test_the_server_is_for_this_machine_and_gives_no_file(served: tuple[str, list[ExploredRun]]) -> None:
    address, explored = served
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    assert host == "127.0.0.1"
    own = socket.gethostbyname_ex(socket.gethostname())[2]
    for other in {*own, "127.0.0.2"} - {host}:
        with socket.socket() as test:
            test.settimeout(2)
            assert test.connect_ex((other, int(port))) == errno.ECONNREFUSED
    with httpx.Client(trust_env=False, base_url=address) as client:
        for path in ("/etc/hostname", str(explored[0].run.path / "config.yaml"), str(Path(__file__))):
            assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)
        assert client.get("/gradio_api/mcp/").status_code == 404
        assert client.get("/gradio_api/mcp/sse").status_code == 404
        assert client.get("/monitoring").status_code in (401, 403, 404)
        config = client.get("/config").json()
        assert config["space_id"] is None
        assert not any(config[name] for name in ("analytics_enabled", "run_history", "mcp_server", "pwa", "vibe_mode"))
        assert config["root"] == address.rstrip("/")
        evil = client.get("/config", headers={"Origin": "http://evil.example"})
        assert "access-control-allow-origin" not in evil.headers
        too_large = client.post(
            "/gradio_api/upload", files={"files": ("a.png", bytes(explorer.MAX_FILE + 1), "image/png")}
        )
        assert too_large.status_code == 413


# ---- the command


def test_a_port_that_is_taken_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["explore", str(folder / "gap"), "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"port {port} cannot be used (Address already in use)" in said


@pytest.mark.parametrize("port", ["0", "-1", "x", "65536", "99999999999"])
def test_a_port_that_does_not_exist_is_refused(folder: Path, port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", str(folder / "gap"), "--port", port]) == 2
    assert port in capsys.readouterr().err


def test_what_is_no_run_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "preprocess.json").write_text("{}")  # it is not even looked into
    for path in (tmp_path / "export", tmp_path / "gone", tmp_path):
        assert main(["explore", str(folder / "gap"), str(path)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "holds no run" in said


def test_without_gradio_the_command_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert main(["explore", str(folder / "gap")]) == 2
    assert capsys.readouterr().err == "mpvg: error: gradio is not installed; it comes with: pip install 'mpvg[app]'\n"
