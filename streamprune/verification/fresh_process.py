"""The process in which `streamprune verify` loads a pruned model by plain transformers alone.

It is started before this process has imported torch, and imports its own at the same time: importing is more than half
of what it does.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamprune.errors import StreampruneError

if TYPE_CHECKING:
    from torch import Tensor


class FreshProcess:
    """`_verify_child.py`, begun at once: it runs nothing of a model's directory before it is asked to."""

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="streamprune-verify-")
        self.path = Path(self._scratch.name)
        child = Path(__file__).with_name("_verify_child.py")
        # -P: the package's own directory must not come first on the path, its module names are common words.
        command = [sys.executable, "-P", str(child), str(self.path)]
        with (self.path / "said.txt").open("w") as said:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said)

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._scratch.cleanup()

    def load(self, directory: Path, *, model_code: bool, tokenizer_code: bool) -> None:
        """Have it load `directory`; of the code that it brings, it runs what is said."""
        self._directory = directory
        self._tell(directory=str(directory), model_code=model_code, tokenizer_code=tokenizer_code)

    def ask(self, text: str, ids: Tensor) -> None:
        """Have it tokenise `text`, and pass token ids [n, seq]."""
        from safetensors.torch import save_file

        save_file({"ids": ids.contiguous()}, self.path / "ids.safetensors")
        self._tell(text=text)

    def _tell(self, **fields: Any) -> None:
        with suppress(BrokenPipeError):  # it has failed; `answer` says how
            assert self._process.stdin is not None, "it is a pipe"
            self._process.stdin.write(json.dumps(fields).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The findings, with the "logits" [n, seq, vocabulary], float32."""
        from safetensors.torch import load_file

        if (status := self._process.wait()) != 0:
            if status == -signal.SIGKILL:
                killed = "its process was killed, probably for memory; free some"
                raise StreampruneError(f"{self._directory} could not be loaded: {killed}")
            lines = (self.path / "said.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            what = "does not run" if (self.path / "loaded").exists() else "does not load"  # the child's LOADED
            raise StreampruneError(f"{self._directory} {what} in plain transformers: {(lines or ['no message'])[-1]}")
        logits = load_file(self.path / "logits.safetensors")["logits"]
        return json.loads((self.path / "findings.json").read_text()) | {"logits": logits}
