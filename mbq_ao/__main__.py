"""`python -m mbq_ao` is the command line `mbq-ao`, see cli/."""

from mbq_ao.cli import app

if __name__ == "__main__":
    app(prog_name="python -m mbq_ao")
