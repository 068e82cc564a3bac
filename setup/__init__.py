"""What stands behind run.py, in the standard library alone: which ComfyUI, its environment, its server, and the commands."""


class SetupError(Exception):
    """Something the user can put right, in one line: what happened, where, what to do. `detail` is the end of a log to show above it."""

    def __init__(self, line, detail=""):
        super().__init__(line)
        self.detail = detail
