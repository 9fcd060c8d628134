"""The two ways input can be bad: unusable as a whole (the command ends, exit status 2), or one recording that is rejected."""


class Unusable(Exception):
    """What the user gave can't be used; the message is one line that names the file or flag and the mend."""


class Rejected(Exception):
    """One recording can't be trusted; it goes to the quarantine list under `code`, and the build goes on."""

    def __init__(self, code: str, reason: str):
        super().__init__(code, reason)  # both in args, so that it survives pickling between processes
        self.code, self.reason = code, reason

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"


class Failed(Exception):
    """Work that could not go on through no fault of the input (a full disk, say): one line, exit status 1, nothing written is lost."""
