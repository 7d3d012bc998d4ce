import sys

from tests.parts.install import PartMissing, install

try:
    install()
except PartMissing as error:
    sys.exit(f"{error}")
