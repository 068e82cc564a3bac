"""`run.py families`, in the Python that has the host."""

from ..host.families import format_table


def main(argv: list[str]) -> int:
    print(format_table())
    return 0
