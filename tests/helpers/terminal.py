"""A terminal: what a program wrote to it, and what a person sees."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import termios
from io import TextIOWrapper

CONTROL = re.compile(r"\x1b\[(\d*)([A-Z])|(.)", re.DOTALL)


class Terminal:
    """A pseudoterminal of so many rows and columns; write to :attr:`stream`, then look at :meth:`screen`."""

    def __init__(self, rows: int = 20, columns: int = 60) -> None:
        self.columns = columns
        self._reader, writer = os.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.stream: TextIOWrapper = os.fdopen(writer, "w")
        self._written = b""

    def written(self) -> str:
        """All that was written so far."""
        self.stream.flush()
        os.set_blocking(self._reader, False)
        while True:
            try:
                self._written += os.read(self._reader, 1 << 16)
            except BlockingIOError:
                return self._written.decode()

    def screen(self) -> list[str]:
        """The lines that are seen, without empty ones at the end. It knows what s2w writes: carriage return, newline,
        cursor up and erase to the end of the screen."""
        lines, row, column = [""], 0, 0
        for count, command, char in CONTROL.findall(self.written()):
            if command == "A":
                row -= int(count)
            elif command == "J":
                lines[row:] = [lines[row][:column]]
            elif command:
                raise AssertionError(f"unknown control sequence {command}")
            elif char == "\r":
                column = 0
            elif char == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            else:
                assert column < self.columns, "a line is too long for the terminal"
                lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
                column += 1
        while lines and not lines[-1].strip():
            lines.pop()
        return [line.rstrip() for line in lines]

    def close(self) -> None:
        self.stream.close()
        os.close(self._reader)
