"""Opens an HTML file in headless Chromium (Qt's) and answers what JavaScript in it says: python browser.py FILE SCRIPT.

The script is the body of a function; what it returns, what the page wrote to its console, and what it fetched from
outside the file come back as one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu"  # containers' root has no sandbox

from PySide6.QtCore import QEventLoop, QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile, QWebEngineUrlRequestInterceptor
from PySide6.QtWidgets import QApplication

PATIENCE = 60_000  # milliseconds


class Requests(QWebEngineUrlRequestInterceptor):
    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def interceptRequest(self, info: Any) -> None:
        if info.requestUrl().scheme() != "data":
            self.urls.append(info.requestUrl().toString())


class Page(QWebEnginePage):
    def __init__(self, profile: QWebEngineProfile):
        super().__init__(profile)
        self.console: list[str] = []

    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
        self.console.append(message)


def waited(start: Any) -> Any:
    """Runs Qt's loop until `start`'s callback was called; what it was called with."""
    loop, answers = QEventLoop(), []
    start(lambda answer: (answers.append(answer), loop.quit()))
    QTimer.singleShot(PATIENCE, loop.quit)
    if not answers:
        loop.exec()
    if not answers:
        raise TimeoutError("the browser did not answer")
    return answers[0]


def main(file: str, script: str) -> None:
    application = QApplication(sys.argv[:1])
    profile, requests = QWebEngineProfile(), Requests()
    profile.setUrlRequestInterceptor(requests)
    page = Page(profile)

    def load(done: Any) -> None:
        page.loadFinished.connect(done)
        page.load(QUrl.fromLocalFile(str(Path(file).resolve())))

    if not waited(load):
        raise OSError(f"{file} did not load")
    said = waited(lambda done: page.runJavaScript(f"JSON.stringify((() => {{ {script} }})())", 0, done))
    answer = {"answer": json.loads(said) if said else None, "console": page.console, "requests": requests.urls}
    print(json.dumps(answer))
    sys.stdout.flush()
    del application
    os._exit(0)  # Qt and Python do not agree on the order in which things end


if __name__ == "__main__":
    main(*sys.argv[1:])
