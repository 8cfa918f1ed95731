"""The report in a real browser: no script error, and everything that a person should see is there."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from example_run import SAMPLES, write_run

from s2w.report.page import write_report
from s2w.teacher_data.filters import FILTERS

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=5000",
    "--window-size=1280,800",
    "--dump-dom",
)
SCREEN = 800
"""Height of a small one, in pixels."""
PICTURES = ("kl", "quality", "lanes", "speed", "off_policy", "on_policy")
PROBE = """
<script>
addEventListener("load", () => {
  const all = selector => [...document.querySelectorAll(selector)];
  const lanes = document.querySelector("#lanes img");
  const map = JSON.parse(document.getElementById("hover").textContent).lanes;
  const [lane] = map.lanes, [step, start, stop] = lane.work[0];
  const x = map.left + (start + stop) / 2 / map.seconds * (map.right - map.left), y = (lane.top + lane.bottom) / 2;
  const at = lanes.getBoundingClientRect();
  lanes.dispatchEvent(new MouseEvent("mousemove", {
    clientX: at.left + x * at.width, clientY: at.top + y * at.height, bubbles: true,
  }));
  const found = {
    figures: Object.fromEntries(all("figure").map(figure => {
      const image = figure.querySelector("img");
      return [figure.id, [image.naturalWidth, image.clientWidth]];
    })),
    hint: document.getElementById("hint").textContent,
    triples: all(".mode").map(mode => [mode.dataset.mode, [...mode.querySelectorAll(".sample")].map(
      sample => ["before", "after", "teacher"].map(side => sample.querySelector(`.${side} pre`).textContent))]),
    filters: all("#filters .filter").map(row => [...row.cells].map(cell => cell.textContent)),
    comparison: all("#comparison tr").map(row => [...row.cells].map(cell => cell.textContent)),
    busy: all("#busy tr").map(row => row.cells[0].textContent),
    verdict: all("#verdict li").map(line => line.className),
    answer: document.getElementById("answer").textContent,
    first_screen: ["answer", "comparison", "verdict"].map(
      id => document.getElementById(id).getBoundingClientRect().bottom),
    wide: document.documentElement.scrollWidth > document.documentElement.clientWidth,
    requests: performance.getEntriesByType("resource").map(entry => entry.name).filter(url => !url.startsWith("data:")),
  };
  document.getElementById("unfold").click();
  found.unfolded = document.body.classList.contains("open");
  document.body.dataset.found = JSON.stringify(found);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian and Ubuntu: apt-get install chromium)")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    found = browse(write_report(tmp_path / "run", None), tmp_path)

    assert found["figures"].keys() == set(PICTURES)
    for name, (natural, shown) in found["figures"].items():
        assert natural > 0 and shown > 0, name
        assert (tmp_path / "run" / "report" / f"{name}.png").stat().st_size > 0
    assert found["hint"].startswith("rollout engine 0, step 9, 4.00 s")
    assert found["unfolded"] and not found["wide"] and not found["requests"]

    assert found["answer"].startswith("Was this run good? Yes.")
    assert max(found["first_screen"]) < SCREEN
    assert found["verdict"] == ["better", "better", "better", "unclear", "better"]
    head, *rows = found["comparison"]
    assert [cell for cell in head if "version" in cell] == ["beforeversion 0", "afterversion 12"]
    for row, digits in ((rows[0], 3), (rows[1], 4)):
        name, prompts, *cells = [cell.strip() for cell in row]
        assert (name, prompts) == ("accuracy" if digits == 3 else "forward KL, nats/token", "128")
        number = rf"[+-]?\d\.\d{{{digits}}}"
        for cell in cells[: 4 if digits == 3 else 3]:
            assert re.fullmatch(rf"{number} \[{number}, {number}\]", cell), cell
    assert rows[1][-1].strip() == "–"  # The teacher's KL to itself.
    assert found["busy"][1:] == ["rollout engine 0", "rollout engine 1", "teacher 0", "learner", "swap"]

    assert [mode for mode, _ in found["triples"]] == ["think", "no_think"]
    for mode, triples in found["triples"]:
        assert len(triples) == SAMPLES
        for before, after, teacher in triples:
            # As written, markup and think tags too.
            assert "The answer is 0. <script>" in before and "The answer is 12. <script>" in after
            assert "The answer is None. <script>" in teacher
            assert before.startswith("<think>") == (mode == "think")
    assert found["filters"] == [
        [f"– {name}", *{"truncated": ("7", "14.0 %"), "wrong": ("3", "6.0 %")}.get(name, ("0", "0.0 %"))]
        for name in FILTERS
    ]


def browse(page: Path, tmp_path: Path) -> dict[str, Any]:
    """What :data:`PROBE` finds on the page.

    Fails on a message in the browser's console.
    """
    assert CHROMIUM is not None
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    profile = tmp_path / "profile"
    profile.mkdir()
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", probed.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    [found] = re.findall(r'data-found="([^"]*)"', result.stdout)
    return json.loads(html.unescape(found))
