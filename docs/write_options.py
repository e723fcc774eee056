"""Write docs/options.md anew, from the fields of the config and the commands: python docs/write_options.py"""

from pathlib import Path

from streamprune.cli import cli
from streamprune.commands.reference import options_page
from streamprune.config import PruneConfig

if __name__ == "__main__":
    Path(__file__).with_name("options.md").write_text(options_page(PruneConfig, cli), encoding="utf-8")
