"""The scripts are packages of the `scripts` folder."""

import sys

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
