"""What the workers of mp3d.data.decode take."""

from pathlib import Path


def peak_worker_bytes() -> int:
    """The most that any running worker of this process ever had in memory."""
    largest = 0
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            try:
                command = Path(f"/proc/{child}/cmdline").read_text()
                status = Path(f"/proc/{child}/status").read_text()
            except OSError:  # it ended meanwhile
                continue
            if "mp3d.data.decode_worker" in command and "VmHWM" in status:
                largest = max(largest, int(status.split("VmHWM:")[1].split()[0]) * 1024)
    return largest
